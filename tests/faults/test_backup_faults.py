# SPDX-License-Identifier: Apache-2.0
"""A backup in which something breaks: real processes, killed and starved for real."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.machine import (
    LIMIT_S,
    VMAPIPE,
    bad,
    children,
    end_of,
    make_disk,
    next_event,
    run,
    started,
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", "AA0h" * 32)


@pytest.fixture
def temporary(short_folder: Path) -> Path:
    """TMPDIR of the backup."""
    return short_folder


@pytest.fixture
def slow_backup(disk: Path, out: Path, temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A backup of two disks that runs for hours: it is never waited for."""
    with started(
        *("backup", "--json", "--speed", "64K"),
        *("--disk", f"a={disk}", "--disk", f"b={disk}", out / "vm.vma"),
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:
        next_event(process, "begun")
        yield process


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=LIMIT_S)
    return not alive


@pytest.mark.parametrize(
    ("victim", "words"),
    [
        ("producer", "the producer of 'a' was killed by SIGKILL"),
        ("archiver", "the archiver was killed by SIGKILL"),
    ],
)
def test_a_killed_process_fails_the_job_in_one_line_and_nothing_is_left(
    slow_backup: subprocess.Popen[bytes], out: Path, victim: str, words: str
) -> None:
    everybody = psutil.Process(slow_backup.pid).children(recursive=True)
    children(slow_backup, f"vmapipe.{victim}.main")[0].kill()
    assert end_of(slow_backup) == (1, f"vmapipe backup: {words}")
    assert all_gone(everybody)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_job_with_its_exit_code_and_nothing_is_left(
    slow_backup: subprocess.Popen[bytes], out: Path, signum: signal.Signals, code: int
) -> None:
    everybody = psutil.Process(slow_backup.pid).children(recursive=True)
    slow_backup.send_signal(signum)
    assert end_of(slow_backup) == (code, f"vmapipe backup: cancelled by {signum.name}")
    assert all_gone(everybody)
    assert list(out.iterdir()) == []


def test_a_killed_coordinator_leaves_no_process_and_no_file(
    slow_backup: subprocess.Popen[bytes], out: Path, temporary: Path
) -> None:
    everybody = psutil.Process(slow_backup.pid).children(recursive=True)
    assert len(everybody) == 3
    slow_backup.kill()
    assert all_gone(everybody)
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_all_processes_killed_at_once_leave_nothing_that_outlives_the_next_backup(
    slow_backup: subprocess.Popen[bytes], disk: Path, out: Path, temporary: Path
) -> None:
    everybody = psutil.Process(slow_backup.pid).children(recursive=True)
    for process in everybody:
        process.suspend()
    slow_backup.kill()
    for process in everybody:
        process.kill()
    assert all_gone(everybody)
    assert not (out / "vm.vma").exists()
    (temporary / "vmapipe-job-killed").mkdir()
    env = {**os.environ, "TMPDIR": str(temporary)}
    assert run("backup", "--disk", f"a={disk}", out / "vm.vma", env=env).returncode == 0
    assert {path.name for path in out.iterdir()} == {"vm.vma", "vm.vma.manifest.json"}
    assert list(temporary.iterdir()) == []


def test_a_full_disk_fails_the_job_at_once_and_nothing_is_left(disk: Path, out: Path) -> None:
    text = bad(
        *("backup", "--disk", f"a={disk}", out / "vm.vma"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert str(out / "vm.vma") in text
    assert "File too large" in text
    assert list(out.iterdir()) == []


def test_a_reader_that_closes_the_pipe_fails_the_job(disk: Path) -> None:
    backup = subprocess.Popen(
        [*VMAPIPE, "backup", "--disk", f"a={disk}", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert backup.stdout is not None
    backup.stdout.read(100)
    backup.stdout.close()
    backup.stdout = None
    code, text = end_of(backup)
    assert code == 1
    assert len(text.splitlines()) == 1, text
    assert "closed" in text


@pytest.mark.parametrize(
    ("command", "words"),
    [("exit 3", "exit"), ("cat >/dev/null; exit 3", "3"), ("kill -9 $$", "SIGKILL")],
)
def test_a_failing_command_fails_the_job_and_its_status_is_said(
    disk: Path, command: str, words: str
) -> None:
    text = bad("backup", "--disk", f"a={disk}", f"exec:{command}")
    assert words in text
    assert command in text


def test_a_disk_that_shrinks_in_mid_backup_fails_the_job_with_device_and_offset(
    disk: Path, out: Path
) -> None:
    with started(
        "backup", "--json", "--speed", "512K", "--disk", f"a={disk}", out / "vm.vma"
    ) as backup:
        next_event(backup, "begun")
        os.truncate(disk, 65536 * 5 + 1)
        code, text = end_of(backup)
    assert code == 1
    assert "disk 'a'" in text
    assert "offset" in text
    assert "shrank" in text
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("existing", "code"), [("vm.vma", 1), ("folder", 2)])
def test_nothing_is_ever_overwritten(disk: Path, out: Path, existing: str, code: int) -> None:
    (out / "folder").mkdir()
    (out / "vm.vma").write_bytes(b"precious")
    text = bad("backup", "--disk", f"a={disk}", out / existing, code=code)
    assert str(out / existing) in text
    assert (out / "vm.vma").read_bytes() == b"precious"


def test_a_second_backup_to_the_same_name_is_refused_and_the_first_goes_on(
    slow_backup: subprocess.Popen[bytes], disk: Path, out: Path
) -> None:
    text = bad("backup", "--disk", f"a={disk}", out / "vm.vma")
    assert "vm.vma" in text
    assert slow_backup.poll() is None
    assert len(children(slow_backup, "vmapipe.")) == 3


def test_a_stale_socket_or_stranger_on_the_endpoint_harms_nobody(
    disk: Path, out: Path, tmp_path: Path
) -> None:
    endpoint = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(endpoint))
    with started(
        "archiver", "--listen", f"ipc://{endpoint}", "--device", "a", "--output", out / "vm.vma"
    ) as archiver:
        assert archiver.stderr is not None
        assert b"listening" in archiver.stderr.readline()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(endpoint))
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" * 100)
            done = run("producer", "--archiver", f"ipc://{endpoint}", "--disk", f"a={disk}")
        assert done.returncode == 0, done.stderr
        assert archiver.wait(LIMIT_S) == 0
