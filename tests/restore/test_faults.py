# SPDX-License-Identifier: Apache-2.0
"""Processes that die, disks that fill up, users who press Ctrl-C: it ends, and nothing is left."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.archives import archive, extents_of
from tests.machine import next_event
from tests.restore.support import CHANCE, a_cancel, contents, is_root, restored
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.archive.errors import TargetError
from vmapipe.restore.targets.plan import Kind, Plan, TargetSpec, plan_folder
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Event

ROOT = Path(__file__).parents[2]
# No restore of these takes longer, however slow the machine.
LIMIT_S = 60.0
DISK = CHANCE.randbytes(40 * CLUSTER_BYTES)
RAW = archive({"d": DISK}, slots=4)
HALF = extents_of(RAW)[5].offset


@contextmanager
def half_a_pipe(data: bytes) -> Iterator[str]:
    """An archive whose second half never comes; its writer stays."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # As large as our reader will make it, so that it all fits in.
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
    assert os.write(writing, data) == len(data)
    try:
        yield f"fd:{reading}"
    finally:
        os.close(reading)
        os.close(writing)


def workers_of(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children()
    return [process for process in found if "vmapipe.restore.workers.worker" in process.cmdline()]


PIECE = RAW[: extents_of(RAW)[3].offset + 700]


def test_a_killed_worker_ends_the_restore_although_the_pipe_is_silent(out: Path) -> None:
    def hear(event: Event) -> None:
        if event["event"] == "progress":
            for worker in workers_of(os.getpid()):
                worker.kill()

    with (
        half_a_pipe(PIECE) as source,
        pytest.raises(Failure, match=r"restore worker-\d was killed by SIGKILL"),
    ):
        restored(source, lambda header: plan_folder(header, str(out)), hear=hear)
    assert contents(out) == {}


def test_a_stop_ends_the_restore_although_the_pipe_is_silent(out: Path) -> None:
    with a_cancel() as cancel:

        def hear(event: Event) -> None:
            if event["event"] == "progress":
                cancel.ask("cancelled by SIGTERM", signal.SIGTERM)

        with half_a_pipe(PIECE) as source, pytest.raises(Cancelled, match="SIGTERM") as caught:
            restored(source, lambda header: plan_folder(header, str(out)), hear=hear, cancel=cancel)
    assert caught.value.exit_code == 143
    assert contents(out) == {}


def test_a_stop_before_the_beginning_writes_nothing(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    cancel = Cancel()
    cancel.ask("enough")
    with pytest.raises(Cancelled, match="enough"):
        restored(path, lambda header: plan_folder(header, str(out)), cancel=cancel)
    cancel.close()
    assert contents(out) == {}


def test_a_stop_is_heard_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    with a_cancel() as cancel:

        def hear(event: Event) -> None:
            cancel.ask("enough")

        with pytest.raises(Cancelled, match="enough"):
            restored(path, lambda header: Plan(), hear=hear, cancel=cancel)


@contextmanager
def program(source: Path, out: Path, way: str, temp: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.restore.restore_program", source, out, way],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("way", ["unnamed", "partial"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_reader_and_workers_and_nothing_is_left(
    tmp_path: Path, out: Path, way: str, signum: int
) -> None:
    temp = tmp_path / "temp"
    temp.mkdir()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with program(fifo, out, way, temp) as process:
        with fifo.open("wb", buffering=0) as writer:
            writer.write(RAW[:HALF])
            next_event(process, "progress")
            workers = workers_of(process.pid)
            assert workers
            process.send_signal(signum)
            _, stderr = process.communicate(timeout=LIMIT_S)
        _, alive = psutil.wait_procs(workers, LIMIT_S)
        assert alive == []
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum
        assert stderr.decode() == f"restore: cancelled by {signal.Signals(signum).name}\n"
    assert list(out.iterdir()) == []
    assert list(temp.iterdir()) == []


def test_a_writer_that_goes_away_is_one_error(tmp_path: Path, out: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with program(fifo, out, "unnamed", tmp_path) as process:
        with fifo.open("wb", buffering=0) as writer:
            writer.write(RAW[:HALF])
            next_event(process, "progress")
        _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert stderr.decode() == ("restore: device 'd': cluster 20 is missing (20 of 40 are)\n")
    assert list(out.iterdir()) == []


def test_a_command_that_fails_half_way_is_the_error_that_is_told(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "half"
    path.write_bytes(RAW[:HALF])
    with pytest.raises(Failure, match="ended with exit status 9"):
        restored(f"exec:cat {path}; exit 9", lambda header: plan_folder(header, str(out)))
    assert contents(out) == {}


def test_a_file_size_limit_is_one_error_with_device_and_offset(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    target = tmp_path / "old"
    target.write_bytes(bytes(len(DISK)))
    # Python ignores SIGXFSZ, and workers inherit the limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(Failure) as caught:
            restored(path, lambda header: Plan({1: TargetSpec(str(target), Kind.EXISTING)}))
        with pytest.raises(TargetError, match=r"cannot make .* bytes long: File too large"):
            restored(path, lambda header: plan_folder(header, str(out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"device 'd': cannot write to {target} at offset 1048576: File too large"
    )
    assert contents(out) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if not is_root():
        pytest.skip("mounting needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_error_and_gives_the_space_back(
    tmp_path: Path, small_disk: Path
) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    with pytest.raises(Failure) as caught:
        restored(path, lambda header: plan_folder(header, str(small_disk)))
    assert "device 'd': cannot write to " in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert contents(small_disk) == {}
    deadline = time.monotonic() + LIMIT_S
    while os.statvfs(small_disk).f_bfree * 4096 < 1 << 20:
        assert time.monotonic() < deadline


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)

    def hear(event: Event) -> None:
        if event["event"] == "restoring":
            (out / "disk-d.raw").write_bytes(b"mine")

    with pytest.raises(TargetError, match="has appeared meanwhile"):
        restored(path, lambda header: plan_folder(header, str(out)), hear=hear)
    assert contents(out) == {"disk-d.raw": b"mine"}


def test_an_archive_that_changes_while_it_is_read_is_an_error(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)

    def hear(event: Event) -> None:
        if event["event"] == "restoring":
            os.truncate(path, HALF + 600)

    with pytest.raises(Exception, match=r"cut while it (is|was) read") as caught:
        restored(path, lambda header: plan_folder(header, str(out)), hear=hear)
    assert getattr(caught.value, "exit_code", 0) == 1
    assert contents(out) == {}
