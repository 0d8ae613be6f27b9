# SPDX-License-Identifier: Apache-2.0
"""Backups of disks that are written to: a qemu-storage-daemon is the machine, a client its guest."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.control.qemu.daemon_backup import (
    BOTH,
    check_one_instant,
    restored,
    slow_backup,
)
from tests.control.qemu.storage_daemon import StorageDaemon
from tests.machine import end_of, eventually, good
from vmapipe.control.coordinator.job_client import JobClient
from vmapipe.control.coordinator.status_socket import sockets
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

pytestmark = pytest.mark.every_qemu


def test_disks_at_rest_are_copied_with_their_zeroes(
    daemon: StorageDaemon, contents: dict[str, bytes], tmp_path: Path, temporary: Path
) -> None:
    archive = tmp_path / "vm.vma"
    good("backup", "--qmp", daemon.qmp, *BOTH, archive)
    assert restored(archive, tmp_path / "restored") == contents
    assert daemon.ours() == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("speed", ["0", "6M"])
def test_the_archive_shows_all_disks_at_one_instant_while_writers_go_on(
    daemon: StorageDaemon, contents: dict[str, bytes], tmp_path: Path, speed: str
) -> None:
    check_one_instant(daemon, contents, tmp_path, speed)


def test_a_limit_that_is_changed_while_it_runs_reaches_qemus_jobs(
    daemon: StorageDaemon, contents: dict[str, bytes], out: Path, tmp_path: Path
) -> None:
    with slow_backup(daemon, out) as backup:
        (path,) = sockets().values()
        with JobClient(path) as job, contextlib.closing(QmpClient(str(daemon.second))) as qemu:
            # Slower, so that none of the disks is done before QEMU is asked.
            job.execute("backup-set-speed", speed=6 << 16)

            def speeds() -> set[int]:
                jobs = qemu.execute(Command("query-block-jobs", {}))
                return {int(found["speed"]) for found in jobs}

            # The answer says that it was accepted; QEMU hears of it a moment later.
            assert eventually(lambda: speeds() == {3 << 16})
            job.execute("backup-set-speed", speed=0)
        assert end_of(backup)[0] == 0
    assert restored(out / "vm.vma", tmp_path / "restored") == contents
