# SPDX-License-Identifier: Apache-2.0
"""Disks with read errors at random, for a moment or for good, under a guest that writes at random.

What is called stored equals the instant; and a write of the guest that fails would have failed
without a backup, too: it writes whole sectors, and nothing below reads before it writes.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path

import pytest

from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.paused_machine import SECTOR, Fault, faulty_machine
from tests.machine import Need, end_of, good, started, without_limit

_SIZE = 48 * CLUSTER


def faults_of(chance: random.Random) -> list[Fault]:
    """Mostly some for a moment, now and then one that stays."""
    places = chance.sample(range(_SIZE // SECTOR), chance.choice((0, 1, 1, 2, 5)))
    return [Fault(place * SECTOR, once=chance.random() < 0.8) for place in places]


def one_run(need: Need, folder: Path, seed: int) -> tuple[bool, int, int]:
    """Whether it was stored, how many writes of the guest failed, and how many faults there were."""
    (program,) = need("qemu-system-x86_64")
    chance = random.Random(seed)
    disks = chance.randrange(1, 4)
    images = [folder / f"{number}.raw" for number in range(disks)]
    for image in images:
        image.write_bytes(chance.randbytes(_SIZE))
    truth = [image.read_bytes() for image in images]
    # Where there is one, the job meets it or a write does: half of the machines have none.
    healthy = chance.random() < 0.5
    faults = {number: [] if healthy else faults_of(chance) for number in range(disks)}
    failed, count = 0, sum(len(found) for found in faults.values())
    with faulty_machine(folder, program, images, faults) as machine:
        words = (
            "backup",
            "--json",
            "--qmp",
            machine.qmp,
            "--speed",
            f"{chance.choice((256, 768))}K",
        )
        with started(*words, folder / "vm.vma") as process:
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line)["event"] == "instant":
                    break  # a fault may end it before
            for _ in range(chance.randrange(1, 30)):
                disk = chance.randrange(disks)
                length = chance.choice((SECTOR, 4096, CLUSTER, 3 * CLUSTER))
                at = chance.randrange((_SIZE - length) // SECTOR + 1) * SECTOR
                failed += not machine.write_at(disk, at, length, chance.randrange(256))
                time.sleep(chance.choice((0, 0, 0.02)))  # so that runs differ, not to wait for it
            with contextlib.suppress(AssertionError):  # it has ended
                without_limit(process)
            code, text = end_of(process)
        assert machine.is_untouched()
    stored = code == 0
    assert stored == (folder / "vm.vma").exists()
    if stored:
        good("restore", folder / "vm.vma", folder / "restored")
        for number in range(disks):
            copy = (folder / "restored" / f"disk-drive-virtio{number}.raw").read_bytes()
            assert copy == truth[number]
    else:
        assert "disk 'drive-virtio" in text
    assert stored or count
    return stored, failed, count


@pytest.mark.every_qemu
def test_archives_are_right_or_refused_and_no_write_fails_of_a_disk_that_cannot_be_read(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        _, failed, _ = one_run(need, folder, seed)
        assert failed == 0


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 80))
def test_the_same_for_many_seeds(qemu: str, need: Need, tmp_path: Path, seed: int) -> None:
    _, failed, _ = one_run(need, tmp_path, seed)
    assert failed == 0
