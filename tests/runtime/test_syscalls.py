# SPDX-License-Identifier: Apache-2.0
"""Waiting works whatever the descriptors' numbers are; reads and writes are whole."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import LIMIT_S
from vmapipe.runtime.children import Child
from vmapipe.runtime.syscalls import (
    read_at,
    read_exactly_at,
    readable,
    try_read_at,
    writable,
    write_at,
)

# The first descriptor that select() cannot take is 1024.
HIGH = 1500


@pytest.fixture
def room() -> Iterator[None]:
    """A descriptor limit above HIGH."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * HIGH), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def crowded(room: None) -> Iterator[None]:
    """Whatever is opened now gets a number that select() cannot take."""
    fds = [fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 0)]
    while fds[-1] < HIGH:
        fds.append(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 0))
    yield
    for fd in fds:
        os.close(fd)


def test_a_descriptor_above_1023_is_waited_for(crowded: None) -> None:
    reading, writing = os.pipe()
    assert reading > HIGH
    assert readable([reading], 0) == []
    assert writable(writing, 0)
    os.write(writing, b"!")
    assert readable([reading]) == [reading]
    os.read(reading, 1)
    os.close(writing)
    assert readable([reading], LIMIT_S) == [reading]
    os.close(reading)


def test_a_full_pipe_cannot_be_written_and_one_without_a_reader_fails_at_once() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while writable(writing, 0):
        os.write(writing, bytes(4096))
    os.close(reading)
    assert writable(writing, LIMIT_S)
    os.close(writing)


def test_a_wait_ends_in_time_and_never_before() -> None:
    before = time.monotonic()
    assert readable([], 0.0104) == []
    assert time.monotonic() - before >= 0.0104
    assert readable([], -1.0) == []


@pytest.mark.parametrize("timeout_s", [None, float("inf"), 1e30])
def test_a_wait_may_be_as_long_as_one_likes(timeout_s: float | None) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"!")
    assert readable([reading], timeout_s) == [reading]
    os.close(reading)
    os.close(writing)


def test_a_descriptor_that_is_not_open_is_an_error_and_not_a_wait() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    with pytest.raises(OSError, match="Bad file descriptor"):
        readable([reading])


def test_a_child_is_started_heard_and_reaped_above_descriptor_1023(
    crowded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    child = Child("it", "tests.runtime.child_program", ["fails"])
    assert child.socket.fileno() > HIGH
    while not readable([child.socket.fileno()], LIMIT_S) or not child.read_events()[1]:
        pass
    assert child.reap(LIMIT_S)
    assert (child.exit_code, child.error) == (1, "the disk is on fire")


# Its own process: it ends by itself when its parent has gone.
PARENT = """
import fcntl, socket
from vmapipe.runtime.cancel import Cancel, ParentConnection
ours, theirs = socket.socketpair()
parent = ParentConnection(fcntl.fcntl(theirs.detach(), fcntl.F_DUPFD_CLOEXEC, HIGH), Cancel())
parent.send(b"progress", droppable=True)
print(ours.recv(100), flush=True)
"""


def test_a_parent_is_told_above_descriptor_1023(room: None) -> None:
    words = [sys.executable, "-c", PARENT.replace("HIGH", str(HIGH))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.stdout == "b'progress'\n", done.stderr


def test_what_the_kernel_does_in_pieces_is_done_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:3]], at))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write_at(fd, memoryview(b"0123456789"), 5)
    view = memoryview(bytearray(10))
    read_exactly_at(fd, view, 5, "it")
    assert bytes(view) == b"0123456789"
    assert read_at(fd, view, 8) == 7
    assert bytes(view[:7]) == b"3456789"
    with pytest.raises(OSError, match="it ends at 15: it was cut from outside"):
        read_exactly_at(fd, view, 8, "it")
    os.close(fd)


def test_a_failed_read_names_the_offset_that_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def first_part_only(fd: int, views: list[memoryview], at: int, flags: int = 0) -> int:
        if at >= 8:
            raise OSError(5, "Input/output error")
        return preadv(fd, [views[0][:4]], at)

    path = tmp_path / "file"
    path.write_bytes(b"x" * 20)
    monkeypatch.setattr(os, "preadv", first_part_only)
    with path.open("rb") as file:
        view = memoryview(bytearray(20))
        with pytest.raises(RuntimeError, match="at 8"):
            read_at(file.fileno(), view, 0, lambda at, error: RuntimeError(f"at {at}"))
        with pytest.raises(OSError, match="Input/output error"):
            read_at(file.fileno(), view, 0)
        assert not try_read_at(file.fileno(), view, 0)
