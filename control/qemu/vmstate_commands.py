# SPDX-License-Identifier: Apache-2.0
"""The commands that save a machine's memory, and those that undo it. Pure.

As long as anything of it is to be undone, QEMU itself holds a note: an object
that does nothing but carry a text. A later process, after any crash, reads
there what was changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vmapipe.control.qemu.jobs import PREFIX, run_prefix
from vmapipe.control.qmp.connection import Answer, Command
from vmapipe.control.qmp.reader import SHORT_LIMITS, Unreadable, read_object

#: QEMU's name for the descriptor of it.
FD_NAME = "vmapipe-memory"
BACKGROUND = "background-snapshot"
#: The migration mode without which a migration reboots or replaces QEMU.
NORMAL = "normal"
#: The run states in which a machine's memory can be saved, and a backup goes on from.
RUNNING = "running"
STANDING = frozenset({"paused", "prelaunch"})
#: In which we leave a machine for a moment; no other client may resume it meanwhile.
STOPPED, MIGRATED = "paused", "postmigrate"

# QEMU's default would take half a minute for 4 GiB; the archiver's pace decides.
_BANDWIDTH_BYTES_S = 1 << 40
# With it QEMU tells at once when it is done. All other capabilities are for
# migrations to another QEMU: some would spoil the stream, some it is refused with.
_EVENTS = "events"
# A guest that changes its memory faster than the archive takes it never comes
# to an end; by then the archive would hold more than this many times the memory.
_MOST_ROUNDS = 4
_MOVING = frozenset({"setup", "active", "device", "pre-switchover", "wait-unplug"})
_ENDING = frozenset({"cancelling"})


class MemoryNote(NamedTuple):
    """The note of what was changed.

    `resume`: found in this run state, the guest is to go on; empty: it runs, or is to stay.

    `is_live`: by a live migration, which can be cancelled; a background snapshot
    must come to its end. `capabilities` were on, `bandwidth_bytes_s` was set before.
    """

    folder: str
    is_live: bool
    resume: str
    capabilities: tuple[str, ...]
    bandwidth_bytes_s: int

    def encode(self) -> str:
        return json.dumps(self._asdict(), separators=(",", ":"))


def decode_memory_note(text: str) -> MemoryNote:
    """Decode a note. Raises ValueError."""
    try:
        found = read_object(text, SHORT_LIMITS)
    except Unreadable as error:
        raise ValueError(str(error)) from error
    match found:
        case {
            "folder": str(folder),
            "is_live": bool(is_live),
            "resume": "" | "paused" | "postmigrate" as resume,
            "capabilities": [*capabilities],
            "bandwidth_bytes_s": int(bandwidth),
        } if folder.startswith("/") and all(isinstance(name, str) for name in capabilities):
            return MemoryNote(folder, is_live, resume, tuple(capabilities), bandwidth)
    raise ValueError("this is not a note of ours")


def memory_note_name(run: str) -> str:
    return f"{run_prefix(run)}memory"


def memory_notes_in(objects: Iterable[Answer], prefix: str) -> list[str]:
    """Return the names of notes, from the answer to qom-list of /objects."""
    names = (str(found.get("name", "")) for found in objects)
    return [n for n in names if n.startswith(prefix or PREFIX) and n.endswith("-memory")]


def write_memory_note(name: str, note: MemoryNote) -> Command:
    text = note.encode()
    return Command("object-add", {"qom-type": "authz-simple", "id": name, "identity": text})


def rewrite_memory_note(name: str, note: MemoryNote) -> Command:
    path = f"/objects/{name}"
    return Command("qom-set", {"path": path, "property": "identity", "value": note.encode()})


def read_memory_note(name: str) -> Command:
    return Command("qom-get", {"path": f"/objects/{name}", "property": "identity"})


def enabled_capabilities(capabilities: Iterable[Answer]) -> tuple[str, ...]:
    """Return the enabled capabilities, from the answer to query-migrate-capabilities."""
    return tuple(str(c["capability"]) for c in capabilities if c.get("state"))


def lift_bandwidth() -> Command:
    return Command("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH_BYTES_S})


def enable_capabilities(before: Sequence[str], *, background: bool) -> Command:
    """Return the command for the capabilities that saving needs, where `before` were on."""
    states = {**dict.fromkeys(before, False), _EVENTS: True, BACKGROUND: background}
    return _set_capabilities(states)


def restore_settings(note: MemoryNote) -> list[Command]:
    states = {_EVENTS: False, BACKGROUND: False, **dict.fromkeys(note.capabilities, True)}
    bandwidth = {"max-bandwidth": note.bandwidth_bytes_s}
    return [_set_capabilities(states), Command("migrate-set-parameters", bandwidth)]


def _set_capabilities(states: dict[str, bool]) -> Command:
    changes = [{"capability": name, "state": state} for name, state in states.items()]
    return Command("migrate-set-capabilities", {"capabilities": changes})


def start_migration() -> Command:
    return Command("migrate", {"uri": f"fd:{FD_NAME}"})


def activate_disks(node: str, socket: str) -> tuple[Command, Command]:
    """Return commands that take a disk back, which a complete migration leaves to the other side.

    Making an export does that; no client ever connects to it.
    """
    name = f"{PREFIX}activate"
    address = {"type": "unix", "path": socket}
    arguments = {"type": "vhost-user-blk", "id": name, "node-name": node, "addr": address}
    return Command("block-export-add", arguments), Command("block-export-del", {"id": name})


class MigrationProgress(NamedTuple):
    """The progress of a migration, from the answer to query-migrate."""

    status: str
    sent_bytes: int
    memory_bytes: int
    why: str
    saved_pages: int = 0

    @property
    def is_moving(self) -> bool:
        return self.status in _MOVING | _ENDING

    @property
    def is_complete(self) -> bool:
        return self.status == "completed"

    @property
    def is_endless(self) -> bool:
        return self.sent_bytes > _MOST_ROUNDS * self.memory_bytes > 0

    @property
    def can_be_cancelled(self) -> bool:
        return self.status in _MOVING


def migration_progress(answer: Answer) -> MigrationProgress:
    ram: Any = answer.get("ram") or {}
    sent, total = int(ram.get("transferred", 0)), int(ram.get("total", 0))
    pages = int(ram.get("normal", 0)) + int(ram.get("duplicate", 0))
    why = str(answer.get("error-desc") or answer.get("status") or "it was not begun")
    return MigrationProgress(str(answer.get("status", "")), sent, total, why, pages)


def undo_commands(
    name: str, note: MemoryNote, progress: MigrationProgress, run_state: str
) -> list[Command]:
    """Return what can be undone now; ask QEMU again afterwards. The guest first, the note last."""
    if progress.is_moving:
        # A background snapshot that is cancelled, or whose stream breaks, leaves
        # the guest's memory write-protected in QEMU 7.2: it is read to its end.
        return [Command("migrate_cancel", {})] if note.is_live and progress.can_be_cancelled else []
    go_on = [Command("cont", {})] if note.resume and run_state == note.resume else []
    delete = Command("object-del", {"id": name})
    return [*go_on, *restore_settings(note), Command("closefd", {"fdname": FD_NAME}), delete]
