# SPDX-License-Identifier: Apache-2.0
"""A monitor beside a running QEMU, commanded by QEMU's own client."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.control.monitor.beside import Beside, beside
from tests.control.monitor.foreign import Foreign, Refused, connected
from tests.control.qemu.storage_daemon import StorageDaemon, storage_daemon, wait_for_socket
from tests.machine import LIMIT_S, Need, children, good, make_disk, next_event, sha256

CLUSTER = 65536
MIB = 1 << 20


@pytest.fixture
def daemon(need: Need, tmp_path: Path) -> Iterator[StorageDaemon]:
    need("qemu-storage-daemon")
    disks = {
        "a": make_disk(tmp_path / "a.raw", "A0" * 60, seed=1),
        "b": make_disk(tmp_path / "b.raw", "A" * 32, seed=2),
    }
    with storage_daemon(tmp_path, **disks) as machine:
        yield machine


@pytest.fixture
def monitor(daemon: StorageDaemon, tmp_path: Path) -> Iterator[Beside]:
    with beside(tmp_path, daemon.qmp) as started:
        yield started


@pytest.fixture
def qmp(monitor: Beside) -> Iterator[Foreign]:
    with connected(monitor.socket) as client:
        yield client


def refusal(qmp: Foreign, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        qmp.cmd("backup", arguments)
    return caught.value.kind, caught.value.desc


def test_a_machines_disks_are_backed_up_at_one_instant(
    daemon: StorageDaemon, qmp: Foreign, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    qmp.cmd("backup", {"backup-file": str(archive), "devlist": "a:b"})
    status = qmp.end_of_backup()["data"]
    assert status["status"] == "done"
    assert status["transferred"] == status["total"] == 152 * CLUSTER
    good("restore", archive, tmp_path / "out")
    for name in "ab":
        assert sha256(tmp_path / f"out/disk-{name}.raw") == sha256(tmp_path / f"{name}.raw")
    # QEMU's monitor is free again, and nothing of ours is in it.
    assert daemon.ours() == []


def test_a_running_backup_is_hurried_and_cancelled(
    daemon: StorageDaemon, qmp: Foreign, tmp_path: Path
) -> None:
    words = {"backup-file": str(tmp_path / "vm.vma"), "devlist": "a,b", "speed": 65536}
    qmp.cmd("backup", words)
    assert qmp.status()["status"] == "active"
    qmp.cmd("backup-set-speed", {"speed": 131072})
    assert qmp.cmd("backup-cancel") == {}
    assert qmp.end_of_backup()["data"]["errmsg"] == "backup canceled"
    assert daemon.ours() == []
    qmp.cmd("backup", words)
    qmp.cmd("backup-set-speed", {"speed": 0})
    assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"


def test_qemus_monitor_is_held_only_while_it_is_needed(
    daemon: StorageDaemon, qmp: Foreign, tmp_path: Path
) -> None:
    assert daemon.ask("query-version")
    assert isinstance(qmp.cmd("query-block"), list)
    assert daemon.ask("query-version")
    qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma"), "devlist": "a", "speed": 65536})
    # What QEMU said when it began is still told; what nobody knows is refused.
    assert isinstance(qmp.cmd("query-block"), list)
    with pytest.raises(Refused, match="one client at a time"):
        qmp.cmd("query-status")
    qmp.cmd("backup-cancel")
    assert daemon.ask("query-version")


def test_a_device_that_is_not_there_is_named(qmp: Foreign, tmp_path: Path) -> None:
    file = str(tmp_path / "vm.vma")
    missing = refusal(qmp, **{"backup-file": file, "devlist": "a,nix"})
    assert missing == ("DeviceNotFound", "Device 'nix' not found")
    # This machine has no guest devices, only nodes: none is taken unasked.
    assert refusal(qmp, **{"backup-file": file}) == ("GenericError", "empty device list")
    assert qmp.status() == {}


def test_media_that_are_not_there_or_read_only_are_refused(need: Need, tmp_path: Path) -> None:
    (qemu,) = need("qemu-system-x86_64")
    disk = make_disk(tmp_path / "disk.raw", "A" * 8)
    fixed = make_disk(tmp_path / "fixed.raw", "A" * 8)
    socket = tmp_path / "qmp.sock"
    words = [
        *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "64"),
        *("-machine", "q35", "-accel", "tcg", "-qmp", f"unix:{socket},server=on,wait=off"),
        *("-drive", f"if=none,id=d,format=raw,file={disk}"),
        *("-device", "virtio-blk-pci,id=virtio0,drive=d"),
        *("-drive", f"if=none,id=fixed,format=raw,readonly=on,file={fixed}"),
        *("-device", "virtio-blk-pci,id=virtio1,drive=fixed"),
        *("-device", "ide-cd,id=cd0"),
    ]
    with subprocess.Popen(words) as process:
        try:
            wait_for_socket(socket, process, greets=True)
            with beside(tmp_path, socket) as monitor, connected(monitor.socket) as qmp:
                file = str(tmp_path / "vm.vma")
                assert refusal(qmp, **{"backup-file": file, "devlist": "cd0"}) == (
                    "GenericError",
                    "Device 'cd0' has no medium",
                )
                assert refusal(qmp, **{"backup-file": file, "devlist": "d;fixed"}) == (
                    "GenericError",
                    "Device 'fixed' is read only",
                )
                assert qmp.cmd("query-status")["running"] is False
                # All that can be backed up, when nobody names any.
                qmp.cmd("backup", {"backup-file": file})
                assert qmp.end_of_backup()["data"]["total"] == 8 * CLUSTER
                # And the machine's memory with them.
                qmp.cmd("backup", {"backup-file": str(tmp_path / "state.vma"), "state": True})
                status = qmp.end_of_backup()["data"]
                assert status["status"] == "done"
                assert status["transferred"] == status["total"] > 8 * CLUSTER
                assert b"vmstate" in good("list", tmp_path / "state.vma")
        finally:
            process.kill()


def test_a_machine_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with (
        beside(tmp_path, tmp_path / "nix.sock") as monitor,
        connected(monitor.socket) as qmp,
    ):
        _, desc = refusal(qmp, **{"backup-file": str(tmp_path / "vm.vma")})
        assert "cannot reach QEMU's monitor" in desc
        assert qmp.status() == {}


def kill_children(process: subprocess.Popen[bytes], word: str) -> None:
    """SIGKILL to all whose command line has `word`; at least one."""
    found = children(process, word)
    assert found
    for child in found:
        child.kill()


def test_a_killed_coordinator_is_told_and_qemu_is_clean(
    daemon: StorageDaemon, monitor: Beside, qmp: Foreign, tmp_path: Path
) -> None:
    words = {"backup-file": str(tmp_path / "vm.vma"), "devlist": "a,b", "speed": 65536}
    qmp.cmd("backup", words)
    family = psutil.Process(monitor.process.pid).children(recursive=True)
    kill_children(monitor.process, "vmapipe.control.cli.backup")
    ended = qmp.end_of_backup()
    assert ended["event"] == "BACKUP_FAILED"
    assert ended["data"]["errmsg"] == "the backup process was killed by SIGKILL"
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert alive == []
    assert daemon.ours() == []
    qmp.cmd("backup", {**words, "speed": 0})
    assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"


def test_a_killed_monitor_leaves_no_process_and_qemu_clean(
    daemon: StorageDaemon, tmp_path: Path
) -> None:
    # With `beside` it would have to end well.
    monitor = Beside(tmp_path, daemon.qmp)
    try:
        next_event(monitor.process, "ready")
        with connected(monitor.socket) as client:
            words = {"backup-file": str(tmp_path / "vm.vma"), "devlist": "a", "speed": 65536}
            client.cmd("backup", words)
            family = psutil.Process(monitor.process.pid).children(recursive=True)
            assert family
            monitor.process.kill()
    finally:
        monitor.process.kill()
        monitor.process.communicate()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert alive == []
    assert daemon.ours() == []
    assert not list(tmp_path.glob("vm.vma*"))
    with beside(tmp_path, daemon.qmp) as again, connected(again.socket) as client:
        assert client.status() == {}
