# SPDX-License-Identifier: Apache-2.0
"""Backups of a machine of Proxmox VE, with processes of ours killed at any moment: what the next command finds."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.control.hosts.pve.simulated import SimulatedNode, conf, content, restored, stopped
from tests.control.hosts.pve.test_standstill import STANDSTILL, Host, hosted
from tests.machine import LIMIT_S, Need, eventually, run, started

MODES = ("snapshot", "suspend", "stop")
# Whoever is killed: a part of its command line; a number: so many of them, by chance.
VICTIMS = (
    "archiver.main",
    "producer.main",
    "qemu.guardian",
    STANDSTILL,
    "coordinator",
    "all",
    "some",
)


class Rounds:
    """Backups of a machine that runs, or not; after each somebody looks what is left."""

    def __init__(self, node: SimulatedNode, host: Host | None, seed: int) -> None:
        self._node, self._host, self._chance = node, host, random.Random(seed)
        self.stored = self.killed = 0

    def one(self, mode: str = "", victim: str = "") -> None:
        """`mode` and `victim`: not by chance, but then when there is half an archive."""
        before = self._status()
        is_planned = bool(mode)
        mode, victim = mode or self._chance.choice(MODES), victim or self._chance.choice(VICTIMS)
        self._back_up(mode, victim, is_planned=is_planned)
        told = f"mode {mode}, killed {victim}"
        if self._chance.random() < 0.3:
            # The next backup does it by itself.
            self._next_backup(told)
        else:
            self._clean_up(told)
        assert self._node.config(100) == conf(100, "agent: 1"), told
        assert not (self._node.root / "var/lib/vmapipe/pve/100.standstill").exists(), told
        assert self._status() == before, told
        assert self._left_in_qemu() == [], told
        self._check_archives(told)

    def _status(self) -> str:
        return self._host.status() if self._host else ""

    def _left_in_qemu(self) -> list[str]:
        return self._host.ours() if self._host else []

    def _words(self, *more: str) -> list[str | Path]:
        return self._node.words("--pve", "100", "--quiet", *more, self._node.dump)

    @property
    def _env(self) -> dict[str, str]:
        return self._host.env if self._host else dict(os.environ)

    def _back_up(self, mode: str, victim: str, *, is_planned: bool) -> None:
        speed = "64K" if is_planned else self._chance.choice(("0", "4M", "16M"))
        with started(*self._words("--mode", mode, "--speed", speed), env=self._env) as process:
            killer = psutil.Process(process.pid)
            if is_planned:
                assert eventually(lambda: bool(list(self._node.dump.glob("*.vma.partial"))))
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self._chance.uniform(0, 1.3))
            family = [killer, *killer.children(recursive=True)] if process.poll() is None else []
            family = [one for one in family if not is_foreign(one)]
            for one in self._chosen(family, victim):
                with contextlib.suppress(psutil.Error):
                    one.kill()
                    self.killed += 1
            _, said = process.communicate(timeout=LIMIT_S)
            assert b"Traceback" not in said, said
            _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
            assert alive == []

    def _chosen(self, family: list[psutil.Process], victim: str) -> list[psutil.Process]:
        if victim == "all":
            return family
        if victim == "some":
            return self._chance.sample(family, self._chance.randrange(len(family) + 1))
        if victim == "coordinator":
            return family[:1]
        return [one for one in family if any(victim in word for word in words_of(one))]

    def _clean_up(self, told: str) -> None:
        words = ("cleanup", "--pve", "100", "--pve-root", self._node.root)
        done = run(*words, env=self._env)
        if done.returncode and b"may have told it to shut down" in done.stderr:
            assert eventually(lambda: self._status() == ""), told
            done = run(*words, env=self._env)
        assert done.returncode == 0, (told, done.stderr)
        assert eventually(lambda: self._status() == "running" or not self._host), told

    def _next_backup(self, told: str) -> None:
        wait_for_another_second()
        done = run(*self._words(), env=self._env)
        assert done.returncode == 0, (told, done.stderr)

    def _check_archives(self, told: str) -> None:
        """What has an archive's name is one."""
        for path in self._node.dump.iterdir():
            if path.suffix == ".vma":
                folder = self._node.root / "restored"
                assert restored(path, folder) == {"disk-drive-scsi0.raw": content()}, told
                shutil.rmtree(folder)
                self.stored += 1
            assert path.suffix in (".vma", ".json", ".log"), (told, path)
            path.unlink()


def words_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def is_foreign(process: psutil.Process) -> bool:
    """`qm`, and the QEMU that it starts, are not ours."""
    words = words_of(process)
    return any(word.endswith(("/qm", "qemu-system-x86_64")) for word in words[:2])


def wait_for_another_second() -> None:
    """An archive's name has its second."""
    begun = time.strftime("%S")
    assert eventually(lambda: time.strftime("%S") != begun)


def play(node: SimulatedNode, need: Need, folder: Path, seed: int, rounds: int) -> Rounds:
    """A machine that runs."""
    with hosted(node, need, folder) as host:
        game = Rounds(node, host, seed)
        for _ in range(rounds):
            game.one()
    return game


def test_whatever_dies_the_next_command_leaves_the_machine_as_it_was_and_no_half_archive(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    with hosted(node, need, tmp_path) as host:
        game = Rounds(node, host, 2)
        game.one("stop", "all")
    assert game.killed


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 6))
def test_sixty_rounds_with_deaths_leave_a_machine_as_it_was(
    node: SimulatedNode, need: Need, tmp_path: Path, seed: int
) -> None:
    game = play(node, need, tmp_path, seed, 60)
    assert game.stored > 10
    assert game.killed > 15


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_sixty_rounds_with_deaths_leave_a_machine_off_that_was_so(node: SimulatedNode) -> None:
    stopped(node, 100, "agent: 1")
    game = Rounds(node, None, 6)
    for _ in range(60):
        game.one()
    assert game.stored > 10
