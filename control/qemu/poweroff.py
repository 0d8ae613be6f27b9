# SPDX-License-Identifier: Apache-2.0
"""A guest that powers off while it is backed up: QEMU stays until the backup has ended.

For that time QEMU is told to pause where it would end. As long as that has to be undone, QEMU
itself holds a note of it, an object that does nothing but carry a text, so that whoever comes
later, after any crash, undoes it: QEMU ends then if its guest has powered off.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.control.qemu.plan import PREFIX, run_prefix
from vmapipe.control.qemu.qmp import Command, Qmp, QmpGone, QmpRefused
from vmapipe.control.qemu.qmp_reader import SHORT_LIMITS, Unreadable, read_object

_TAIL = "-poweroff"
# The run state of a machine that has powered off and whose QEMU goes on.
_OFF = "shutdown"
# What may follow `-action` and makes QEMU do something else than to end when its guest powers off
# or panics: then that is somebody's wish.
_WISHES = ("shutdown=pause", "panic=exit-failure")
# Whoever asks for these has QEMU end at once, whatever it was told.
_AT_ONCE = frozenset({"host-qmp-quit", "host-signal"})


class Note(NamedTuple):
    """`folder`: of the backup's sockets; `is_off`: QEMU would have ended by now."""

    folder: str
    is_off: bool = False

    def encode(self) -> str:
        return json.dumps(self._asdict(), separators=(",", ":"))


def decode_note(text: str) -> Note:
    """Raises ValueError."""
    try:
        found = read_object(text, SHORT_LIMITS)
    except Unreadable as error:
        raise ValueError(str(error)) from error
    match found:
        case {"folder": str(folder), "is_off": bool(is_off)} if folder.startswith("/"):
            return Note(folder, is_off)
    raise ValueError("this is not a note of ours")


def may_be_held(words: Sequence[str], status: Mapping[str, Any]) -> bool:
    """Whether QEMU is known to end when its guest powers off: nobody can ask it.

    `words`: its command line, empty when it is not known; `status`: the answer to query-status.
    libvirt and Proxmox VE start theirs with -no-shutdown, and end them themselves.
    """
    if not words or status.get("status") in (None, _OFF):
        return False
    options = [word.lstrip("-") for word in words]
    return "no-shutdown" not in options and not any(
        wish in value
        for option, value in itertools.pairwise(options)
        if option == "action"
        for wish in _WISHES
    )


def powers_off(event: Mapping[str, Any]) -> bool:
    """Whether this event of QEMU's says that it would end now."""
    reason = (event.get("data") or {}).get("reason")
    return event.get("event") == "SHUTDOWN" and reason not in _AT_ONCE


def is_off(status: Mapping[str, Any]) -> bool:
    """Whether QEMU, which was told to pause, would have ended: from the answer to query-status."""
    return status.get("status") in (_OFF, "guest-panicked")


def hold(qmp: Qmp, run: str, folder: str) -> bool:
    """From now on it stays; False: this QEMU cannot. Raises QmpGone."""
    words = {"qom-type": "authz-simple", "id": note_name(run), "identity": Note(folder).encode()}
    try:
        qmp.execute(Command("object-add", words))
        qmp.execute(Command("set-action", {"shutdown": "pause"}))
    except QmpRefused:
        let_go(qmp, run_prefix(run))
        return False
    return True


def has_powered_off(qmp: Qmp, run: str, folder: str) -> None:
    """Remembered in QEMU: a guest that has panicked cannot be told from its run state. Raises QmpGone."""
    path, text = f"/objects/{note_name(run)}", Note(folder, is_off=True).encode()
    with contextlib.suppress(QmpRefused):
        qmp.execute(Command("qom-set", {"path": path, "property": "identity", "value": text}))


def note_name(run: str) -> str:
    return f"{run_prefix(run)}{_TAIL.removeprefix('-')}"


def find_notes(qmp: Qmp, prefix: str) -> dict[str, Note | None]:
    """By name; None: QEMU has one that we cannot read. Raises QmpGone."""
    try:
        objects: Iterable[Mapping[str, Any]] = qmp.execute(
            Command("qom-list", {"path": "/objects"})
        )
    except QmpRefused:
        return {}
    found: dict[str, Note | None] = {}
    for entry in objects:
        name = str(entry.get("name", ""))
        if name.startswith(prefix or PREFIX) and name.endswith(_TAIL):
            found[name] = None
            read = Command("qom-get", {"path": f"/objects/{name}", "property": "identity"})
            with contextlib.suppress(ValueError, QmpRefused):
                found[name] = decode_note(qmp.execute(read))
    return found


def let_go(qmp: Qmp, prefix: str) -> None:
    """QEMU ends again when its guest powers off, and now if it has done so. Raises QmpGone."""
    notes = find_notes(qmp, prefix)
    if not notes:
        return
    with contextlib.suppress(QmpRefused):
        qmp.execute(Command("set-action", {"shutdown": "poweroff"}))
    # Asked afterwards: a guest that powers off in between must not be left behind.
    was_off = any(note and note.is_off for note in find_notes(qmp, prefix).values())
    status = qmp.execute(Command("query-status", {}))
    runs = status.get("running", True)
    if status.get("status") == _OFF or (was_off and not runs):
        with contextlib.suppress(QmpGone):  # it may end before it has answered
            qmp.execute(Command("quit", {}))
        return
    for name in notes:
        with contextlib.suppress(QmpRefused):
            qmp.execute(Command("object-del", {"id": name}))
