# SPDX-License-Identifier: Apache-2.0
"""`vmapipe status`, `cancel` and `speed`, run as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine import LIMIT_S, VMAPIPE, bad, end_of, good, make_disk, next_event, started
from vmapipe.control.cli.running import job_lines, matching
from vmapipe.runtime.errors import Failure

pytestmark = pytest.mark.usefixtures("runtime_folder")


@contextlib.contextmanager
def crawling(tmp_path: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A backup that takes hours, unless it is told otherwise."""
    # A disk of its own: making it anew would shrink it under the other backup.
    disk = make_disk(tmp_path / f"disk-{name}.raw", "AA0h" * 32)
    words = ("backup", "--json", "--speed", "1K", "--disk", f"a={disk}", tmp_path / name)
    with started(*words) as process:
        next_event(process, "begun")
        yield process


def test_without_a_backup_status_says_nothing_and_the_others_say_so(tmp_path: Path) -> None:
    assert good("status") == b""
    assert "no running backup is called 'x'; there is none at all" in bad("status", "x")
    assert "no backup of this user is running" in bad("cancel")
    assert "no backup of this user is running" in bad("speed", "1M")


def test_status_tells_of_all_backups_and_of_one(tmp_path: Path) -> None:
    with crawling(tmp_path, "one.vma"), crawling(tmp_path, "two.vma"):
        both = [json.loads(line) for line in good("status").splitlines()]
        one = str(tmp_path / "one.vma")
        assert [job["archive"] for job in both] == [one, str(tmp_path / "two.vma")]
        assert json.loads(good("status", one))["job"] == both[0]["job"]
        assert json.loads(good("status", both[1]["uuid"][:12]))["job"] == both[1]["job"]
        assert "several backups are running" in bad("cancel")


def test_cancel_comes_back_when_the_backup_has_ended(tmp_path: Path) -> None:
    with crawling(tmp_path, "vm.vma") as backup:
        assert good("cancel", "vm.vma", cwd=tmp_path) == f"{tmp_path}/vm.vma: ended\n".encode()
        assert end_of(backup) == (1, "vmapipe backup: backup canceled")
    assert not list(tmp_path.glob("vm.vma*"))


def test_speed_changes_the_limit_and_status_shows_it(tmp_path: Path) -> None:
    with crawling(tmp_path, "vm.vma") as backup:
        good("speed", "2K")
        assert json.loads(good("status"))["speed_bytes_s"] == 2048
        good("speed", json.loads(good("status"))["job"][:8], "0")
        assert end_of(backup)[0] == 0


def test_on_a_terminal_status_is_a_table_and_a_watch_ends_with_its_job(tmp_path: Path) -> None:
    with crawling(tmp_path, "vm.vma"):
        ours, theirs = pty.openpty()
        words = ("status", "--watch", "0.1", str(tmp_path / "vm.vma"))
        with subprocess.Popen([*VMAPIPE, *words], stdout=theirs) as watch:
            os.close(theirs)
            seen = b""
            while seen.count(b"the producer of 'a'") < 2:
                seen += os.read(ours, 65536)
            good("cancel")
            with contextlib.suppress(OSError):  # EIO is a terminal's end of file
                while os.read(ours, 65536):
                    pass
            assert watch.wait(LIMIT_S) == 0
        os.close(ours)
    for word in (b"vm.vma", b"DISK", b"READ", b"SAVED", b"WAITING WRITES", b"CPU", b"limit"):
        assert word in seen


JOB: dict[str, Any] = {
    "job": "3f2a" * 8,
    "uuid": "77" * 16,
    "archive": "/backup/vm.vma",
    "started": 0.0,
    "seconds": 75.0,
    "total_bytes": 4 << 30,
    "done_bytes": 1 << 30,
    "stored_bytes": 1 << 29,
    "plain_bytes": 1 << 30,
    "rate_bytes_s": 10 << 20,
    "read_rate_bytes_s": 5 << 20,
    "speed_bytes_s": 0,
    "left_s": 310,
    "devices": [
        {
            "name": "drive-scsi0",
            "bytes": 4 << 30,
            "done_bytes": 1 << 30,
            "read_bytes": 1 << 30,
            "sent_bytes": 1 << 29,
            "zero_bytes": 1 << 29,
            "saved_bytes": 65536,
            "memory_bytes": 65536,
            "spool_bytes": 0,
            "waiting_writes": 2,
        }
    ],
    "processes": [
        {"name": "the archiver", "pid": 7, "age_s": 75.0, "cpu_s": 15.0, "rss_bytes": 1 << 26}
    ],
}


def test_the_table_has_the_words_and_numbers_in_line() -> None:
    assert "\n".join(job_lines(JOB)) == (
        "/backup/vm.vma  3f2a3f2a  25 % of 4.0 GiB, 10.0 MiB/s, reads 5.0 MiB/s, 1:15 so far, 5:10 left\n"
        "  archive so far: 512.0 MiB, 50 % of 1.0 GiB before compression\n"
        "  DISK         DONE     READ       SENT       ZERO     SAVED  BUFFERED  SPOOLED"
        "  WAITING WRITES\n"
        "  drive-scsi0  25 %  1.0 GiB  512.0 MiB  512.0 MiB  64.0 KiB  64.0 KiB  0 bytes"
        "               2\n"
        "  PROCESS       PID   CPU    MEMORY\n"
        "  the archiver    7  20 %  64.0 MiB"
    )


def test_a_base_is_named_with_what_is_as_in_it_and_why_a_disk_is_sent_in_full() -> None:
    disk = JOB["devices"][0]
    devices = [
        {**disk, "unchanged_bytes": 1 << 29, "full_reason": ""},
        {**disk, "name": "b", "unchanged_bytes": 0, "full_reason": "the base has no such disk"},
    ]
    assert job_lines({**JOB, "base": "/backup/a.vma", "devices": devices})[2:4] == [
        "  base: /backup/a.vma, as in which 512.0 MiB are so far",
        "  in full: b: the base has no such disk",
    ]


def test_while_it_is_watched_cpu_is_that_of_the_time_between() -> None:
    process = {**JOB["processes"][0], "age_s": 77.0, "cpu_s": 16.0}
    later = job_lines({**JOB, "processes": [process]}, JOB)
    assert " 50 % " in later[-1]


def test_a_job_is_found_by_id_uuid_or_path_and_never_guessed() -> None:
    other = {**JOB, "job": "3f2b" * 8, "uuid": "88" * 16, "archive": "/backup/b.vma"}
    jobs = [JOB, other]
    assert matching(jobs, "3F2A") is JOB
    assert matching(jobs, "88888888-8888") is other
    assert matching(jobs, "/backup/b.vma") is other
    with pytest.raises(Failure, match="may be any of"):
        matching(jobs, "3f2")
    for unknown in ("", "-", "9", "b.vma"):
        with pytest.raises(Failure, match="no running backup is called"):
            matching(jobs, unknown)
