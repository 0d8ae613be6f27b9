# SPDX-License-Identifier: Apache-2.0
"""A service behind a network that breaks: jobs go on, coordinator and producers alike."""

from __future__ import annotations

import random
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.archiver.service.serving import make_keys, serving
from tests.machine import end_of, good, make_disk, next_event, sha256, started
from tests.network.cable import cable_to
from tests.network.place import lose_connections

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(2))
def test_a_job_at_a_service_goes_on_after_lost_connections(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    disks = {
        name: make_disk(tmp_path / name, "AA0h" * 40, seed=seed + i) for i, name in enumerate("ab")
    }
    server, clients = make_keys(tmp_path, "host1")
    with (
        serving(tmp_path / "store", keys=(server, clients["host1"])) as served,
        cable_to(served.endpoint) as cable,
    ):
        cable.bytes_s = 4 * MIB
        words = ("backup", "--json", "--archiver", cable.endpoint, *served.link)
        named = [word for name, disk in disks.items() for word in ("--disk", f"{name}={disk}")]
        with started(*words, *named, "vm.vma") as backup:
            next_event(backup, "begun")
            for _ in range(3):
                lose_connections(cable, backup, chance.randrange(MIB))
            code, text = end_of(backup)
            assert code == 0, text
        served.stop()
        (archive,) = list(served.folder.rglob("*.vma"))
    good("verify", "--require-manifest", archive)
    good("restore", archive, tmp_path / "restored")
    for name, disk in disks.items():
        assert sha256(tmp_path / "restored" / f"disk-{name}.raw") == sha256(disk)


def test_a_connection_that_stays_away_is_told_and_its_return_too(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 40)
    server, clients = make_keys(tmp_path, "host1")
    with (
        serving(tmp_path / "store", keys=(server, clients["host1"])) as served,
        cable_to(served.endpoint) as cable,
    ):
        cable.bytes_s = MIB
        words = ("backup", "--json", "--archiver", cable.endpoint, *served.link)
        with started(*words, "--disk", f"a={disk}", "vm.vma") as backup:
            next_event(backup, "begun")
            cable.drop()
            assert "the connection is lost, and tried again" in next_notice(backup)
            cable.refusing, cable.bytes_s = False, 0.0
            assert "the connection is there again" in next_notice(backup)
            code, text = end_of(backup)
            assert code == 0, text


def next_notice(backup: subprocess.Popen[bytes]) -> str:
    text: str = next_event(backup, "notice")["text"]
    return text


def test_what_is_said_of_a_base_is_said_again_after_lost_connections(tmp_path: Path) -> None:
    """Questions for digests, their answers, and "unchanged": all of them may be lost on the way."""
    chance = random.Random(5)
    disk = make_disk(tmp_path / "disk", "AA0h" * 100)
    server, clients = make_keys(tmp_path, "host1")
    keys = (server, clients["host1"])
    with (
        serving(tmp_path / "store", "--per-client", keys=keys) as served,
        cable_to(served.endpoint) as cable,
    ):
        words = ("backup", "--json", "--base", "auto", "--disk", f"a={disk}")
        good(*words, *served.words, "vm-2026-01-01.vma")
        with disk.open("r+b") as file:
            for number in range(0, 400, 9):
                file.seek(number << 16)
                file.write(chance.randbytes(100))
        cable.bytes_s = MIB
        with started(
            *words, "--archiver", cable.endpoint, *served.link, "vm-2026-01-02.vma"
        ) as new:
            assert next_event(new, "base")["devices"][0]["incremental"]
            next_event(new, "begun")
            for _ in range(3):
                lose_connections(cable, new, chance.randrange(MIB // 4))
            code, text = end_of(new)
            assert code == 0, text
        served.stop()
    archive = tmp_path / "store" / "host1" / "vm-2026-01-02.vma"
    good("restore", archive, tmp_path / "restored")
    assert sha256(tmp_path / "restored" / "disk-a.raw") == sha256(disk)


def test_a_flood_at_a_service_leaves_room_for_its_clients(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", "AA0h" * 4)
    server, clients = make_keys(tmp_path, "host1")
    with (
        serving(tmp_path / "store", keys=(server, clients["host1"])) as served,
        ExitStack() as stack,
    ):
        host, port = served.endpoint.removeprefix("tcp://").split(":")
        before = psutil.Process(served.process.pid).num_fds()
        for _ in range(1500):
            connection = socket.create_connection((host, int(port)), timeout=30)
            stack.callback(connection.close)
        told = served.next_event("notice")["text"]
        assert "connections that have proved nothing: the oldest are closed" in told
        assert psutil.Process(served.process.pid).num_fds() <= before + 8
        good("backup", "--quiet", *served.words, "--disk", f"a={disk}", "vm.vma")
        served.stop()
