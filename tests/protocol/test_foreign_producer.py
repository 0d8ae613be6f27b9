# SPDX-License-Identifier: Apache-2.0
"""The example in docs/ talks to a small archiver made of our half of the dialogue."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from vmapipe.protocol import limits
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import ClusterFrame, Fail, Hello, Ping
from vmapipe.protocol.transfer_state import ArchiverSide, ArchiverState

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "foreign_producer.py"
JOB = bytes(range(16))
UUID = bytes(16)
# Far above what a run takes: only a hang meets it.
PATIENCE_S = 30


class Archiver:
    """A ROUTER that takes one producer; it grants what was written at once."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/archiver.sock"
        self.side = ArchiverSide()
        self.hello: Hello | None = None
        self.clusters: list[bytes] = []
        self.failures: list[str] = []
        self.pings = 0
        self.window = limits.MIN_WINDOW_BYTES
        self.heartbeat_s = 30
        self.welcomes = self.grants = self.answers = True
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(self.endpoint)
        self._peer = b""
        self._process: subprocess.Popen[str] | None = None

    def start(self, path: Path, name: str = "drive-scsi0") -> None:
        self._process = subprocess.Popen(
            [sys.executable, EXAMPLE, self.endpoint, JOB.hex(), name, path],
            stderr=subprocess.PIPE,
            text=True,
        )

    def serve(self, until: Callable[[], bool]) -> None:
        """Take messages until the condition holds or the producer has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline
            assert self._process is not None
            if self._socket.poll(50):
                self._take()
            elif self._process.poll() is not None:
                return

    def _take(self) -> None:
        self._peer, *parts = self._socket.recv_multipart()
        match self.side.receive(parts):
            case Hello() as hello:
                self.hello = hello
                if self.welcomes:
                    frame_bytes = limits.MIN_FRAME_CHARGE
                    self.say(self.side.welcome(7, self.window, frame_bytes, self.heartbeat_s))
            case ClusterFrame() as frame:
                assert frame.cluster_num == len(self.clusters)
                self.clusters.append(frame.data)
                if self.grants:
                    self.grant()
            case Fail(reason):
                self.failures.append(reason)
            case Ping():
                self.pings += 1
                if self.answers:
                    self.say(self.side.pong())

    def grant(self) -> None:
        self.say(self.side.grant(self.side.charged + self.window, self.side.received_frames))

    def say(self, parts: list[Part] | None) -> None:
        if parts is not None:
            self._socket.send_multipart([self._peer, *parts])

    def outcome(self) -> tuple[int, str]:
        """The producer's exit code and what it said."""
        assert self._process is not None
        _, said = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, said.strip()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._context.destroy(linger=0)


@pytest.fixture
def archiver(tmp_path: Path) -> Iterator[Archiver]:
    one = Archiver(tmp_path)
    yield one
    one.close()


def disk(tmp_path: Path, size_bytes: int) -> Path:
    """Every third cluster is zero."""
    path = tmp_path / "disk.raw"
    kinds = [b"\xaa" * 65536, bytes(65535) + b"\x01", bytes(65536)]
    data = b"".join(kinds[n % 3] for n in range(-(-size_bytes // 65536)))
    path.write_bytes(data[:size_bytes])
    return path


@pytest.mark.parametrize("size_bytes", [1, 65536, 65537, 40 * 65536 + 4097, 3 * 65536 - 1])
def test_a_disk_arrives_whole_and_the_producer_succeeds_when_it_is_stored(
    archiver: Archiver, tmp_path: Path, size_bytes: int
) -> None:
    path = disk(tmp_path, size_bytes)
    archiver.start(path, "drive-é")
    archiver.serve(lambda: archiver.side.state is ArchiverState.ENDED)
    assert archiver.hello == Hello(1, JOB, "drive-é", size_bytes)
    sizes = [min(65536, size_bytes - n * 65536) for n in range(len(archiver.clusters))]
    whole = [data or bytes(size) for data, size in zip(archiver.clusters, sizes, strict=True)]
    assert b"".join(whole) == path.read_bytes()
    assert archiver.clusters[2:3] in ([], [b""])
    archiver.say(archiver.side.done(UUID))
    assert archiver.outcome() == (0, "")


def test_it_sends_nothing_beyond_its_credit_and_gives_up_when_no_answer_comes(
    archiver: Archiver, tmp_path: Path
) -> None:
    archiver.window = 3 * limits.MIN_FRAME_CHARGE - 1
    archiver.heartbeat_s = 2
    archiver.grants = archiver.answers = False
    archiver.start(disk(tmp_path, 10 * 65536))
    archiver.serve(lambda: False)
    assert archiver.outcome() == (1, "the archiver is silent")
    # Two clusters with data; the third, all zero, fits into what is left.
    assert [len(data) for data in archiver.clusters] == [65536, 65536, 0]
    assert archiver.pings >= 2


def test_it_goes_on_when_credit_comes_late(archiver: Archiver, tmp_path: Path) -> None:
    archiver.grants = False
    archiver.start(disk(tmp_path, 10 * 65536))
    archiver.serve(lambda: len(archiver.clusters) == 2)
    archiver.grants = True
    archiver.grant()
    archiver.serve(lambda: archiver.side.state is ArchiverState.ENDED)
    assert len(archiver.clusters) == 10
    archiver.say(archiver.side.done(UUID))
    assert archiver.outcome() == (0, "")


def test_it_pings_while_it_waits_and_lives_as_long_as_it_is_answered(
    archiver: Archiver, tmp_path: Path
) -> None:
    archiver.heartbeat_s = 1
    archiver.start(disk(tmp_path, 1))
    archiver.serve(lambda: archiver.pings == 4)
    assert archiver.side.state is ArchiverState.ENDED
    archiver.say(archiver.side.done(UUID))
    assert archiver.outcome() == (0, "")


def test_a_refusal_ends_it_with_the_reason(archiver: Archiver, tmp_path: Path) -> None:
    archiver.welcomes = False
    archiver.start(disk(tmp_path, 65536))
    archiver.serve(lambda: archiver.hello is not None)
    archiver.say(archiver.side.refuse("unknown-job", "another job is made here"))
    assert archiver.outcome() == (1, "REFUSE: another job is made here")


@pytest.mark.parametrize("clusters", [2, 10])
def test_an_abort_ends_it_with_the_reason_while_it_sends_and_while_it_waits_for_done(
    archiver: Archiver, tmp_path: Path, clusters: int
) -> None:
    archiver.grants = False
    archiver.start(disk(tmp_path, clusters * 65536 - 1))
    archiver.serve(lambda: len(archiver.clusters) == 2)
    archiver.say(archiver.side.abort("the archive's disk is full"))
    assert archiver.outcome() == (1, "ABORT: the archive's disk is full")


def test_a_disk_that_shrinks_fails_the_job_and_does_not_become_zeroes(
    archiver: Archiver, tmp_path: Path
) -> None:
    path = disk(tmp_path, 100 * 65536)
    archiver.grants = False
    archiver.start(path)
    archiver.serve(lambda: len(archiver.clusters) == 2)
    # Its buffer holds no more than one cluster ahead.
    with path.open("rb+") as file:
        file.truncate(50 * 65536)
    archiver.grants = True
    archiver.grant()
    archiver.serve(lambda: archiver.side.state is ArchiverState.CLOSED)
    reason = f"{path}: the disk has become shorter"
    assert archiver.failures == [reason]
    assert archiver.outcome() == (1, reason)


def test_a_disk_that_is_not_there_ends_it_with_the_reason(
    archiver: Archiver, tmp_path: Path
) -> None:
    archiver.start(tmp_path / "nothing.raw")
    code, said = archiver.outcome()
    assert code == 1
    assert "nothing.raw" in said
