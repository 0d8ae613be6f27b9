# SPDX-License-Identifier: Apache-2.0
"""`--log-level`: what the trace of a job shows, and what it never shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmapipe.protocol.guard import Claimed
from vmapipe.protocol.transfer import Grant
from vmapipe.runtime.logs import shown

SECRET = b"BEGIN PRIVATE KEY of the guest"


def vmapipe(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmapipe.control.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(SECRET * 5000)
    return path


def test_a_backups_and_a_restores_trace_shows_each_boundary_and_no_data(disk: Path) -> None:
    archive, config = disk.with_name("a.vma"), disk.with_name("vm.conf")
    config.write_bytes(b"description: hunter2\n")
    made = vmapipe(
        "backup", "--log-level", "debug", "--config", config, f"--disk=d={disk}", archive
    )
    assert made.returncode == 0, made.stderr
    restored = vmapipe("restore", "--log-level", "debug", archive, disk.with_name("out"))
    assert restored.returncode == 0, restored.stderr
    wanted = [
        "archiver.job.server: event MessageReceived(",
        "archiver.job.server: instruction BeginArchive(",
        "producer.session: d sends [<",
        "producer.session: d receives Welcome(",
        "runtime.process: vmapipe archiver event (event='stored'",
    ]
    assert [text for text in wanted if text not in made.stderr] == []
    assert "workers.worker: work " in restored.stderr
    for trace in (made.stderr, restored.stderr):
        assert "PRIVATE KEY" not in trace
        assert "hunter2" not in trace


def test_what_comes_with_each_piece_of_data_is_shown_at_the_level_trace_only(disk: Path) -> None:
    often = ["d receives Grant(", "event ExtentWritten(", "instruction StoreExtent("]
    for level, is_shown in (("debug", False), ("trace", True)):
        archive = disk.with_name(f"{level}.vma")
        made = vmapipe("backup", "--log-level", level, f"--disk=d={disk}", archive)
        assert made.returncode == 0, made.stderr
        assert "instruction FinishArchive(" in made.stderr
        assert [text in made.stderr for text in often] == [is_shown] * 3


def test_a_level_is_refused_where_it_would_mean_nothing(disk: Path) -> None:
    refused = vmapipe("restore", "--log-level", "info", disk, disk.with_name("out"))
    assert refused.returncode == 2
    assert "choose from" in refused.stderr
    log = disk.with_name("log")
    made = vmapipe(
        *("backup", "--log-level", "warn", "--log", log, f"--disk=d={disk}"),
        disk.with_name("a.vma"),
    )
    assert made.returncode == 0
    assert log.read_text() == ""


def test_without_the_option_nothing_is_traced(disk: Path) -> None:
    made = vmapipe("backup", f"--disk=d={disk}", disk.with_name("a.vma"))
    assert made.returncode == 0
    assert "vmapipe.archiver" not in made.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (SECRET, "<30 bytes>"),
        ([SECRET, memoryview(SECRET)], "[<30 bytes>, <30 bytes>]"),
        ({"id": "secret0", "data": "hunter2"}, "(id='secret0', data=…)"),
        ({"props": {"password": "hunter2"}}, "(props=(password=…))"),
        (Claimed(1, 2), "Claimed(first=1, clusters=2)"),
        (Grant(5, 6), "Grant(limit=5, acked=6)"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, … 9 in all]"),
        ("x" * 900, repr("x" * 200 + "…")),
        (object(), "object"),
    ],
)
def test_a_value_is_shown_in_short_and_without_its_bytes(value: object, text: str) -> None:
    assert shown(value) == text
