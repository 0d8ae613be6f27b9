# SPDX-License-Identifier: Apache-2.0
"""Left-overs in a QEMU of backups that crashed as a whole, guardian and all: found and removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from vmapipe.control.qemu import poweroff
from vmapipe.control.qemu.bitmaps import all_but, records_in, worthless
from vmapipe.control.qemu.drop_targets import DropTarget, StreamDrain, streams_of
from vmapipe.control.qemu.guest_latency import remove_histograms
from vmapipe.control.qemu.jobs import PREFIX, OwnTarget, own_targets
from vmapipe.control.qemu.sink_folder import STREAM_NAME, SinkFolder, sink_name
from vmapipe.control.qemu.undo import clean_up, find_memory_notes, find_own_objects
from vmapipe.control.qmp.addresses import Address, is_listening, parse_address
from vmapipe.control.qmp.client import open_link
from vmapipe.control.qmp.connection import (
    Answer,
    Command,
    Qmp,
    QmpGone,
    QmpInvalid,
    QmpLink,
    QmpRefused,
)
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.text import name_text


def remove_leftovers(qmp: Qmp, owner: Callable[[], int] = os.geteuid) -> tuple[str, ...]:
    """Remove left-overs; return their names. `owner`: the uid that QEMU runs as.

    Raises Failure when their backup, or its guardian, is alive.
    """
    left, notes = find_own_objects(qmp, PREFIX), find_memory_notes(qmp, PREFIX)
    held = poweroff.find_poweroff_notes(qmp, PREFIX)
    if left.nothing and not notes and not held:
        # Nothing tells that its backup is alive.
        return tuple(f"the latency histogram of {name}" for name in remove_histograms(qmp))
    targets = own_targets(qmp.execute(Command("query-named-block-nodes", {"flat": True})))
    with contextlib.ExitStack() as stack:
        places = _Places(stack)
        streams = {name: places.find(note.folder) for name, note in notes.items() if note}
        for name, alive in [
            *((target.node, places.listens(target)) for target in targets),
            *((name, _is_alive(folder)) for name, folder in streams.items() if folder),
            *((name, places.is_alive(note.folder)) for name, note in held.items() if note),
        ]:
            if alive:
                raise Failure(
                    f"another backup of this machine is running, or being ended ({name}); "
                    "wait for its end"
                )
        for folder in streams.values():
            if folder is not None:
                _drain(folder.open_stream())
                stack.callback(folder.remove_names, STREAM_NAME)
        # A job has the name of its target.
        stand_ins = {t.node: stack.enter_context(_drop_target(t, places, owner)) for t in targets}
        clean_up(qmp, PREFIX, lambda job: job not in stand_ins or stand_ins[job].served)
    return tuple(dict.fromkeys([*left.names, *notes, *held]))


def remove_worthless_records(qmp: Qmp) -> tuple[str, ...]:
    """Remove the records of changes that no backup can use any more; return their names."""
    return _remove_records(qmp, worthless)


def remove_records(qmp: Qmp) -> tuple[str, ...]:
    """Remove all records of changes that backups have left, of whatever archive; return their names.

    Raises Failure for one that QEMU does not let go.
    """
    removed = _remove_records(qmp, lambda nodes: all_but(nodes, b""))
    nodes = qmp.execute(Command("query-named-block-nodes", {"flat": True}))
    if left := records_in(nodes):
        raise Failure(
            f"QEMU does not remove its record {left[0].name} on its node {name_text(left[0].node)}: "
            "it is in use, or in an image that is open for reading only"
        )
    return removed


def kept_records(qmp: Qmp) -> tuple[str, ...]:
    """Return the names of the records that are there; none in a QEMU that has ended meanwhile."""
    try:
        nodes = qmp.execute(Command("query-named-block-nodes", {"flat": True}))
    except QmpGone:
        return ()
    return tuple(dict.fromkeys(record.name for record in records_in(nodes)))


def _remove_records(
    qmp: Qmp, chosen: Callable[[Sequence[Answer]], list[Command]]
) -> tuple[str, ...]:
    """Remove these records of ours; one that QEMU refuses to remove stays."""
    removed = []
    for command in chosen(qmp.execute(Command("query-named-block-nodes", {"flat": True}))):
        with contextlib.suppress(QmpRefused):
            qmp.execute(command)
            removed.append(str(command.arguments["name"]))
    return tuple(dict.fromkeys(removed))


class _Places:
    """Folders that crashed backups have left, as far as they are ours; closed with `stack`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._found: dict[str, SinkFolder] = {}

    def find(self, path: str, *, make: bool = False) -> SinkFolder | None:
        if path not in self._found:
            folder = SinkFolder.find(path, make=make)
            if folder is None:
                return None
            self._stack.callback(folder.close)
            self._found[path] = folder
        return self._found[path]

    def is_alive(self, path: str) -> bool:
        folder = self.find(path)
        return folder is not None and _is_alive(folder)

    def listens(self, target: OwnTarget) -> bool:
        """Tell whether a process listens at the address of a sink of ours."""
        sink = sink_name(target.socket)
        folder = self.find(sink.folder) if sink else None
        return bool(sink and folder and is_listening(Address(folder.address(sink.name))))


def connect_or_unblock(address: str, *, share: bool) -> QmpLink:
    """Connect to QEMU's monitor, freed from a crashed backup's stream. Raises UsageError, QmpGone."""
    try:
        return open_link(address, share=share)
    except QmpInvalid:
        raise
    except QmpGone:
        if not drain_stale_streams(parse_address(address).path):
            raise
        return open_link(address, share=share)


def drain_stale_streams(path: str) -> bool:
    """Read the streams of crashed backups for which this QEMU waits; tell whether there were any.

    `path`: its monitor's socket; empty: it has none.
    """
    found = streams_of(path) if path else {}
    left = False
    for place, fd in found.items():
        folder = SinkFolder.find(place)
        if folder is not None and _is_alive(folder):
            os.close(fd)
        else:
            _drain(fd)
            left = True
        if folder is not None:
            folder.close()
    return left


def _drain(fd: int | None) -> None:
    """Read and drop a stream for as long as this process lives: it ends before its note goes."""
    if fd is not None:
        StreamDrain(fd).start()


def _is_alive(folder: SinkFolder) -> bool:
    """Tell whether a process, at least the guardian, still listens for QEMU in this folder."""
    return any(is_listening(Address(address)) for address in folder.sinks())


@contextlib.contextmanager
def _drop_target(
    target: OwnTarget, places: _Places, owner: Callable[[], int]
) -> Iterator[DropTarget]:
    """Serve where QEMU still looks for its sink: a guest's write may be waiting for it.

    Raises Failure for an address that is not ours: QEMU may report any address.
    """
    sink = sink_name(target.socket)
    folder = places.find(sink.folder, make=True) if sink else None
    if sink is None or folder is None:
        raise Failure(
            f"QEMU's node {name_text(target.node)} looks for its sink at "
            f"{name_text(target.socket)}, where no backup of this user has made one; nothing was "
            "touched. If that was one of another user, or with another TMPDIR, run this as that "
            "user and with that TMPDIR; else remove the node in QEMU (blockdev-del)"
        )
    listener = folder.listen(sink.name)
    try:
        # Where the old socket is gone, nothing tells any more who may connect.
        if os.geteuid() == 0 and (uid := owner()) != 0:
            folder.give_to(uid)
    except OSError as error:
        listener.close()
        raise Failure(
            f"{target.socket}: cannot be given to QEMU: {os_error_text(error)}"
        ) from error
    target_server = DropTarget(listener, target.size_bytes)
    target_server.start()
    try:
        yield target_server
    finally:
        target_server.stop()
        folder.remove_names(sink.name)
