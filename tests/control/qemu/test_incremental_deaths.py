# SPDX-License-Identifier: Apache-2.0
"""Rounds of incremental backups under a writing guest, with processes killed and QEMU restarted at any moment."""

from __future__ import annotations

import contextlib
import random
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.control.qemu.hammer import CLUSTER, Hammer
from tests.control.qemu.storage_daemon import StorageDaemon, storage_daemon
from tests.control.qemu.tracked_machine import Report
from tests.machine import LIMIT_S, Need, good, run, started
from vmapipe.control.qemu.bitmaps import archive_of

SIZES = {"a": 96 * CLUSTER + 512, "b": 64 * CLUSTER}
# Whoever is killed: a part of its command line; none: it is left alone.
VICTIMS = ("archiver.main", "producer.main", "qemu.guardian", "coordinator", "all", "", "", "")
# The guest writes to one cluster in so many during a round: on a slow machine it would else change
# more than half of a disk before the next backup, which were all full ones.
LANES = 8


class Rounds:
    """Archives of two disks, each of which must hold what was written before its instant, and no more."""

    def __init__(self, folder: Path, out: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        self._folder, self._out, self._seed = folder, out, seed
        data = {name: self._chance.randbytes(size) for name, size in SIZES.items()}
        self.images = {"a": folder / "a.raw", "b": folder / "b.qcow2"}
        self.images["a"].write_bytes(data["a"])
        (folder / "b.raw").write_bytes(data["b"])
        words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*words, folder / "b.raw", self.images["b"]], check=True)
        self._contents = {name: bytearray(content) for name, content in data.items()}
        self._day = 0
        self.incremental = self.stored = 0

    def _archive(self) -> Path:
        self._day += 1
        day = self._day
        return self._out / f"vm-2026-{1 + day // 28:02}-{1 + day % 28:02}.vma"

    def one(self, daemon: StorageDaemon) -> None:
        """A backup that somebody may die in, with a guest that writes before, during and after it."""
        archive = self._archive()
        disks = ("--disk", "a", "--disk", "b")
        words = ("backup", "--json", "--qmp", daemon.qmp, *disks, "--base", "auto", archive)
        before = {name: bytearray(content) for name, content in self._contents.items()}
        number = self._seed * 1000 + self._day
        lane = self._chance.randrange(LANES)
        with Hammer(daemon.path, SIZES, lane, LANES, pause_s=0.002, seed=number) as guest:
            guest.wait_for(5)
            victim = self._chance.choice(VICTIMS)
            said = self._back_up(words, victim)
            if victim == "all":
                # Nobody else spares the guest: its writes wait for 30 s, and then one fails.
                good("cleanup", "--qmp", daemon.qmp)
            guest.wait_for(5)
        # Since it may have died in any moment: what is there must be right.
        guest.replay_all(self._contents)
        if archive.exists():
            self._check(archive, before, guest)
            self.stored += 1
            if said:
                base = Report(said)["base"]["devices"]
                self.incremental += any(device["incremental"] for device in base)

    def _back_up(self, words: tuple[str | Path, ...], victim: str) -> bytes:
        """Return what it has told; empty: it was ended."""
        if not victim:
            return good(*words)
        with started(*words) as process:
            killer = psutil.Process(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._chance.uniform(0, 1.5))
            family = killer.children(recursive=True) if process.poll() is None else []
            for one in family if victim != "coordinator" else ():
                with contextlib.suppress(psutil.Error):
                    if victim == "all" or any(victim in word for word in one.cmdline()):
                        one.kill()
            if victim in ("coordinator", "all"):
                process.kill()
            process.communicate(timeout=LIMIT_S)
            psutil.wait_procs(family, timeout=LIMIT_S)
        return b""

    def _check(self, archive: Path, before: dict[str, bytearray], guest: Hammer) -> None:
        restored = self._folder / "restored"
        good("restore", archive, restored)
        copies = {name: (restored / f"disk-{name}.raw").read_bytes() for name in SIZES}
        guest.replay(copies, before)
        assert copies == before
        for name in SIZES:
            (restored / f"disk-{name}.raw").unlink()
        restored.rmdir()


def play(folder: Path, out: Path, seed: int, rounds: int) -> Rounds:
    """QEMU is restarted now and then, by a quit or a kill."""
    chance = random.Random(seed)
    game = Rounds(folder, out, seed)
    left = rounds
    while left:
        with storage_daemon(folder, **game.images) as daemon:
            for _ in range(min(left, chance.randrange(2, 6))):
                left -= 1
                game.one(daemon)
            run("cleanup", "--qmp", daemon.qmp)
            # After whatever died nothing but records of ours is left.
            assert all(archive_of(name) for name in daemon.ours())
            if chance.random() < 0.5:
                daemon.process.kill()
    return game


def test_a_few_rounds_with_deaths_make_no_archive_that_is_wrong(
    need: Need, tmp_path: Path, out: Path
) -> None:
    need("qemu-img", "qemu-storage-daemon")
    game = play(tmp_path, out, 1, 4)
    assert game.stored


@pytest.mark.soak
# Thirty rounds take some 70 s on a quiet machine, and several minutes on a busy one.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 5))
def test_thirty_rounds_with_deaths_and_restarts_make_no_archive_that_is_wrong(
    qemu: str, need: Need, tmp_path: Path, out: Path, seed: int
) -> None:
    need("qemu-img", "qemu-storage-daemon")
    game = play(tmp_path, out, seed, 30)
    assert game.stored > 10
    assert game.incremental > 3
