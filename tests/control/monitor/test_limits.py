# SPDX-License-Identifier: Apache-2.0
"""The speed limit of a monitor's backups: it holds for the background, never for the guest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.control.monitor.foreign import Foreign, connected
from tests.machine import good, make_disk, sha256
from tests.producer.guard.serving import serving
from tests.protocol.nbd.client import Client

MIB = 1 << 20
CLUSTER = 65536


def moment(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def duration_s(qmp: Foreign) -> float:
    """Of the backup that was just started, by the events of its start and its end."""
    started = qmp.next_event("BACKUP_STARTED")
    ended = qmp.end_of_backup()
    assert ended["event"] == "BACKUP_COMPLETED"
    return moment(ended) - moment(started)


def test_what_a_guest_overwrites_is_copied_however_low_the_limit_is(tmp_path: Path) -> None:
    clusters = 128
    disk = make_disk(tmp_path / "d.raw", "A" * clusters)
    before = sha256(disk)
    archive = tmp_path / "vm.vma"
    with (
        serving(tmp_path, d=disk) as served,
        connected(served.monitor) as qmp,
        Client(served.socket("d"), "d") as guest,
    ):
        # A byte a second: only what the guest's own writes save is ever sent.
        qmp.cmd("backup", {"backup-file": str(archive), "speed": 1})
        for cluster in range(clusters):
            guest.write(cluster * CLUSTER, b"new")
        assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"
    good("restore", archive, tmp_path / "out")
    assert sha256(tmp_path / "out/disk-d.raw") == before


def test_a_backup_is_never_quicker_than_its_limit(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * 128)
    with serving(tmp_path, d=disk) as served, connected(served.monitor) as qmp:
        # A busy monitor may tell of the beginning when much was read already.
        began = time.monotonic()
        qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma"), "speed": 3 * MIB})
        assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"
        # 8 MiB; a piece, an eighth of a second's, is not waited for, and as much is made up for.
        assert time.monotonic() - began >= 8 / 3 - 0.25


@pytest.mark.slow
def test_64_mib_at_8_mib_a_second_take_8_seconds_within_5_per_cent(tmp_path: Path) -> None:
    """On a machine that has nothing else to do."""
    disk = make_disk(tmp_path / "d.raw", "A" * 1024)
    with serving(tmp_path, d=disk) as served, connected(served.monitor) as qmp:
        qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma"), "speed": 8 * MIB})
        assert duration_s(qmp) == pytest.approx(8, rel=0.05)
