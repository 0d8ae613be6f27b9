# SPDX-License-Identifier: Apache-2.0
"""A service on one host, a backup on another, and a cable between them that is pulled."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.archiver.service.serving import make_keys
from tests.machine import LIMIT_S, VMAPIPE, Need, end_of, good, make_disk, next_event, sha256
from tests.network.hosts import ARCHIVER_ADDRESS, Hosts, two_hosts

Process = subprocess.Popen[bytes]


class Scene:
    """A backup of two disks that takes some seconds, at a service of another host."""

    def __init__(self, folder: Path, hosts: Hosts, *options: str) -> None:
        self.hosts = hosts
        self.store = folder / "store"
        self.store.mkdir()
        self.disks = {n: make_disk(folder / f"{n}.raw", "AA0h" * 8, seed=ord(n)) for n in "ab"}
        self._server, clients = make_keys(folder, "host1")
        self._client = clients["host1"]
        self._options = options
        self._out = folder / "out"

    @contextmanager
    def service(self) -> Iterator[tuple[Process, str]]:
        words = ["archiver", "--listen", f"tcp://{ARCHIVER_ADDRESS}:*", "--json"]
        words += ["--directory", str(self.store), "--keys", str(self._server), *self._options]
        with _process(self.hosts.archiver, words) as process:
            yield process, next_event(process, "ready")["listen"]

    @contextmanager
    def backup(self, at: str) -> Iterator[Process]:
        """One that has begun."""
        words = ["backup", "--json", "--archiver", at, "--keys", str(self._client)]
        words += ["--speed", "1M", *(f"--disk={n}={path}" for n, path in self.disks.items())]
        with _process(self.hosts.producer, [*words, "vm.vma"]) as process:
            next_event(process, "begun")
            next_event(process, "progress")
            yield process

    def is_good(self) -> None:
        archive = self.store / "vm.vma"
        good("verify", "--quiet", "--require-manifest", archive)
        good("restore", "--quiet", archive, self._out)
        for name, disk in self.disks.items():
            assert sha256(self._out / f"disk-{name}.raw") == sha256(disk)


@contextmanager
def _process(prefix: Sequence[str], words: Sequence[str]) -> Iterator[Process]:
    process = subprocess.Popen(
        [*prefix, *VMAPIPE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def survives(folder: Path, need: Need, seed: int, cut_s: float) -> None:
    chance = random.Random(seed)
    with two_hosts(need) as hosts:
        scene = Scene(folder, hosts)
        with scene.service() as (service, at), scene.backup(at) as backup:
            time.sleep(chance.uniform(0, 1))  # at any moment of it
            hosts.plug("down")
            time.sleep(cut_s)  # so long it is pulled
            hosts.plug("up")
            assert end_of(backup) == (0, "")
            service.terminate()
            log = [
                json.loads(line) for line in service.communicate(timeout=LIMIT_S)[0].splitlines()
            ]
        assert [e["event"] for e in log if e["event"].startswith("job-s")] == ["job-stored"]
        scene.is_good()


def test_a_cable_that_is_pulled_for_a_moment_costs_a_job_at_a_service_nothing(
    tmp_path: Path, need: Need
) -> None:
    survives(tmp_path, need, 1, 1.0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(15))
def test_so_it_is_for_1_10_and_30_seconds(tmp_path: Path, need: Need, seed: int) -> None:
    survives(tmp_path, need, seed, (1.0, 10.0, 30.0)[seed % 3])


@pytest.mark.slow
def test_a_cut_beyond_the_limit_fails_the_job_on_both_sides_with_the_same_words(
    tmp_path: Path, need: Need
) -> None:
    limits = ("--heartbeat", "1", "--reconnect-limit", "2", "--client-timeout", "9")
    with two_hosts(need) as hosts:
        scene = Scene(tmp_path, hosts, *limits)
        with scene.service() as (service, at), scene.backup(at) as backup:
            hosts.plug("down")
            told = next_event(service, "job-failed")["text"]
            code, text = end_of(backup)
        assert code == 1
        for words in (told, text):
            assert words.endswith(": the connection was lost for 2 s"), (told, text)
        assert list(scene.store.iterdir()) == []
