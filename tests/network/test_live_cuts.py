# SPDX-License-Identifier: Apache-2.0
"""A disk in use, whose guest writes on, while the cable to the archiver is pulled."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, VMAPIPE, good, make_disk, sha256
from tests.network.cable import cable_to
from tests.network.hosts import ARCHIVER_ADDRESS, two_hosts
from tests.network.keys import make_client, make_server
from tests.network.place import lose_connections
from tests.producer.guard.serving import Served, serving
from tests.producer.guard.writers import Writers
from vmapipe.control.monitor.client import begin_together, guarded_disks

MIB = 1 << 20
JOB = bytes(16)

Process = subprocess.Popen[bytes]


class Backup:
    """Archiver and producer by hand, the guest's disk beside them."""

    def __init__(self, folder: Path, seed: int, clusters: int) -> None:
        self.folder = folder
        self.server = make_server(folder / "server")
        self.client = make_client(folder / "client", self.server, "host1")
        pattern = "".join(random.Random(seed).choices("AAA0hp", k=clusters))
        self.disk = make_disk(folder / "disk.raw", pattern, 5000, seed)
        self.instant = Path(shutil.copy(self.disk, folder / "instant.raw"))
        self.archive = folder / "vm.vma"

    @contextmanager
    def archiver(self, prefix: Sequence[str], listen: str) -> Iterator[tuple[Process, str]]:
        words = ["archiver", f"--listen={listen}", f"--keys={self.server}", "--expect=1"]
        with self.process(prefix, [*words, f"--output={self.archive}"]) as process:
            yield process, said(process, "listening on").split()[-1]

    @contextmanager
    def producer(
        self, prefix: Sequence[str], endpoint: str, served: Served, *more: str
    ) -> Iterator[Process]:
        """One that has reached its instant."""
        (disk,) = guarded_disks(str(served.monitor))
        words = ["producer", f"--archiver={endpoint}", f"--keys={self.client}"]
        words += [f"--guard={disk.guard}", "--disk=d", *more]
        with self.process(prefix, words) as process:
            said(process, "waiting for the instant")
            begin_together({disk.guard: ["d"]}, JOB)
            yield process

    @contextmanager
    def process(self, prefix: Sequence[str], words: Sequence[str]) -> Iterator[Process]:
        process = subprocess.Popen([*prefix, *VMAPIPE, *words], stderr=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def is_good(self) -> None:
        """The archive verifies, and holds the disk as it was at the instant."""
        good("verify", "--require-manifest", self.archive)
        good("restore", self.archive, self.folder / "restored")
        (restored,) = (self.folder / "restored").iterdir()
        assert sha256(restored) == sha256(self.instant)


def said(process: Process, words: str) -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.decode())
        if words in lines[-1]:
            return lines[-1]
    raise AssertionError(f"it ended without {words!r}: {lines}")


def ends_well(process: Process) -> None:
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, stderr.decode()


@pytest.mark.parametrize("seed", range(2))
def test_a_guest_writes_on_while_connections_end(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    backup = Backup(tmp_path, seed, clusters=160)
    with ExitStack() as stack:
        served = stack.enter_context(serving(tmp_path, d=backup.disk))
        archiver, listens = stack.enter_context(backup.archiver((), "tcp://127.0.0.1:*"))
        cable = stack.enter_context(cable_to(listens))
        cable.bytes_s = 2 * MIB
        producer = stack.enter_context(backup.producer((), cable.endpoint, served))
        with Writers(served, "d", seed=seed):
            for _ in range(3):
                lose_connections(cable, producer, chance.randrange(MIB))
            cable.bytes_s = 0.0
            ends_well(producer)
        ends_well(archiver)
    backup.is_good()


def cut_between_hosts(
    folder: Path, need: Callable[..., list[str]], seed: int, cuts_s: Sequence[float]
) -> None:
    """Pull the cable at random times while a slow backup of a busy disk runs."""
    chance = random.Random(seed)
    backup = Backup(folder, seed, clusters=160)
    with ExitStack() as stack:
        hosts = stack.enter_context(two_hosts(need))
        served = stack.enter_context(serving(folder, d=backup.disk))
        listen = f"tcp://{ARCHIVER_ADDRESS}:7777"
        archiver, _ = stack.enter_context(backup.archiver(hosts.archiver, listen))
        producer = stack.enter_context(
            backup.producer(hosts.producer, listen, served, "--speed=1M", "--buffer=8M")
        )
        with Writers(served, "d", seed=seed):
            for cut_s in cuts_s:
                time.sleep(chance.random() * 3)  # at any moment, not at a special one
                hosts.plug("down")
                time.sleep(cut_s)
                hosts.plug("up")
            ends_well(producer)
        ends_well(archiver)
    backup.is_good()


def test_a_cable_between_two_hosts_is_pulled(
    tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    cut_between_hosts(tmp_path, need, 1, [1.0])


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100))
def test_cables_are_pulled_at_random_for_1_10_and_30_seconds(
    tmp_path: Path, need: Callable[..., list[str]], seed: int
) -> None:
    cut_between_hosts(tmp_path, need, seed, [(1.0, 10.0, 30.0)[seed % 3]])
