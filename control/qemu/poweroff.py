# SPDX-License-Identifier: Apache-2.0
"""A guest that powers off while it is backed up: QEMU stays until the backup has ended.

For that time QEMU is told to pause where it would end. As long as that has to be undone, QEMU
itself holds a note of it, an object that does nothing but carry a text, so that a later
process, after any crash, undoes it: QEMU ends then if its guest has powered off.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.control.qemu.jobs import PREFIX, run_prefix
from vmapipe.control.qemu.qemu_process import command_line
from vmapipe.control.qmp.connection import Command, Qmp, QmpGone, QmpRefused, ask_if_known
from vmapipe.control.qmp.reader import SHORT_LIMITS, Unreadable, read_object

_TAIL = "-poweroff"
# The run state of a machine that has powered off, or whose guest has panicked, and whose QEMU stays.
_OFF, _PANICKED = "shutdown", "guest-panicked"
# What may follow `-action` and makes QEMU do something else than to end when its guest powers off,
# or end with another exit code: then that is its user's choice.
_WISHES = frozenset({"shutdown=pause", "panic=exit-failure"})
# Of these: what may be said there, and a guest that panics does not end its QEMU.
_PANIC_WISHES = frozenset({"panic=pause", "panic=none"})


class PoweroffNote(NamedTuple):
    """The note about a machine held at power-off.

    `folder`: of the backup's sockets; `panics_end`: QEMU would end when its guest panics, too.
    """

    folder: str
    panics_end: bool

    def encode(self) -> str:
        return json.dumps(self._asdict(), separators=(",", ":"))

    def is_off(self, status: Mapping[str, Any]) -> bool:
        """Tell from the answer to query-status whether QEMU would have ended by now."""
        state = status.get("status")
        return state == _OFF or (state == _PANICKED and self.panics_end)


def decode_poweroff_note(text: str) -> PoweroffNote:
    """Decode a note. Raises ValueError."""
    try:
        found = read_object(text, SHORT_LIMITS)
    except Unreadable as error:
        raise ValueError(str(error)) from error
    match found:
        case {"folder": str(folder), "panics_end": bool(panics)} if folder.startswith("/"):
            return PoweroffNote(folder, panics)
    raise ValueError("this is not a note of ours")


def poweroff_note(
    argv: Sequence[str], status: Mapping[str, Any], folder: str
) -> PoweroffNote | None:
    """Return the note for a QEMU that ends when its guest powers off, by its command line; else None.

    `argv`: its command line, empty when it is not known; `status`: the answer to query-status.
    libvirt and Proxmox VE start theirs with -no-shutdown, and end them themselves.
    """
    if not argv or status.get("status") in (None, _OFF, _PANICKED):
        return None
    options = [word.lstrip("-") for word in argv]
    actions = {
        action
        for option, value in itertools.pairwise(options)
        if option == "action"
        for action in value.split(",")
    }
    if "no-shutdown" in options or actions & _WISHES:
        return None
    return PoweroffNote(folder, not actions & _PANIC_WISHES)


def may_be_off(event: Mapping[str, Any]) -> bool:
    """Tell whether this event may mean that the guest has powered off."""
    return event.get("event") in ("SHUTDOWN", "GUEST_PANICKED")


def hold_at_poweroff(qmp: Qmp, run: str, note: PoweroffNote) -> bool:
    """Let QEMU pause at power-off; False: this QEMU cannot. Raises QmpGone."""
    arguments = {
        "qom-type": "authz-simple",
        "id": poweroff_note_name(run),
        "identity": note.encode(),
    }
    try:
        qmp.execute(Command("object-add", arguments))
        qmp.execute(Command("set-action", {"shutdown": "pause"}))
    except QmpRefused:
        release_poweroff(qmp, run_prefix(run))
        return False
    return True


class PoweroffHold:
    """The hold on one backup's QEMU, which stays when its guest powers off."""

    def __init__(self, qmp: Qmp, run: str) -> None:
        self._qmp = qmp
        self._run = run
        self._note: PoweroffNote | None = None
        self._is_off = False

    def begin(self, pid: int | None, folder: str) -> None:
        """Keep QEMU, and the backup, alive when the guest powers off from now on. Raises QmpGone."""
        argv = command_line(pid) if pid else []
        status = ask_if_known(self._qmp, "query-status") or {}
        note = poweroff_note(argv, status, folder)
        if note and hold_at_poweroff(self._qmp, self._run, note):
            self._note = note

    def is_off_now(self, events: Iterable[Mapping[str, Any]], *, asks: bool) -> bool:
        """Tell, once, that the guest has powered off. Raises QmpGone.

        QEMU is asked when an event calls for it, or with `asks`, where events are missed.
        """
        if self._note is None or self._is_off or not (asks or any(map(may_be_off, events))):
            return False
        self._is_off = self._note.is_off(ask_if_known(self._qmp, "query-status") or {})
        return self._is_off


def poweroff_note_name(run: str) -> str:
    return f"{run_prefix(run)}{_TAIL.removeprefix('-')}"


def find_poweroff_notes(qmp: Qmp, prefix: str) -> dict[str, PoweroffNote | None]:
    """Find notes by name; None: QEMU has one that we cannot read. Raises QmpGone."""
    try:
        objects: Iterable[Mapping[str, Any]] = qmp.execute(
            Command("qom-list", {"path": "/objects"})
        )
    except QmpRefused:
        return {}
    found: dict[str, PoweroffNote | None] = {}
    for entry in objects:
        name = str(entry.get("name", ""))
        if name.startswith(prefix or PREFIX) and name.endswith(_TAIL):
            found[name] = None
            read = Command("qom-get", {"path": f"/objects/{name}", "property": "identity"})
            with contextlib.suppress(ValueError, QmpRefused):
                found[name] = decode_poweroff_note(qmp.execute(read))
    return found


def release_poweroff(qmp: Qmp, prefix: str) -> None:
    """Let QEMU end when its guest powers off, and now if it has done so. Raises QmpGone."""
    notes = find_poweroff_notes(qmp, prefix)
    if not notes:
        return
    with contextlib.suppress(QmpRefused):
        qmp.execute(Command("set-action", {"shutdown": "poweroff"}))
    # Asked afterwards: a guest that powers off in between must not be left behind.
    status = qmp.execute(Command("query-status", {}))
    if any(note.is_off(status) for note in notes.values() if note):
        with contextlib.suppress(QmpGone):  # it may end before it has answered
            qmp.execute(Command("quit", {}))
        return
    for name in notes:
        with contextlib.suppress(QmpRefused):
            qmp.execute(Command("object-del", {"id": name}))
