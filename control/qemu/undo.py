# SPDX-License-Identifier: Apache-2.0
"""Undoes a backup in QEMU: memory, jobs and nodes, power-off, in the order that costs a guest
nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from vmapipe.control.qemu.bitmaps import of_runs
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.guest_latency import remove_histograms
from vmapipe.control.qemu.jobs import (
    OwnObjects,
    devices_above_filters,
    overlays_above_filters,
    own_objects,
)
from vmapipe.control.qemu.poweroff import release_poweroff
from vmapipe.control.qemu.vmstate_commands import (
    MemoryNote,
    decode_memory_note,
    memory_notes_in,
    migration_progress,
    read_memory_note,
    undo_commands,
)
from vmapipe.control.qmp.connection import Command, Qmp, QmpRefused, ask_if_known
from vmapipe.runtime.errors import Failure

# A job ends when its requests have: milliseconds with a sink that answers at
# once; a slow disk may have to be read first.
CLEAN_UP_S = 30.0
# A target that QEMU has to connect to again is served within milliseconds of its
# next request. Where nothing listened for long, QEMU tries again every 16 s.
_SERVED_S = 20.0
_POLL_S = 0.02


def find_own_objects(qmp: Qmp, prefix: str) -> OwnObjects:
    """Find all that is named `prefix`. Raises QmpGone."""
    jobs = qmp.execute(Command("query-jobs", {}))
    nodes = qmp.execute(Command("query-named-block-nodes", {"flat": True}))
    bitmaps = of_runs(nodes, prefix)
    if not any(str(node.get("node-name", "")).startswith(prefix) for node in nodes):
        return own_objects(jobs, nodes, prefix, bitmaps=bitmaps)
    blocks = ask_if_known(qmp, "query-block") or ()
    graph = Graph(nodes, ask_if_known(qmp, "x-debug-query-block-graph"))
    ours = [name for node in nodes if (name := str(node.get("node-name", ""))).startswith(prefix)]
    return own_objects(
        jobs,
        nodes,
        prefix,
        devices_above_filters(blocks, graph.below, prefix),
        overlays_above_filters(graph, ours),
        bitmaps,
    )


def clean_up(
    qmp: Qmp, prefix: str, served: Callable[[str], bool], limit_s: float = CLEAN_UP_S
) -> None:
    """Remove all that is named `prefix` and our latency histograms, and let QEMU end if its guest has
    powered off meanwhile.

    As `remove_objects`.
    """
    remove_objects(qmp, prefix, served, limit_s)
    remove_histograms(qmp)
    release_poweroff(qmp, prefix)


def remove_objects(qmp: Qmp, prefix: str, served: Callable[[str], bool], limit_s: float) -> None:
    """Remove jobs and nodes until nothing named `prefix` is left. Raises QmpGone; Failure: too slow.

    `served`: whether a job's target is connected. A job must not be cancelled
    while its target is not: the guest's write that waits for it would fail. The
    memory's stream, if there is one, has to be read meanwhile.
    """
    undo_memory(qmp, prefix, limit_s)
    left = _await_targets(qmp, prefix, served)
    deadline = time.monotonic() + limit_s
    refused = ""
    while not left.nothing:
        for command in left.cleanup_commands():
            try:
                qmp.execute(command)
            except QmpRefused as error:
                refused = f": {error}"  # it ended meanwhile, or is in use for a moment: look again
        left = find_own_objects(qmp, prefix)
        if left.nothing:
            return
        if time.monotonic() > deadline:
            names = ", ".join(left.names)
            raise Failure(f"QEMU still has {names} after {limit_s:.0f} s{refused}")
        time.sleep(_POLL_S)


def _await_targets(qmp: Qmp, prefix: str, served: Callable[[str], bool]) -> OwnObjects:
    """Wait until the targets of active jobs are connected; return what is left then."""
    left = find_own_objects(qmp, prefix)
    if all(served(job) for job in left.active):
        return left
    for command in left.unthrottle():
        with contextlib.suppress(QmpRefused):
            qmp.execute(command)
    until = time.monotonic() + _SERVED_S
    while not all(served(job) for job in left.active) and time.monotonic() < until:
        time.sleep(_POLL_S)
        left = find_own_objects(qmp, prefix)
    return left


_MEMORY_POLL_S = 0.01
# A terabyte of memory is read and dropped in less; a QEMU that reports progress for ever is not
# believed.
_LONGEST_STREAM_S = 3600.0


def find_memory_notes(qmp: Qmp, prefix: str) -> dict[str, MemoryNote | None]:
    """Find notes by name; None: QEMU has one that we cannot read. Raises QmpGone."""
    try:
        objects = qmp.execute(Command("qom-list", {"path": "/objects"}))
    except QmpRefused:
        return {}
    found: dict[str, MemoryNote | None] = {}
    for name in memory_notes_in(objects, prefix):
        found[name] = None
        with contextlib.suppress(ValueError, QmpRefused):
            found[name] = decode_memory_note(qmp.execute(read_memory_note(name)))
    return found


def undo_memory(qmp: Qmp, prefix: str, limit_s: float) -> None:
    """Let the guest go on and restore QEMU's migration settings, until no note named `prefix` is left.

    The stream must be read meanwhile; as long as it moves this may take an hour. Raises QmpGone,
    Failure.
    """
    over = time.monotonic() + _LONGEST_STREAM_S
    deadline, moved, refused = time.monotonic() + limit_s, -1, ""
    while notes := find_memory_notes(qmp, prefix):
        progress = migration_progress(qmp.execute(Command("query-migrate", {})))
        run_state = str(qmp.execute(Command("query-status", {})).get("status", ""))
        for name, note in notes.items():
            commands = (
                undo_commands(name, note, progress, run_state)
                if note
                else [Command("object-del", {"id": name})]
            )
            for command in commands:
                try:
                    qmp.execute(command)
                except QmpRefused as error:
                    if command.name == "cont":
                        refused = f"; the guest stands still: {error}"
                        break
                    # Else it ended meanwhile, or was never there: look again.
        if progress.is_moving and progress.sent_bytes != moved:
            deadline, moved = time.monotonic() + limit_s, progress.sent_bytes
        if time.monotonic() > min(deadline, over):
            raise Failure(f"QEMU is not done with the machine's memory: {progress.why}{refused}")
        time.sleep(_MEMORY_POLL_S)
