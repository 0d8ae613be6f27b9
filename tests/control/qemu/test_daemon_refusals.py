# SPDX-License-Identifier: Apache-2.0
"""Backups of a running QEMU that cannot be: one line that says why, and nothing is left."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.control.qemu.daemon_backup import (
    BOTH,
    SIZES,
    restored,
)
from tests.control.qemu.storage_daemon import StorageDaemon
from tests.machine import bad, end_of, next_event, started, without_limit
from vmapipe.control.qmp.client import QmpClient


def test_a_second_backup_at_the_same_time_is_refused_and_the_first_goes_on(
    daemon: StorageDaemon, contents: dict[str, bytes], out: Path, tmp_path: Path
) -> None:
    words = ("backup", "--json", "--qmp", daemon.qmp, *BOTH, "--speed", "64K")
    with started(*words, out / "vm.vma") as process:
        next_event(process, "instant")
        text = bad("backup", "--qmp", daemon.second, *BOTH, out / "second.vma")
        assert "another backup of this machine is running, or being ended" in text
        assert "another backup of this machine" in bad("cleanup", "--qmp", daemon.second)
        without_limit(process)
        assert end_of(process)[0] == 0
    assert restored(out / "vm.vma", tmp_path / "restored") == contents


def test_a_monitor_that_serves_somebody_else_is_named(daemon: StorageDaemon, out: Path) -> None:
    with contextlib.closing(QmpClient(str(daemon.qmp))):
        text = bad("backup", "--qmp", daemon.qmp, *BOTH, out / "vm.vma")
    assert "it serves one client at a time" in text


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--disk", "nope"], 2, "the machine has no disk 'nope', but a, b"),
        (["--disk", "file-a"], 2, "node 'file-a': it is part of 'a', not a disk: name 'a'"),
        ([], 2, "nothing to back up"),
        (["--disk", "a", "--monitor", "x"], 2, "choose one"),
        (["--disk", "a", "--spool", "/tmp"], 2, "--spool has no use with --qmp"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    daemon: StorageDaemon, out: Path, words: list[str], code: int, text: str
) -> None:
    assert text in bad("backup", "--qmp", daemon.qmp, *words, out / "vm.vma", code=code)
    assert list(out.iterdir()) == []


def test_a_monitor_that_is_not_there_is_named(tmp_path: Path) -> None:
    text = bad("backup", "--qmp", tmp_path / "none.sock", tmp_path / "vm.vma")
    assert "cannot reach QEMU's monitor at" in text
    assert "No such file or directory" in text


def test_a_disk_with_another_job_is_refused_and_nothing_is_left(
    daemon: StorageDaemon, out: Path, tmp_path: Path, temporary: Path
) -> None:
    target = tmp_path / "mirror.raw"
    target.write_bytes(bytes(SIZES["a"]))
    daemon.ask("blockdev-add", **{"driver": "file", "node-name": "t", "filename": str(target)})
    mirror = {"job-id": "m", "device": "a", "target": "t", "sync": "full", "speed": 1 << 16}
    daemon.ask("blockdev-mirror", **mirror)
    text = bad("backup", "--qmp", daemon.qmp, *BOTH, out / "vm.vma")
    assert "disk 'a': a block job (mirror 'm') is running on it" in text
    assert daemon.ours() == []
    assert list(temporary.iterdir()) == []
    daemon.ask("job-cancel", id="m")
    assert list(out.iterdir()) == []
