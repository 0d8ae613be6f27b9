# SPDX-License-Identifier: Apache-2.0
"""Hundreds of backups of disks under load, and of processes killed at any moment."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.control.qemu.hammer import CLUSTER, Hammer
from tests.control.qemu.running_guest import RunningGuest
from tests.control.qemu.storage_daemon import storage_daemon
from tests.machine import LIMIT_S, Need, good, started

pytestmark = pytest.mark.soak
_BACKUPS = 4


def disk(folder: Path, chance: random.Random, name: str) -> tuple[Path, bytes]:
    """Of any size and sparseness, raw or qcow2, and its content."""
    size = chance.randrange(8, 200) * CLUSTER + chance.choice((0, 512, 4096, 61440))
    density = chance.random()
    data = bytearray(size)
    for at in range(0, size, CLUSTER):
        if chance.random() < density:
            piece = data[at : at + CLUSTER]
            data[at : at + len(piece)] = chance.randbytes(len(piece))
    raw = folder / f"{name}.raw"
    raw.write_bytes(data)
    if chance.random() < 0.5:
        return raw, bytes(data)
    image = folder / f"{name}.qcow2"
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)]
    subprocess.run(words, check=True)
    return image, bytes(data)


@pytest.mark.parametrize("seed", range(80))
def test_backups_of_disks_that_many_write_to_show_one_instant(
    qemu: str, need: Need, tmp_path: Path, seed: int
) -> None:
    need("qemu-storage-daemon", "qemu-img")
    chance = random.Random(seed)
    names = [f"d{index}" for index in range(chance.randrange(1, 4))]
    made = {name: disk(tmp_path, chance, name) for name in names}
    contents = {name: content for name, (_, content) in made.items()}
    sizes = {name: len(content) for name, content in contents.items()}
    lanes = chance.randrange(1, 5)
    with (
        storage_daemon(tmp_path, **{name: image for name, (image, _) in made.items()}) as daemon,
        contextlib.ExitStack() as stack,
    ):
        hammers = [
            Hammer(daemon.path, sizes, lane, lanes, chance.choice((0, 0.001, 0.01)), seed)
            for lane in range(lanes)
        ]
        for hammer in hammers:
            stack.enter_context(hammer)
        archives = []
        for number in range(_BACKUPS):
            archive = tmp_path / f"{number}.vma"
            words = [word for name in names for word in ("--disk", name)]
            words += ["--speed", chance.choice(("0", "0", "8M", "40M"))]
            words += ["--buffer", chance.choice(("8M", "64M"))]
            good("backup", "--qmp", daemon.qmp, *words, archive)
            assert daemon.ours() == []
            archives.append(archive)
        for hammer in hammers:
            hammer.wait_for(1)
    for archive in archives:
        folder = tmp_path / archive.stem
        good("restore", archive, folder)
        copies = {name: (folder / f"disk-{name}.raw").read_bytes() for name in names}
        model = {name: bytearray(content) for name, content in contents.items()}
        for hammer in hammers:
            hammer.replay(copies, model)
        assert copies == model


@pytest.mark.parametrize("seed", range(80))
def test_whoever_is_killed_at_any_moment_of_a_backup_with_memory_the_guest_goes_on(
    guest: RunningGuest, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    words = ("backup", "--qmp", guest.qmp, "--state", "--speed", "24M", tmp_path / "vm.vma")
    with started(*words) as process:
        # It is not waited for anything: any moment of the two seconds may be hit.
        time.sleep(chance.random() * 2)
        with contextlib.suppress(psutil.NoSuchProcess):
            everybody = psutil.Process(process.pid).children(recursive=True)
            may_die = [
                psutil.Process(process.pid),
                *(p for p in everybody if not is_guardian(p)),
            ]
            for victim in chance.sample(may_die, chance.randrange(1, len(may_die) + 1)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
        process.communicate(timeout=LIMIT_S)
        _, alive = psutil.wait_procs(everybody, timeout=LIMIT_S)
        assert alive == []
    guest.goes_on(2)
    guest.is_untouched()


def is_guardian(process: psutil.Process) -> bool:
    return any("vmapipe.control.qemu.guardian" in word for word in process.cmdline())
