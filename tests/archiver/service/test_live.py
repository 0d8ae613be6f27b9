# SPDX-License-Identifier: Apache-2.0
"""Disks in use, backed up to a service: a monitor's, and a running QEMU's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.archiver.service.serving import make_keys, serving
from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.storage_daemon import storage_daemon
from tests.control.qemu.tracked_machine import (
    NAMES,
    Report,
    check_archive,
    make_images,
    tracked_machine,
)
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


def test_only_what_qemu_has_recorded_as_changed_travels_to_a_service(
    need: Need, tmp_path: Path, out: Path
) -> None:
    need("qemu-img", "qemu-system-x86_64")
    contents = make_images(tmp_path)
    server, clients = make_keys(tmp_path, "host1")
    keys = (server, clients["host1"])
    with (
        tracked_machine(need, tmp_path, contents) as tracked,
        serving(out / "store", "--per-client", keys=keys) as service,
    ):

        def back_up(name: str, *more: str) -> Report:
            return Report(good(*tracked.command(Path(name), *service.words, *more)))

        first = back_up("vm-2026-01-01.vma")
        assert all("no earlier archive" in reason for reason in first.reasons.values())
        for name in NAMES:
            tracked.write(name, 3, 77)
        report = back_up("vm-2026-01-02.vma")
        assert report.reasons == dict.fromkeys(NAMES, "")
        changed = {device["name"]: device["changed_bytes"] for device in report["base"]["devices"]}
        assert changed == dict.fromkeys(NAMES, CLUSTER)
        assert report["base"]["uuid"] == first["stored"]["uuid"]
        # The newest is not the one since which QEMU has recorded: that one is chosen.
        other = (f"{name}={tmp_path / name}.raw" for name in NAMES[:1])
        words = [word for disk in other for word in ("--disk", disk, "--force-share")]
        good("backup", *service.words, *words, "vm-2026-01-03.vma")
        tracked.write(NAMES[0], 5, 78)
        report = back_up("vm-2026-01-04.vma")
        assert report.reasons == dict.fromkeys(NAMES, "")
        # Nor is there anything to build on when that is gone.
        (out / "store" / "host1" / "vm-2026-01-04.vma").unlink()
        reasons = back_up("vm-2026-01-05.vma").reasons
        assert all(reasons.values())
        assert tracked.machine.is_untouched()
        for day in (2, 5):
            good("verify", out / "store" / "host1" / f"vm-2026-01-0{day}.vma")
        check_archive(
            out / "store" / "host1" / "vm-2026-01-05.vma", contents, tmp_path / "restored"
        )
        service.stop()


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
