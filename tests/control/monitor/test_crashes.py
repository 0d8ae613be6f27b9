# SPDX-License-Identifier: Apache-2.0
"""Whatever dies in the middle of a backup: no orphan, no guest that notices, a restart that works."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.control.monitor.foreign import Foreign, connected
from tests.machine import LIMIT_S, VMAPIPE, children, make_disk, next_event
from tests.producer.guard.serving import Served, serving
from tests.protocol.nbd.client import Client

SLOW = 64 << 10
KILLED = "the backup process was killed by SIGKILL"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "d.raw", "A" * 100)


def begin(qmp: Foreign, archive: Path) -> None:
    qmp.cmd("backup", {"backup-file": str(archive), "speed": SLOW})


def grandchildren(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of the backup, the coordinator first."""
    (coordinator,) = children(process, "vmapipe.control.cli.backup")[:1]
    return [coordinator, *coordinator.children(recursive=True)]


@pytest.mark.parametrize("which", ["coordinator", "another"])
def test_a_killed_process_of_a_backup_ends_it_and_nothing_else(
    tmp_path: Path, disk: Path, which: str
) -> None:
    with (
        serving(tmp_path, d=disk) as served,
        connected(served.monitor) as qmp,
        Client(served.socket("d"), "d") as guest,
    ):
        begin(qmp, tmp_path / "vm.vma")
        family = grandchildren(served.process)
        assert len(family) >= 3
        family[0 if which == "coordinator" else -1].kill()
        ended = qmp.end_of_backup()
        assert ended["event"] == "BACKUP_FAILED"
        errmsg = ended["data"]["errmsg"]
        assert errmsg == KILLED if which == "coordinator" else "killed by SIGKILL" in errmsg
        _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
        assert alive == []
        assert not list(tmp_path.glob("vm.vma*"))
        guest.write(0, b"the guest goes on")
        qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma")})
        assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"


@contextlib.contextmanager
def until_killed(folder: Path, disk: Path) -> Iterator[Served]:
    """A monitor that the test kills."""
    words = ["monitor", "--json", "--listen", str(folder / "monitor.sock")]
    words += ["--disk", f"d={disk}", "--export", f"d={folder / 'd.sock'}"]
    process = subprocess.Popen([*VMAPIPE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        next_event(process, "ready")
        yield Served(process, folder)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_monitor_takes_all_its_processes_along_and_starts_again(
    tmp_path: Path, disk: Path
) -> None:
    with until_killed(tmp_path, disk) as served, connected(served.monitor) as qmp:
        begin(qmp, tmp_path / "vm.vma")
        family = psutil.Process(served.process.pid).children(recursive=True)
        # A guard, and the backup's own three at least.
        assert len(family) >= 4
        served.process.kill()
        _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
        assert alive == []
    assert not list(tmp_path.glob("vm.vma*"))
    # Its sockets are still there; they do not stand in the way.
    assert served.monitor.exists()
    assert served.socket("d").exists()
    with (
        serving(tmp_path, d=disk) as again,
        connected(again.monitor) as qmp,
        Client(again.socket("d"), "d") as guest,
    ):
        assert qmp.status() == {}
        guest.write(0, b"x")
        qmp.cmd("backup", {"backup-file": str(tmp_path / "vm.vma")})
        assert qmp.end_of_backup()["event"] == "BACKUP_COMPLETED"
    assert not list(tmp_path.glob("*.guards"))
    assert not list(tmp_path.glob("*.sock"))


def test_a_guard_that_is_killed_fails_the_backup_and_comes_back(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, d=disk) as served, connected(served.monitor) as qmp:
        begin(qmp, tmp_path / "vm.vma")
        (guard,) = children(served.process, "vmapipe.producer.guard.main")
        guard.kill()
        assert qmp.end_of_backup()["event"] == "BACKUP_FAILED"
        assert "guard" in qmp.status()["errmsg"]
        with Client(served.socket("d"), "d") as guest:
            guest.write(0, b"x")


def test_a_backup_that_somebody_else_ends_is_told_as_failed(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, d=disk) as served, connected(served.monitor) as qmp:
        begin(qmp, tmp_path / "vm.vma")
        (coordinator, *_) = grandchildren(served.process)
        coordinator.terminate()
        assert qmp.end_of_backup()["data"]["status"] == "error"
        assert not list(tmp_path.glob("vm.vma*"))
