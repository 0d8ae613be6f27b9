# SPDX-License-Identifier: Apache-2.0
"""What runs that crashed as a whole, guardian and all, have left in a QEMU."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

from vmapipe.control.qemu import poweroff
from vmapipe.control.qemu.cleaning import clean, look
from vmapipe.control.qemu.draining import Draining, open_left, streams_of
from vmapipe.control.qemu.dropping import Dropping
from vmapipe.control.qemu.guardian import listens
from vmapipe.control.qemu.memory import STREAM_NAME
from vmapipe.control.qemu.plan import PREFIX, LeftTarget, left_targets
from vmapipe.control.qemu.qmp import Command, Qmp, QmpGone
from vmapipe.control.qemu.qmp_link import QmpLink
from vmapipe.control.qemu.settling import find_notes
from vmapipe.runtime.errors import Failure, os_error_text


def remove_leftovers(qmp: Qmp) -> tuple[str, ...]:
    """The names of jobs and nodes that are gone now.

    Raises Failure when they are no left-overs: their backup, or its guardian, lives.
    """
    left, notes = look(qmp, PREFIX), find_notes(qmp, PREFIX)
    held = poweroff.find_notes(qmp, PREFIX)
    if left.nothing and not notes and not held:
        return ()
    targets = left_targets(qmp.execute(Command("query-named-block-nodes", {"flat": True})))
    folders = {name: note.folder for name, note in notes.items() if note}
    for name, alive in [
        *((target.node, listens(target.socket)) for target in targets),
        *((name, _is_alive(folder)) for name, folder in folders.items()),
        *((name, _is_alive(note.folder)) for name, note in held.items() if note),
    ]:
        if alive:
            raise Failure(
                f"another backup of this machine is running, or being ended ({name}); "
                "wait for its end"
            )
    with contextlib.ExitStack() as stack:
        for folder in folders.values():
            stream = os.path.join(folder, STREAM_NAME)
            _drain(stream)
            stack.callback(_remove, stream)
        # A job has the name of its target.
        stand_ins = {t.node: stack.enter_context(_standing_in(t)) for t in targets}
        clean(qmp, PREFIX, lambda job: job not in stand_ins or stand_ins[job].served)
    return tuple(dict.fromkeys([*(name for kind in left for name in kind), *notes, *held]))


def connect(path: str) -> QmpLink:
    """Raises QmpGone."""
    try:
        return QmpLink(path)
    except QmpGone:
        if not unblock(path):
            raise
        return QmpLink(path)


def unblock(path: str) -> bool:
    """Whether this QEMU answered nobody because of a stream that a crashed backup has left."""
    found = streams_of(path)
    left = [place for folder, place in found.items() if not _is_alive(folder)]
    for place in left:
        _drain(place)
    return bool(left)


def _drain(path: str) -> None:
    """For as long as this process lives: the stream ends before its note goes."""
    fd = open_left(path)
    if fd is not None:
        Draining(fd).start()


def _remove(stream: str) -> None:
    """The pipe, and its folder if nothing else is in it: QEMU told the name, so not more."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.lstat(stream).st_mode):
            os.unlink(stream)
        os.rmdir(os.path.dirname(stream))


def _is_alive(folder: str) -> bool:
    """Whether somebody, at least the guardian, still listens for QEMU in this folder."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".sock")]
    except OSError:
        return False
    return any(listens(os.path.join(folder, name)) for name in names)


@contextlib.contextmanager
def _standing_in(target: LeftTarget) -> Iterator[Dropping]:
    """Serve where QEMU still looks for its sink: a guest's write may be waiting for it."""
    folder = os.path.dirname(target.socket)
    made = not os.path.isdir(folder)
    listener = socket.socket(socket.AF_UNIX)
    try:
        if made:
            os.mkdir(folder, 0o700)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target.socket)
        listener.bind(target.socket)
        listener.listen()
    except OSError as error:
        listener.close()
        raise Failure(f"cannot listen on {target.socket}: {os_error_text(error)}") from error
    dropping = Dropping(listener, target.size_bytes)
    dropping.start()
    try:
        yield dropping
    finally:
        dropping.stop()
        with contextlib.suppress(OSError):
            os.unlink(target.socket)
            os.rmdir(folder)
