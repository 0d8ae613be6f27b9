# SPDX-License-Identifier: Apache-2.0
"""What is left in QEMU when even the guardian was killed, and who may remove it."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.control.qemu.daemon_backup import (
    BOTH,
    busy_backup,
    slow_backup,
    wait_for_end,
)
from tests.control.qemu.storage_daemon import StorageDaemon
from tests.machine import bad, children, end_of, good


def test_what_a_crash_of_everybody_left_is_removed_by_cleanup_and_the_guest_goes_on(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    with busy_backup(daemon, out) as busy:
        for member in busy.everybody:
            member.suspend()
        for member in [psutil.Process(busy.process.pid), *busy.everybody]:
            member.kill()
        end_of(busy.process)
        wait_for_end(busy.everybody)
        # A write of the guest waits now, for as long as QEMU tries to connect again.
        removed = good("cleanup", "--qmp", daemon.qmp).decode()
        assert removed.startswith("removed vmapipe-")
    assert daemon.ours() == []
    assert good("cleanup", "--qmp", daemon.qmp) == b"there was nothing to remove\n"
    good("backup", "--qmp", daemon.qmp, *BOTH, out / "again.vma")


def test_cleanup_leaves_a_backup_alone_whose_guardian_lives(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    with slow_backup(daemon, out) as process:
        everybody = psutil.Process(process.pid).children(recursive=True)
        (guardian,) = children(process, "vmapipe.control.qemu.guardian")
        guardian.suspend()
        process.kill()
        end_of(process)
        text = bad("cleanup", "--qmp", daemon.qmp)
        assert "another backup of this machine is running, or being ended" in text
        assert daemon.ours() != []
        guardian.resume()
        wait_for_end(everybody)
    assert daemon.ours() == []
