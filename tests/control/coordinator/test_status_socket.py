# SPDX-License-Identifier: Apache-2.0
"""Real backups, asked and steered over their sockets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, end_of, good, make_disk, next_event, started
from vmapipe.control.coordinator.job_client import JobClient
from vmapipe.control.coordinator.status_socket import process_usage, sockets
from vmapipe.runtime.errors import Failure

DISK_BYTES = 128 * 65536


@pytest.fixture
def folder(runtime_folder: Path) -> Path:
    return runtime_folder


@pytest.fixture
def slow_backup(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Of two disks; it runs for hours unless it is told otherwise."""
    disk = make_disk(tmp_path / "disk.raw", "AA0h" * 32)
    with started(
        *("backup", "--json", "--speed", "1K"),
        *("--disk", f"a={disk}", "--disk", f"b={disk}", tmp_path / "vm.vma"),
    ) as process:
        next_event(process, "begun")
        yield process


def job() -> JobClient:
    (path,) = sockets().values()
    return JobClient(path)


def test_a_running_backup_tells_its_status_and_its_processes(
    slow_backup: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    next_event(slow_backup, "progress")
    with job() as client:
        status = client.execute("query-backup")
        details = client.execute("query-job")
    assert status["status"] == details["status"] == "active"
    assert status["total"] == details["total_bytes"] == 2 * DISK_BYTES
    assert status["backupfile"] == str(tmp_path / "vm.vma")
    assert details["speed_bytes_s"] == 1024
    assert [device["name"] for device in details["devices"]] == ["a", "b"]
    names = [process["name"] for process in details["processes"]]
    producers = ["the producer of 'a'", "the producer of 'b'"]
    assert names == ["the coordinator", "the archiver", *producers]
    assert details["processes"][0]["pid"] == slow_backup.pid
    assert all(process["rss_bytes"] > 1 << 20 for process in details["processes"])


def test_a_limit_that_is_lifted_lets_a_backup_of_hours_end_at_once(
    slow_backup: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    with job() as client:
        client.execute("backup-set-speed", speed=0)
        assert client.execute("query-job")["speed_bytes_s"] == 0
    assert end_of(slow_backup) == (0, "")
    assert sockets() == {}
    good("verify", tmp_path / "vm.vma")


def test_a_cancelled_backup_says_so_and_leaves_nothing(
    slow_backup: subprocess.Popen[bytes], folder: Path, tmp_path: Path
) -> None:
    with job() as client:
        client.execute("backup-cancel")
        assert client.wait_for_end(LIMIT_S)
    assert end_of(slow_backup) == (1, "vmapipe backup: backup canceled")
    assert list(folder.iterdir()) == []
    assert not list(tmp_path.glob("vm.vma*"))


@pytest.mark.parametrize("speed", [-1, "fast", None, True, 1 << 63])
def test_a_speed_that_is_none_is_refused_and_the_backup_goes_on(
    slow_backup: subprocess.Popen[bytes], speed: object
) -> None:
    with job() as client:
        with pytest.raises(Failure, match="expects a number of bytes a second"):
            client.execute("backup-set-speed", speed=speed)
        assert client.execute("query-backup")["status"] == "active"


def test_the_socket_of_a_killed_backup_does_not_stay(
    slow_backup: subprocess.Popen[bytes], folder: Path
) -> None:
    slow_backup.kill()
    slow_backup.wait()
    assert len(list(folder.iterdir())) == 1
    assert sockets() == {}
    assert list(folder.iterdir()) == []


def test_where_no_socket_can_be_made_the_backup_goes_on_and_says_so_once(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "disk.raw", "A")
    (tmp_path / "file").touch()
    environment = {**os.environ, "VMAPIPE_RUNTIME_DIR": str(tmp_path / "file")}
    out = good("backup", "--disk", disk, tmp_path / "vm.vma", env=environment)
    assert out.count(b"`vmapipe status` will not see this backup") == 1
    assert (tmp_path / "vm.vma").exists()


def test_a_process_is_as_old_as_it_is_however_the_clock_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    usage = process_usage("this one", os.getpid())
    assert usage is not None
    with open("/proc/uptime", encoding="ascii") as uptime:
        assert 0.0 < usage["age_s"] <= float(uptime.read().split()[0])
