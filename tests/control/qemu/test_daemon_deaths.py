# SPDX-License-Identifier: Apache-2.0
"""Whatever dies, stalls or is ended while QEMU's disks are backed up: the guest sees no error of it."""

from __future__ import annotations

import contextlib
import resource
import signal
from pathlib import Path

import psutil
import pytest

from tests.control.qemu.daemon_backup import (
    BOTH,
    busy_backup,
    busy_guest,
    slow_backup,
    wait_for_end,
)
from tests.control.qemu.hammer import CLUSTER, Hammer
from tests.control.qemu.storage_daemon import StorageDaemon, storage_daemon
from tests.control.qemu.wire import Wire
from tests.machine import Need, bad, children, end_of, make_disk, next_event, started

#: What a backup promises: no write of the guest waits longer, unless another --guest-wait is given.
GUEST_WAIT_S = 20.0


def kill_all(everybody: list[psutil.Process], guardian: psutil.Process) -> None:
    """All but the guardian, which is not one of those that a person would kill."""
    victims = [process for process in everybody if process != guardian]
    for process in victims:
        process.suspend()
    for process in victims:
        process.kill()


@pytest.mark.parametrize("victim", ["producer", "archiver", "coordinator", "all"])
def test_whoever_is_killed_the_guest_sees_no_error_and_qemu_is_clean(
    daemon: StorageDaemon, out: Path, temporary: Path, victim: str
) -> None:
    with busy_backup(daemon, out) as busy:
        (guardian,) = children(busy.process, "vmapipe.control.qemu.guardian")
        if victim == "all":
            kill_all([psutil.Process(busy.process.pid), *busy.everybody], guardian)
        elif victim == "coordinator":
            busy.process.kill()
        else:
            children(busy.process, f"vmapipe.{victim}.main")[0].kill()
        code, text = end_of(busy.process)
        wait_for_end(busy.everybody)
        assert daemon.ours() == []
    assert busy.guest.longest_s < GUEST_WAIT_S
    if victim in ("producer", "archiver"):
        assert code == 1
        assert "was killed by SIGKILL" in text
        assert victim in text
    assert not (out / "vm.vma").exists()
    assert [p.name for p in temporary.iterdir() if "sinks" in p.name] == []


@pytest.mark.parametrize("everything", [False, True])
def test_a_producer_that_was_stopped_is_ended_before_the_guest_gives_up(
    daemon: StorageDaemon, out: Path, temporary: Path, everything: bool
) -> None:
    """With `everything` as Ctrl-Z does it: the coordinator cannot help."""
    with busy_backup(daemon, out) as busy:
        stopped = children(busy.process, "vmapipe.producer.main")[:1]
        if everything:
            guardian = children(busy.process, "vmapipe.control.qemu.guardian")
            stopped = [psutil.Process(busy.process.pid), *set(busy.everybody) - set(guardian)]
        for member in stopped:
            member.suspend()
        busy.guest.wait_for(300)
        for member in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()
        code, text = end_of(busy.process)
        wait_for_end(busy.everybody)
    assert code == 1
    assert "was killed by SIGKILL" in text
    assert busy.guest.longest_s < GUEST_WAIT_S
    assert daemon.ours() == []
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_backup_leaves_the_guest_and_qemu_as_they_were(
    daemon: StorageDaemon, out: Path, temporary: Path, signum: signal.Signals
) -> None:
    with busy_backup(daemon, out) as busy:
        busy.process.send_signal(signum)
        assert end_of(busy.process) == (128 + signum, f"vmapipe backup: cancelled by {signum.name}")
        wait_for_end(busy.everybody)
    assert daemon.ours() == []
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_a_terminated_process_group_costs_the_guest_nothing(
    daemon: StorageDaemon, out: Path
) -> None:
    """As a service manager ends a service: everybody gets the signal at once."""
    with busy_backup(daemon, out, start_new_session=True) as busy:
        for member in busy.everybody:
            member.terminate()
        busy.process.terminate()
        # Whoever tells it first: its own signal, or a child that had one.
        assert end_of(busy.process)[0] in (1, 143)
        wait_for_end(busy.everybody)
    assert daemon.ours() == []


def test_without_its_guardian_a_backup_ends_and_the_guest_goes_on(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    with busy_backup(daemon, out) as busy:
        (guardian,) = children(busy.process, "vmapipe.control.qemu.guardian")
        guardian.kill()
        code, text = end_of(busy.process)
    assert (code, "the guardian, which protects" in text) == (1, True)
    assert daemon.ours() == []
    assert list(temporary.iterdir()) == []


def test_when_qemu_dies_the_backup_fails_and_nothing_is_left(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    with slow_backup(daemon, out) as process:
        everybody = psutil.Process(process.pid).children(recursive=True)
        daemon.process.kill()
        code, text = end_of(process)
        wait_for_end(everybody)
    assert code == 1
    assert "QEMU has ended or closed its monitor" in text
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_when_qemus_monitor_hangs_up_the_backup_fails_and_the_guest_goes_on(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    wire = Wire(out.parent / "wire.sock", daemon.qmp)
    wire.start()
    words = ("backup", "--json", "--qmp", str(out.parent / "wire.sock"), *BOTH, "--speed", "1M")
    with (
        contextlib.closing(wire),
        busy_guest(daemon) as guest,
        started(*words, out / "vm.vma") as process,
    ):
        next_event(process, "instant")
        guest.wait_for(20)
        everybody = psutil.Process(process.pid).children(recursive=True)
        wire.cut()
        code, text = end_of(process)
        wait_for_end(everybody)
        guest.wait_for(50)
    assert code == 1
    assert "QEMU has ended or closed its monitor" in text
    assert daemon.ours() == []
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_a_full_archive_disk_fails_the_backup_and_not_the_guest(
    daemon: StorageDaemon, out: Path
) -> None:
    with busy_guest(daemon) as guest:
        guest.wait_for(20)
        text = bad(
            *("backup", "--qmp", daemon.qmp, *BOTH, out / "vm.vma"),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20)),
        )
        guest.wait_for(50)
    assert "File too large" in text
    assert daemon.ours() == []
    assert list(out.iterdir()) == []


def test_a_stalled_archiver_fails_the_backup_when_the_guest_has_waited_long_enough(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    need("qemu-storage-daemon")
    # Far more than its buffer and what was stored before it stood still.
    sizes = {"a": 1600 * CLUSTER}
    words = ("backup", "--json", "--speed", "1M", "--guest-wait", "1", "--buffer", "8M")
    with storage_daemon(tmp_path, a=make_disk(tmp_path / "a.raw", "A" * 1600)) as daemon:
        more = ("--qmp", daemon.qmp, "--disk", "a", out / "vm.vma")
        with (
            Hammer(daemon.path, sizes, pause_s=0.01) as guest,
            started(*words, *more) as process,
        ):
            next_event(process, "instant")
            guest.wait_for(20)
            (archiver,) = children(process, "vmapipe.archiver.main")
            archiver.suspend()
            # Its monitor is free again when the jobs are gone.
            assert daemon.ours() == []
            archiver.resume()
            code, text = end_of(process)
            guest.wait_for(50)
        assert daemon.ours() == []
    assert code == 1
    assert "a write has waited 1 s for the archiver" in text
    assert 0.5 < guest.longest_s < GUEST_WAIT_S
    assert list(out.iterdir()) == []
