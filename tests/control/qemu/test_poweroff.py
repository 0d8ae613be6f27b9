# SPDX-License-Identifier: Apache-2.0
"""A guest that powers off in the middle of its backup: the backup is completed, then QEMU ends."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.control.qemu.paused_machine import PausedMachine, paused_machine
from tests.machine import (
    LIMIT_S,
    Need,
    children,
    end_of,
    eventually,
    good,
    next_event,
    started,
    without_limit,
)
from vmapipe.control.qemu.poweroff import PoweroffNote, decode_poweroff_note, poweroff_note

SIZE = 8 << 20
# A whole guest: it says that it is there, waits for a key, and powers off at `p` (ACPI's port on
# this machine), resets at `r`, panics at `x` (pvpanic's port).
BOOT_SECTOR = (
    bytes.fromhex(
        "b052 e6e9"  # mov al, 'R'; out 0xe9, al
        "31c0 cd16"  # again: xor ax, ax; int 0x16
        "3c70 7418"  # cmp al, 'p'; je off
        "3c72 740c"  # cmp al, 'r'; je reset
        "3c78 75f0"  # cmp al, 'x'; jne again
        "ba0505 b001 ee ebfe"  # mov dx, 0x505; mov al, 1; out dx, al; jmp $
        "baf90c b006 ee ebfe"  # reset: mov dx, 0xcf9; mov al, 6; out dx, al; jmp $
        "ba0406 b80020 ef ebfe"  # off: mov dx, 0x604; mov ax, 0x2000; out dx, ax; jmp $
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


@functools.cache
def content() -> bytes:
    return BOOT_SECTOR + b"\x66" * (SIZE - 512)


class Booted:
    def __init__(self, machine: PausedMachine, said: Path) -> None:
        self.machine = machine
        self.qemu = machine.process
        self._said = said

    def has_booted(self, times: int = 1) -> bool:
        return eventually(lambda: self._said.read_bytes() == b"R" * times)

    def press(self, key: str) -> None:
        self.machine.ask("human-monitor-command", **{"command-line": f"sendkey {key}"})

    def status(self) -> str:
        return str(self.machine.ask("query-status")["status"])

    def has_ended_well(self) -> bool:
        return self.qemu.wait(LIMIT_S) == 0


@contextmanager
def booted(need: Need, folder: Path, *options: str) -> Iterator[Booted]:
    (folder / "a.raw").write_bytes(content())
    said = folder / "said"
    said.touch()
    words = (
        *("-blockdev", "driver=raw,node-name=a,file.driver=file,file.filename={d}/a.raw"),
        *("-device", "virtio-blk-pci,drive=a,id=virtio0,bootindex=0"),
        *("-chardev", "file,id=said,path={d}/said", "-device", "isa-debugcon,chardev=said"),
    )
    with paused_machine(need, folder, *words, *options) as machine:
        machine.ask("cont")
        guest = Booted(machine, said)
        assert guest.has_booted()
        yield guest


def slow(guest: Booted, folder: Path) -> tuple[str | Path, ...]:
    qmp = guest.machine.qmp
    return ("backup", "--json", "--qmp", qmp, "--speed", "64K", folder / "vm.vma")


def is_right(folder: Path) -> bool:
    good("restore", folder / "vm.vma", folder / "out")
    return (folder / "out" / "disk-drive-virtio0.raw").read_bytes() == content()


@pytest.mark.every_qemu
def test_the_backup_of_a_guest_that_powers_off_is_completed_and_then_qemu_ends(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    with booted(need, tmp_path) as guest, started(*slow(guest, tmp_path)) as process:
        next_event(process, "instant")
        guest.press("p")
        assert "the guest has powered off" in next_event(process, "notice")["text"]
        assert guest.status() == "shutdown"
        without_limit(process)
        assert end_of(process)[0] == 0
        assert guest.has_ended_well()
    assert is_right(tmp_path)


def test_a_guest_reboots_during_its_backup_and_powers_off_after_it_as_ever(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    with booted(need, tmp_path) as guest:
        with started(*slow(guest, tmp_path)) as process:
            next_event(process, "instant")
            guest.press("r")
            assert guest.has_booted(2)
            without_limit(process)
            assert end_of(process)[0] == 0
        assert guest.status() == "running"
        assert guest.machine.ours() == []
        guest.press("p")
        assert guest.has_ended_well()
    assert is_right(tmp_path)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("end", ["cancelled", "coordinator killed", "all killed"])
def test_whatever_ends_a_backup_a_guest_that_has_powered_off_or_does_then_takes_its_qemu_along(
    qemu: str, need: Need, tmp_path: Path, end: str, when: str
) -> None:
    with booted(need, tmp_path) as guest:
        with started(*slow(guest, tmp_path)) as process:
            next_event(process, "instant")
            assert eventually(lambda: any("poweroff" in name for name in guest.machine.ours()))
            if when == "before":
                guest.press("p")
                next_event(process, "notice")
            everybody = psutil.Process(process.pid).children(recursive=True)
            guardian = children(process, "vmapipe.control.qemu.guardian")
            if end == "cancelled":
                process.send_signal(signal.SIGTERM)
            elif end == "coordinator killed":
                process.kill()
            else:
                for victim in (*guardian, psutil.Process(process.pid), *everybody):
                    victim.suspend()
                for victim in (*guardian, psutil.Process(process.pid), *everybody):
                    victim.kill()
            assert end_of(process)[0] != 0
        psutil.wait_procs(everybody, timeout=LIMIT_S)
        if end == "all killed":
            assert b"poweroff" in good("cleanup", "--qmp", guest.machine.qmp)
        if when == "after":
            assert guest.status() == "running"
            assert guest.machine.ours() == []
            guest.press("p")
        assert guest.has_ended_well()


def test_a_qemu_that_is_to_stay_when_its_guest_powers_off_stays(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    """`-no-shutdown`, as libvirt and Proxmox VE have it: what they wait for comes as ever."""
    with (
        booted(need, tmp_path, "-no-shutdown") as guest,
        started(*slow(guest, tmp_path)) as process,
    ):
        next_event(process, "instant")
        guest.press("p")
        assert eventually(lambda: guest.status() == "shutdown")
        without_limit(process)
        assert end_of(process)[0] == 0
        assert guest.status() == "shutdown"
        assert guest.machine.ours() == []
    assert is_right(tmp_path)


PANICS = ("-device", "pvpanic")


def test_the_backup_of_a_guest_that_panics_is_completed_and_then_qemu_ends(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    with booted(need, tmp_path, *PANICS) as guest, started(*slow(guest, tmp_path)) as process:
        next_event(process, "instant")
        guest.press("x")
        assert "the guest has powered off" in next_event(process, "notice")["text"]
        without_limit(process)
        assert end_of(process)[0] == 0
        assert guest.has_ended_well()
    assert is_right(tmp_path)


def test_a_qemu_that_is_to_pause_when_its_guest_panics_does_so_and_stays(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    options = (*PANICS, "-action", "panic=pause")
    with booted(need, tmp_path, *options) as guest, started(*slow(guest, tmp_path)) as process:
        next_event(process, "instant")
        guest.press("x")
        assert eventually(lambda: guest.status() == "guest-panicked")
        without_limit(process)
        assert end_of(process)[0] == 0
        assert guest.status() == "guest-panicked"
        assert guest.machine.ours() == []
    assert is_right(tmp_path)


def test_a_qemu_that_somebody_ends_ends_at_once(qemu: str, need: Need, tmp_path: Path) -> None:
    with booted(need, tmp_path) as guest, started(*slow(guest, tmp_path)) as process:
        next_event(process, "instant")
        assert eventually(lambda: any("poweroff" in name for name in guest.machine.ours()))
        os.kill(guest.qemu.pid, signal.SIGTERM)
        assert guest.has_ended_well()
        code, text = end_of(process)
        assert code == 1
        assert "QEMU has ended or closed its monitor" in text


QEMU = ["qemu-system-x86_64", "-m", "64"]
RUNS = {"status": "running"}


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (QEMU, RUNS, PoweroffNote("/f", panics_end=True)),
        (QEMU, {"status": "paused"}, PoweroffNote("/f", panics_end=True)),
        (
            [*QEMU, "-action", "reboot=shutdown,panic=shutdown"],
            RUNS,
            PoweroffNote("/f", panics_end=True),
        ),
        ([*QEMU, "-no-reboot"], RUNS, PoweroffNote("/f", panics_end=True)),
        ([*QEMU, "-action", "panic=pause"], RUNS, PoweroffNote("/f", panics_end=False)),
        ([*QEMU, "-no-shutdown"], RUNS, None),
        ([*QEMU, "--no-shutdown"], RUNS, None),
        ([*QEMU, "-action", "panic=none,shutdown=pause"], RUNS, None),
        ([*QEMU, "-action", "panic=exit-failure"], RUNS, None),
        (QEMU, {"status": "shutdown"}, None),  # it stays already
        ([], RUNS, None),  # a proxy, another pid namespace
        (QEMU, {}, None),  # a storage daemon
    ],
)
def test_a_qemu_is_held_only_when_it_is_known_to_end_with_its_guest(
    words: list[str], status: dict[str, str], expected: PoweroffNote | None
) -> None:
    assert poweroff_note(words, status, "/f") == expected


@pytest.mark.parametrize("text", ["", "{}", '{"folder": "x", "panics_end": true}', "[1]"])
def test_what_is_no_note_of_ours_is_not_read_as_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"not (a note of ours|one JSON object|a JSON object)"):
        decode_poweroff_note(text)
