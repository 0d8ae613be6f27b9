# SPDX-License-Identifier: Apache-2.0
"""Disks in use, backed up to a service: a monitor's, and a running QEMU's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.archiver.service.serving import serving
from tests.control.qemu.storage_daemon import storage_daemon
from tests.machine import Need, end_of, good, make_disk, next_event, sha256, started
from tests.producer.guard.serving import serving as monitoring


@pytest.mark.parametrize("speed", ["0", "8M"])
def test_disks_that_a_monitor_serves_are_backed_up_to_a_service(tmp_path: Path, speed: str) -> None:
    a = make_disk(tmp_path / "a.raw", "A0hA" * 20)
    b = make_disk(tmp_path / "b.raw", "0A" * 20)
    with monitoring(tmp_path, a=a, b=b) as served, serving(tmp_path / "store") as service:
        words = ("backup", "--json", "--monitor", served.monitor, "--speed", speed)
        with started(*words, *service.words, "vm.vma") as backup:
            next_event(backup, "instant")
            assert end_of(backup) == (0, "")
        service.stop()
    good("restore", tmp_path / "store" / "vm.vma", tmp_path / "out")
    for name, disk in (("a", a), ("b", b)):
        assert sha256(tmp_path / "out" / f"disk-{name}.raw") == sha256(disk)


def test_a_running_qemus_disks_are_backed_up_to_a_service_and_a_refusal_leaves_it_alone(
    need: Need, tmp_path: Path
) -> None:
    need("qemu-storage-daemon")
    disk = make_disk(tmp_path / "a.raw", "A0hA" * 20)
    with storage_daemon(tmp_path, a=disk) as machine, serving(tmp_path / "store") as service:
        words = ("backup", "--json", "--qmp", str(machine.qmp), "--disk", "a", *service.words)
        good(*words, "vm.vma")
        assert machine.ours() == []
        with started(*words, "vm.vma") as backup:
            code, text = end_of(backup)
        assert (code, "[exists]" in text) == (1, True)
        assert machine.ours() == []
        service.stop()
    good("restore", tmp_path / "store" / "vm.vma", tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-a.raw") == sha256(disk)
