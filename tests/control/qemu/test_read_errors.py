# SPDX-License-Identifier: Apache-2.0
"""Disks that cannot be read everywhere, or not at once, under a guest that writes."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.paused_machine import SECTOR, Fault, FaultyMachine, faulty_machine
from tests.machine import (
    LIMIT_S,
    Need,
    bad,
    children,
    end_of,
    good,
    next_event,
    started,
    without_limit,
)

MIB = 1 << 20
SIZE = 4 * MIB


def images(folder: Path, count: int) -> list[Path]:
    """All bytes of the n-th are n + 1."""
    made = [folder / f"{number}.raw" for number in range(count)]
    for number, image in enumerate(made):
        image.write_bytes(bytes([number + 1]) * SIZE)
    return made


def backup(machine: FaultyMachine, archive: Path, *options: str) -> tuple[str, ...]:
    return ("backup", "--json", "--qmp", str(machine.qmp), *options, str(archive))


def ends(process: subprocess.Popen[bytes], archive: Path, folder: Path, disks: int) -> bool:
    """Whether the backup calls its archive stored; then it has every byte of the instant."""
    code, text = end_of(process)
    if code:
        assert (code, archive.exists()) == (1, False)
        assert "disk 'drive-virtio" in text
        return False
    good("restore", archive, folder)
    for number in range(disks):
        copy = (folder / f"disk-drive-virtio{number}.raw").read_bytes()
        assert copy == bytes([number + 1]) * SIZE
    return True


@pytest.mark.every_qemu
@pytest.mark.parametrize("bad", [2])
def test_an_archive_is_never_stored_that_lacks_old_data_which_could_not_be_read_once(
    qemu: str, need: Need, tmp_path: Path, out: Path, bad: int
) -> None:
    """Of one of three disks. What is written afterwards would be what the archive has."""
    (program,) = need("qemu-system-x86_64")
    faults = {bad: [Fault(2 * MIB, once=True)]}
    with faulty_machine(tmp_path, program, images(tmp_path, 3), faults) as machine:
        words = backup(machine, out / "vm.vma", "--speed", "192K")
        with started(*words) as process:
            next_event(process, "instant")
            wrote = machine.write_at(bad, 2 * MIB, 4096, 99)
            for number in range(3):
                assert machine.write_at(number, 3 * MIB, 2 * CLUSTER, 98)
            without_limit(process)
            stored = ends(process, out / "vm.vma", tmp_path / "restored", 3)
        assert machine.is_untouched()
    assert (wrote, stored) == (True, False)
    assert list(out.iterdir()) == []


@pytest.mark.every_qemu
def test_the_last_old_data_that_cannot_be_read_counts_as_much_as_the_first(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """All but the bad place and one cluster is copied when the guest writes there."""
    (program,) = need("qemu-system-x86_64")
    last = SIZE - CLUSTER
    faults = {0: [Fault(last, once=True)]}
    with faulty_machine(tmp_path, program, images(tmp_path, 1), faults) as machine:
        with started(*backup(machine, out / "vm.vma", "--speed", "64K")) as process:
            next_event(process, "instant")
            # Saved before it is written to: nothing of it is left to copy.
            assert machine.write_at(0, 0, last - CLUSTER, 98)
            wrote = machine.write_at(0, last, 4096, 99)
            without_limit(process)
            stored = ends(process, out / "vm.vma", tmp_path / "restored", 1)
        assert machine.is_untouched()
    assert (wrote, stored) == (True, False)


@pytest.mark.every_qemu
def test_a_place_that_can_never_be_read_fails_the_backup_with_the_disk_and_what_was_done(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    (program,) = need("qemu-system-x86_64")
    faults = {1: [Fault(2 * MIB + 8 * SECTOR)]}
    with faulty_machine(tmp_path, program, images(tmp_path, 2), faults) as machine:
        assert machine.write_at(1, 2 * MIB, 4096, 99)
        with started(*backup(machine, out / "vm.vma", "--speed", "192K")) as process:
            next_event(process, "instant")
            wrote = machine.write_at(1, 2 * MIB, 4096, 99)
            without_limit(process)
            code, text = end_of(process)
        assert machine.is_untouched()
    assert code == 1
    assert "disk 'drive-virtio1': " in text
    # By the job that copies, or before the guest's write: whichever comes there first.
    assert "while it read the disk" in text or "could not be read or sent" in text
    assert not (out / "vm.vma").exists()
    assert wrote


@pytest.mark.parametrize("victim", ["coordinator", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.every_qemu
def test_whoever_dies_after_old_data_was_lost_nothing_is_left_in_qemu(
    qemu: str, need: Need, tmp_path: Path, out: Path, victim: str
) -> None:
    """Jobs that have copied all wait for a word then, which the dead cannot say."""
    (program,) = need("qemu-system-x86_64")
    faults = {0: [Fault(2 * MIB, once=True)]}
    with faulty_machine(tmp_path, program, images(tmp_path, 2), faults) as machine:
        with started(*backup(machine, out / "vm.vma", "--speed", "64K")) as process:
            next_event(process, "instant")
            machine.write_at(0, 2 * MIB, 4096, 99)
            everybody = psutil.Process(process.pid).children(recursive=True)
            guardian = children(process, "vmapipe.control.qemu.guardian")
            dying = [psutil.Process(process.pid)]
            if victim == "all":
                dying += set(everybody) - set(guardian)
            for member in dying:
                member.suspend()
            # The second disk's job comes to its end meanwhile, and stays there.
            assert machine.write_at(1, 0, SIZE, 98)
            for member in dying:
                member.kill()
            end_of(process)
        _, alive = psutil.wait_procs(everybody, timeout=LIMIT_S)
        assert alive == []
        assert machine.is_untouched()
        assert machine.write_at(0, 0, SIZE, 97)
    assert not (out / "vm.vma").exists()


@pytest.mark.every_qemu
def test_when_everybody_dies_and_the_guardian_too_cleanup_puts_the_disks_back(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    (program,) = need("qemu-system-x86_64")
    with faulty_machine(tmp_path, program, images(tmp_path, 2), {}) as machine:
        with started(*backup(machine, out / "vm.vma", "--speed", "64K")) as process:
            next_event(process, "instant")
            assert machine.write_at(0, 2 * MIB, 4096, 99)
            dying = [psutil.Process(process.pid)]
            dying += dying[0].children(recursive=True)
            for member in dying:
                member.suspend()
            for member in dying:
                member.kill()
            end_of(process)
        good("cleanup", "--qmp", machine.qmp)
        assert machine.is_untouched()
        assert machine.write_at(0, 0, SIZE, 97)
        # And the next one is as if nothing had been.
        good("backup", "--qmp", machine.qmp, out / "next.vma")
        assert machine.is_untouched()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_whoever_is_killed_at_any_moment_each_disk_is_where_it_was(
    qemu: str, need: Need, tmp_path: Path, seed: int
) -> None:
    (program,) = need("qemu-system-x86_64")
    chance = random.Random(seed)
    with faulty_machine(tmp_path, program, images(tmp_path, 3), {}) as machine:
        with started(*backup(machine, tmp_path / "vm.vma", "--speed", "512K")) as process:
            # It is not waited for anything: any moment of it may be hit.
            time.sleep(chance.random() * 3)
            with contextlib.suppress(psutil.NoSuchProcess):
                everybody = psutil.Process(process.pid).children(recursive=True)
                guardian = children(process, "vmapipe.control.qemu.guardian")
                may_die = [psutil.Process(process.pid), *set(everybody) - set(guardian)]
                for victim in chance.sample(may_die, chance.randrange(1, len(may_die) + 1)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.kill()
            assert machine.write_at(0, 2 * MIB, 4096, 99)
            process.communicate(timeout=LIMIT_S)
            _, alive = psutil.wait_procs(everybody, timeout=LIMIT_S)
            assert alive == []
        assert machine.is_untouched()
        assert machine.write_at(1, 0, SIZE, 97)


def test_memory_is_not_saved_in_a_migration_mode_that_does_something_else(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    (program,) = need("qemu-system-x86_64")
    with faulty_machine(tmp_path, program, images(tmp_path, 1), {}) as machine:
        if "mode" not in machine.ask("query-migrate-parameters"):
            pytest.skip("this QEMU has one mode")
        machine.ask("migrate-set-parameters", mode="cpr-reboot")
        text = bad("backup", "--qmp", machine.qmp, "--state", out / "vm.vma")
        assert "migration mode is 'cpr-reboot'" in text
        assert machine.is_untouched()
