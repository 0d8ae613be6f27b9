# SPDX-License-Identifier: Apache-2.0
"""Backups of disks that are written to, and everything that can die meanwhile.

The machine is a qemu-storage-daemon, the guest a client of its writable exports.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import LIMIT_S, bad, children, end_of, eventually, good, next_event, started
from tests.qemu.hammer import CLUSTER, Hammer
from tests.qemu.storage_daemon import StorageDaemon, storage_daemon
from tests.qemu.wire import Wire
from vmapipe.control.jobs.client import JobClient
from vmapipe.control.jobs.folder import sockets
from vmapipe.control.qemu.plain import PlainQmp
from vmapipe.control.qemu.qmp import Command

Need = Callable[..., list[str]]
SIZES = {"a": 192 * CLUSTER + 512, "b": 128 * CLUSTER}
BOTH = ("--disk", "a", "--disk", "b")


@pytest.fixture
def contents() -> dict[str, bytes]:
    """Data, zeroes, and the last cluster in part."""
    chance = random.Random(11)
    found = {}
    for name, size in SIZES.items():
        clusters = (
            chance.randbytes(CLUSTER) if chance.random() < 0.7 else bytes(CLUSTER)
            for _ in range(-(-size // CLUSTER))
        )
        found[name] = b"".join(clusters)[:size]
    return found


@pytest.fixture
def daemon(need: Need, tmp_path: Path, contents: dict[str, bytes]) -> Iterator[StorageDaemon]:
    need("qemu-storage-daemon")
    images = {}
    for name, content in contents.items():
        images[name] = tmp_path / f"{name}.raw"
        images[name].write_bytes(content)
    with storage_daemon(tmp_path, **images) as machine:
        yield machine


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets are, and nothing else."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def restored(archive: Path, folder: Path) -> dict[str, bytes]:
    good("restore", archive, folder)
    return {name: (folder / f"disk-{name}.raw").read_bytes() for name in SIZES}


@contextlib.contextmanager
def slow_backup(
    daemon: StorageDaemon, out: Path, *options: str, **more: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A backup that takes half a minute, from its instant on."""
    words = ("backup", "--json", "--qmp", str(daemon.qmp), *BOTH, "--speed", "1M", *options)
    with started(*words, str(out / "vm.vma"), **more) as process:
        next_event(process, "instant")
        yield process


def wait_for_end(processes: list[psutil.Process]) -> None:
    """Of the guardian, too, which may outlive the command."""
    _, alive = psutil.wait_procs(processes, timeout=LIMIT_S)
    assert alive == []


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
    archive = tmp_path / "vm.vma"
    with contextlib.ExitStack() as stack:
        hammers = [
            stack.enter_context(Hammer(daemon.path, SIZES, lane, 2, pause_s=0.001))
            for lane in range(2)
        ]
        for hammer in hammers:
            hammer.wait_for(20)
        good("backup", "--qmp", daemon.qmp, *BOTH, "--speed", speed, archive)
        for hammer in hammers:
            hammer.wait_for(20)
    copies = restored(archive, tmp_path / "restored")
    model = {name: bytearray(content) for name, content in contents.items()}
    for hammer in hammers:
        count = hammer.replay(copies, model)
        assert 20 <= count < hammer.done
    assert copies == model
    assert daemon.ours() == []


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
    with (
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        slow_backup(daemon, out) as process,
    ):
        hammer.wait_for(20)
        everybody = psutil.Process(process.pid).children(recursive=True)
        (guardian,) = children(process, "vmapipe.control.qemu.guardian")
        if victim == "all":
            kill_all([psutil.Process(process.pid), *everybody], guardian)
        elif victim == "coordinator":
            process.kill()
        else:
            children(process, f"vmapipe.{victim}.main")[0].kill()
        code, text = end_of(process)
        wait_for_end(everybody)
        assert daemon.ours() == []
        hammer.wait_for(50)
    assert hammer.longest_s < 5
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
    with (
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        slow_backup(daemon, out) as process,
    ):
        hammer.wait_for(20)
        everybody = psutil.Process(process.pid).children(recursive=True)
        stopped = children(process, "vmapipe.producer.main")[:1]
        if everything:
            guardian = children(process, "vmapipe.control.qemu.guardian")
            stopped = [psutil.Process(process.pid), *set(everybody) - set(guardian)]
        for member in stopped:
            member.suspend()
        hammer.wait_for(300)
        for member in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()
        code, text = end_of(process)
        wait_for_end(everybody)
        hammer.wait_for(50)
    assert code == 1
    assert "was killed by SIGKILL" in text
    assert hammer.longest_s < 12
    assert daemon.ours() == []
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_backup_leaves_the_guest_and_qemu_as_they_were(
    daemon: StorageDaemon, out: Path, temporary: Path, signum: signal.Signals
) -> None:
    with (
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        slow_backup(daemon, out) as process,
    ):
        hammer.wait_for(20)
        everybody = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signum)
        assert end_of(process) == (128 + signum, f"vmapipe backup: cancelled by {signum.name}")
        wait_for_end(everybody)
        hammer.wait_for(50)
    assert daemon.ours() == []
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_a_limit_that_is_changed_while_it_runs_reaches_qemus_jobs(
    daemon: StorageDaemon, contents: dict[str, bytes], out: Path, tmp_path: Path
) -> None:
    with slow_backup(daemon, out) as backup:
        (path,) = sockets().values()
        with JobClient(path) as job, contextlib.closing(PlainQmp(str(daemon.second))) as qemu:
            job.execute("backup-set-speed", speed=6 << 20)

            def speeds() -> set[int]:
                jobs = qemu.execute(Command("query-block-jobs", {}))
                return {int(found["speed"]) for found in jobs}

            # The answer says that it was accepted; QEMU hears of it a moment later.
            assert eventually(lambda: speeds() == {3 << 20})
            job.execute("backup-set-speed", speed=0)
        assert end_of(backup)[0] == 0
    assert restored(out / "vm.vma", tmp_path / "restored") == contents


def test_a_terminated_process_group_costs_the_guest_nothing(
    daemon: StorageDaemon, out: Path
) -> None:
    """As a service manager ends a service: everybody gets the signal at once."""
    with (
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        slow_backup(daemon, out, start_new_session=True) as process,
    ):
        hammer.wait_for(20)
        everybody = psutil.Process(process.pid).children(recursive=True)
        for member in everybody:
            member.terminate()
        process.terminate()
        # Whoever tells it first: its own signal, or a child that had one.
        assert end_of(process)[0] in (1, 143)
        wait_for_end(everybody)
        hammer.wait_for(50)
    assert daemon.ours() == []


def test_a_full_archive_disk_fails_the_backup_and_not_the_guest(
    daemon: StorageDaemon, out: Path
) -> None:
    with Hammer(daemon.path, SIZES, pause_s=0.002) as hammer:
        hammer.wait_for(20)
        text = bad(
            *("backup", "--qmp", daemon.qmp, *BOTH, out / "vm.vma"),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20)),
        )
        hammer.wait_for(50)
    assert "File too large" in text
    assert daemon.ours() == []
    assert list(out.iterdir()) == []


def test_a_stalled_archiver_fails_the_backup_when_the_guest_has_waited_long_enough(
    daemon: StorageDaemon, out: Path
) -> None:
    with (
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        slow_backup(daemon, out, "--guest-wait=1", "--buffer=8M") as process,
    ):
        hammer.wait_for(20)
        (archiver,) = children(process, "vmapipe.archiver.main")
        archiver.suspend()
        # Its monitor is free again when the jobs are gone.
        assert daemon.ours() == []
        archiver.resume()
        code, text = end_of(process)
        hammer.wait_for(50)
    assert code == 1
    assert "a write has waited 1 s for the archiver" in text
    assert 0.5 < hammer.longest_s < 6
    assert daemon.ours() == []
    assert list(out.iterdir()) == []


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
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        started(*words, out / "vm.vma") as process,
    ):
        next_event(process, "instant")
        hammer.wait_for(20)
        everybody = psutil.Process(process.pid).children(recursive=True)
        wire.cut()
        code, text = end_of(process)
        wait_for_end(everybody)
        hammer.wait_for(50)
    assert code == 1
    assert "QEMU has ended or closed its monitor" in text
    assert daemon.ours() == []
    assert list(out.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_a_second_backup_at_the_same_time_is_refused_and_the_first_goes_on(
    daemon: StorageDaemon, contents: dict[str, bytes], out: Path, tmp_path: Path
) -> None:
    words = ("backup", "--json", "--qmp", daemon.qmp, *BOTH, "--speed", "3M")
    with started(*words, out / "vm.vma") as process:
        next_event(process, "instant")
        text = bad("backup", "--qmp", daemon.second, *BOTH, out / "second.vma")
        assert "another backup of this machine is running, or being ended" in text
        assert "another backup of this machine" in bad("cleanup", "--qmp", daemon.second)
        assert end_of(process)[0] == 0
    assert restored(out / "vm.vma", tmp_path / "restored") == contents


def test_a_monitor_that_serves_somebody_else_is_named(daemon: StorageDaemon, out: Path) -> None:
    with contextlib.closing(PlainQmp(str(daemon.qmp))):
        text = bad("backup", "--qmp", daemon.qmp, *BOTH, out / "vm.vma")
    assert "it serves one client at a time" in text


def test_without_its_guardian_a_backup_ends_and_the_guest_goes_on(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    with (
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        slow_backup(daemon, out) as process,
    ):
        (guardian,) = children(process, "vmapipe.control.qemu.guardian")
        guardian.kill()
        code, text = end_of(process)
        hammer.wait_for(50)
    assert (code, "the guardian, which protects" in text) == (1, True)
    assert daemon.ours() == []
    assert list(temporary.iterdir()) == []


def test_what_a_crash_of_everybody_left_is_removed_by_cleanup_and_the_guest_goes_on(
    daemon: StorageDaemon, out: Path, temporary: Path
) -> None:
    with (
        Hammer(daemon.path, SIZES, pause_s=0.002) as hammer,
        slow_backup(daemon, out) as process,
    ):
        hammer.wait_for(20)
        everybody = psutil.Process(process.pid).children(recursive=True)
        for member in everybody:
            member.suspend()
        for member in [psutil.Process(process.pid), *everybody]:
            member.kill()
        end_of(process)
        wait_for_end(everybody)
        # A write of the guest waits now, for as long as QEMU tries to connect again.
        removed = good("cleanup", "--qmp", daemon.qmp).decode()
        assert removed.startswith("removed vmapipe-")
        hammer.wait_for(50)
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


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--disk", "nope"], 2, "the machine has no disk 'nope', but a, b, file-a, file-b"),
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


def test_a_disk_with_another_job_is_refused_by_qemu_and_nothing_is_left(
    daemon: StorageDaemon, out: Path, tmp_path: Path, temporary: Path
) -> None:
    target = tmp_path / "mirror.raw"
    target.write_bytes(bytes(SIZES["a"]))
    daemon.ask("blockdev-add", **{"driver": "file", "node-name": "t", "filename": str(target)})
    mirror = {"job-id": "m", "device": "a", "target": "t", "sync": "full", "speed": 1 << 16}
    daemon.ask("blockdev-mirror", **mirror)
    text = bad("backup", "--qmp", daemon.qmp, *BOTH, out / "vm.vma")
    assert "another block job works on the disk" in text
    assert daemon.ours() == []
    assert list(temporary.iterdir()) == []
    daemon.ask("job-cancel", id="m")
    assert list(out.iterdir()) == []
