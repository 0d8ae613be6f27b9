# SPDX-License-Identifier: Apache-2.0
"""qmp-shell, unmodified, as a person uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.machine import LIMIT_S, good, make_disk
from tests.producer.guard.serving import serving


def shell(socket: Path, lines: list[str], *options: str) -> str:
    """What it prints for these lines."""
    done = subprocess.run(
        [sys.executable, "-m", "qemu.qmp.qmp_shell", *options, str(socket)],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_person_backs_up_looks_and_cancels(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * 60)
    slow, quick = tmp_path / "slow.vma", tmp_path / "quick.vma"
    with serving(tmp_path, d=disk) as served:
        said = shell(
            served.monitor,
            [
                f"backup backup-file={slow} speed=65536",
                "query-backup",
                f"backup backup-file={quick}",
                "backup-set-speed speed=131072",
                "backup-cancel",
                "query-backup",
            ],
        )
        assert '"status": "active"' in said
        assert "previous backup not finished" in said
        assert '"errmsg": "backup canceled"' in said
        assert not slow.exists()
        # What it prints is JSON all along.
        answers = [line.removeprefix("(QEMU) ") for line in said.splitlines() if "{" in line]
        assert len([json.loads(answer) for answer in answers]) >= 6


def test_the_human_mode_works_too(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * 20)
    archive = tmp_path / "vm.vma"
    with serving(tmp_path, d=disk) as served:
        lines = [f"backup {archive}", "backup_cancel", "info backup", "dance"]
        said = shell(served.monitor, lines, "-H")
        assert f"Backup file: {archive}" in said
        assert "Total size: 1310720" in said
        assert "unknown command: 'dance'" in said
        if "Backup status: done" in said:
            good("verify", archive)
        else:
            assert "Backup status: error - backup canceled" in said
