# SPDX-License-Identifier: Apache-2.0
"""The log beside an archive."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.machine import good, make_disk
from vmapipe.control.coordinator.log import JobLog
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.event_types import BackupProgressEvent
from vmapipe.runtime.events import Event

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
WHAT = ("VM 100", "qemu")


def test_the_log_reads_like_vzdumps(tmp_path: Path) -> None:
    progress: BackupProgressEvent = {
        "event": "progress",
        "stored_bytes": 40,
        "plain_bytes": 40,
        "devices": [{"name": "drive-scsi0", "done_bytes": 50, "zero_bytes": 20, "bytes": 100}],
    }
    with JobLog(str(tmp_path / "log"), *WHAT) as log:
        log({"event": "reading", "device": "drive-scsi0", "path": "/x", "bytes": 100})
        log({"event": "begun", "uuid": "7" * 32, "devices": []})
        log(progress)
        log(progress)
        log({"event": "attached", "device": "drive-scsi0"})
        log(
            {
                "event": "stored",
                "archive": "x",
                "uuid": "7" * 32,
                "stored_bytes": 2048,
                "plain_bytes": 2048,
            }
        )
    patterns = [
        r"INFO: Starting Backup of VM 100 \(qemu\)",
        r"INFO: Backup started at " + STAMP.strip(),
        r"INFO: include disk 'scsi0' '/x' 100 bytes",
        r"INFO: started backup task '7{32}'",
        r"INFO: 50% \(50 bytes of 100 bytes\) in 0s, read: .*/s",
        r"INFO: backup is sparse: 20 bytes \(20%\) total zero data",
        r"INFO: transferred 100 bytes in 0 seconds \(.*/s\)",
        r"INFO: archive file size: 2\.0 KiB",
        r"INFO: Finished Backup of VM 100 \(00:00:00\)",
        r"INFO: Backup finished at " + STAMP.strip(),
    ]
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(patterns)
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(STAMP + pattern, line), line


def test_the_log_of_a_failed_job_says_why(tmp_path: Path) -> None:
    with pytest.raises(Failure), JobLog(str(tmp_path / "log"), *WHAT):
        raise Failure("the disk is full")
    error, last = (tmp_path / "log").read_text().splitlines()[-2:]
    assert error.endswith("ERROR: Backup of VM 100 failed - the disk is full")
    assert " INFO: Failed at " in last


def log_a_failure(path: Path, level: str) -> None:
    with JobLog(str(path), *WHAT, level) as log:
        log({"event": "attached", "device": "a"})
        log({"event": "instant", "held_s": 0.001})
        log({"event": "notice", "text": "slow"})
        raise Failure("the disk is full")


@pytest.mark.parametrize(("level", "lines"), [("debug", 7), ("info", 6), ("warn", 2), ("error", 1)])
def test_the_level_chooses_what_is_written(tmp_path: Path, level: str, lines: int) -> None:
    with pytest.raises(Failure):
        log_a_failure(tmp_path / "log", level)
    assert len((tmp_path / "log").read_text().splitlines()) == lines


def test_a_log_is_never_overwritten_but_may_go_on(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    with pytest.raises(Failure, match=r"cannot write the log .*: File exists"):
        JobLog(str(tmp_path / "log"), *WHAT)
    with JobLog(str(tmp_path / "log"), *WHAT, append=True):
        pass
    assert (tmp_path / "log").read_text().startswith("before\n")


def test_what_a_stranger_named_cannot_begin_a_line(tmp_path: Path) -> None:
    with JobLog(str(tmp_path / "log"), *WHAT) as log:
        log({"event": "notice", "text": "a\n2026-01-01 00:00:00 INFO: all is well"})
    assert len((tmp_path / "log").read_text().splitlines()) == 5


def test_a_log_on_a_full_disk_is_told_once_and_does_not_end_the_backup() -> None:
    told: list[Event] = []
    with JobLog("/dev/full", *WHAT, append=True, complain=told.append) as log:
        for _ in range(3):
            log({"event": "notice", "text": "slow"})
    text = "the log /dev/full lacks lines: No space left on device; the backup goes on"
    assert told == [{"event": "notice", "text": text}]


def test_a_backup_says_that_its_log_lacks_lines_and_goes_on(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "AA0")
    said = good("backup", "--disk", f"d={disk}", "--log", "/dev/full", tmp_path / "vm.vma")
    assert said.count(b"lacks lines") == 1
    good("verify", tmp_path / "vm.vma")
