# SPDX-License-Identifier: Apache-2.0
"""What is decided about a machine's memory from QEMU's answers, without a QEMU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.qemu.jobs import disk_index
from vmapipe.control.qemu.vmstate_commands import (
    MemoryNote,
    MigrationProgress,
    decode_memory_note,
    enable_capabilities,
    enabled_capabilities,
    memory_note_name,
    memory_notes_in,
    migration_progress,
    restore_settings,
    undo_commands,
)

MOVING = ("setup", "active", "device", "cancelling")
RESTING = ("", "completed", "failed", "cancelled")
NOTE = MemoryNote("/run/x", False, "paused", ("xbzrle",), 1 << 27)

notes = st.builds(
    MemoryNote,
    st.text().map(lambda text: "/" + text),
    st.booleans(),
    st.sampled_from(["", "paused", "postmigrate"]),
    st.lists(st.text()).map(tuple),
    st.integers(0, 1 << 62),
)


def names(commands: Any) -> list[str]:
    return [command.name for command in commands]


def states(command: Any) -> dict[str, bool]:
    return {c["capability"]: c["state"] for c in command.arguments["capabilities"]}


@given(notes)
def test_a_note_is_read_as_it_was_written(note: MemoryNote) -> None:
    assert decode_memory_note(note.encode()) == note


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null", "{"),
        NOTE._replace(folder="tmp").encode(),
        NOTE._replace(resume="running").encode(),
        NOTE._replace(bandwidth_bytes_s="much").encode(),  # type: ignore[arg-type]
        NOTE._replace(capabilities=(1,)).encode(),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_note_of_ours_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        decode_memory_note(text)


def test_notes_are_found_among_qemus_objects() -> None:
    objects = [{"name": name} for name in ("type", "vmapipe-ab-memory", "pc.ram", "vmapipe-cd-0")]
    assert memory_notes_in(objects, "vmapipe-") == ["vmapipe-ab-memory"]
    assert memory_notes_in(objects, "vmapipe-cd-") == []
    assert disk_index(memory_note_name("ab")) == -1


@given(notes, st.sampled_from(MOVING), st.text())
def test_only_a_live_migration_is_ever_cancelled_and_nothing_else_is_done_meanwhile(
    note: MemoryNote, status: str, run_state: str
) -> None:
    commands = names(undo_commands("n", note, MigrationProgress(status, 0, 0, ""), run_state))
    can_be = note.is_live and status != "cancelling"
    assert commands == (["migrate_cancel"] if can_be else [])


@given(notes, st.sampled_from(RESTING), st.sampled_from(["running", "paused", "postmigrate"]))
def test_a_guest_that_we_stopped_goes_on_first_and_the_note_goes_last(
    note: MemoryNote, status: str, run_state: str
) -> None:
    commands = names(undo_commands("n", note, MigrationProgress(status, 0, 0, ""), run_state))
    assert (commands[0] == "cont") == (note.resume == run_state)
    assert commands[-1] == "object-del"
    assert {"migrate-set-capabilities", "migrate-set-parameters", "closefd"} <= set(commands)


@given(st.sets(st.sampled_from(["events", "background-snapshot", "xbzrle", "multifd"])))
def test_capabilities_are_set_back_to_what_they_were(on: set[str]) -> None:
    note = NOTE._replace(capabilities=tuple(on))
    now = dict.fromkeys(on, True)
    now |= states(enable_capabilities(note.capabilities, background=True))
    assert {name for name, state in now.items() if state} == {"events", "background-snapshot"}
    now |= states(restore_settings(note)[0])
    assert {name for name, state in now.items() if state} == on


def test_what_qemu_says_is_understood() -> None:
    assert enabled_capabilities([{"capability": "a", "state": True}, {"capability": "b"}]) == ("a",)
    none = migration_progress({})
    assert (none.is_moving, none.is_complete, none.why) == (False, False, "it was not begun")
    active = migration_progress({"status": "active", "ram": {"transferred": 9, "total": 2}})
    assert (active.is_moving, active.is_endless) == (True, True)
    assert active.saved_pages == 0
    assert migration_progress({"ram": {"normal": 2, "duplicate": 3}}).saved_pages == 5
    failed = migration_progress({"status": "failed", "error-desc": "no"})
    assert (failed.is_moving, failed.why) == (False, "no")
