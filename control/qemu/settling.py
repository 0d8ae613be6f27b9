# SPDX-License-Identifier: Apache-2.0
"""After a backup with memory: the guest runs on, and QEMU's migration is as it was."""

from __future__ import annotations

import contextlib
import time

from vmapipe.control.qemu.memory import Note, decode_note, notes_in, progress_of, read_note, undo
from vmapipe.control.qmp.connection import Command, Qmp, QmpRefused
from vmapipe.runtime.errors import Failure

_LOOK_S = 0.01
# A terabyte of memory that nobody needs any more is read in less; a QEMU whose word is that it moves
# and moves is not believed for ever.
_LONGEST_S = 3600.0


def find_notes(qmp: Qmp, prefix: str) -> dict[str, Note | None]:
    """By name; None: QEMU has one that we cannot read. Raises QmpGone."""
    try:
        objects = qmp.execute(Command("qom-list", {"path": "/objects"}))
    except QmpRefused:
        return {}
    found: dict[str, Note | None] = {}
    for name in notes_in(objects, prefix):
        found[name] = None
        with contextlib.suppress(ValueError, QmpRefused):
            found[name] = decode_note(qmp.execute(read_note(name)))
    return found


def settle(qmp: Qmp, prefix: str, limit_s: float) -> None:
    """Until no note named `prefix` is left. Somebody has to read the stream meanwhile.

    As long as that moves it may take an hour. Raises QmpGone, Failure.
    """
    over = time.monotonic() + _LONGEST_S
    deadline, moved, refused = time.monotonic() + limit_s, -1, ""
    while notes := find_notes(qmp, prefix):
        progress = progress_of(qmp.execute(Command("query-migrate", {})))
        run_state = str(qmp.execute(Command("query-status", {})).get("status", ""))
        for name, note in notes.items():
            commands = (
                undo(name, note, progress, run_state)
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
        time.sleep(_LOOK_S)
