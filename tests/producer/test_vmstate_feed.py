# SPDX-License-Identifier: Apache-2.0
"""A stream becomes the device `vmstate`: real processes, and pipes that the test holds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, VMAPIPE, bad, good

CLUSTER = 65536


class StreamRun:
    """An archiver and a producer by hand; write to `stream`, then `say` whether that was all."""

    def __init__(self, folder: Path, *options: str, verdict: bool = True) -> None:
        self.archive = folder / "vm.vma"
        endpoint = f"ipc://{folder}/archiver.sock"
        words = ("archiver", "--listen", endpoint, "--expect", "1", "--output", str(self.archive))
        self.archiver = subprocess.Popen([*VMAPIPE, *words], stderr=subprocess.PIPE)
        stream, self.stream = os.pipe()
        told, self._verdict = os.pipe()
        more = ["--verdict-fd", str(told)] if verdict else []
        self.producer = subprocess.Popen(
            [
                *(*VMAPIPE, "producer", "--archiver", endpoint, "--stream-fd", str(stream)),
                *("--size", "1M", *more, *options),
            ],
            pass_fds=[stream, told],
            stderr=subprocess.PIPE,
        )
        os.close(stream)
        os.close(told)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.stream, view) :]

    def end(self, *, complete: bool = True) -> tuple[int, str]:
        """The stream's end, and QEMU's word. The producer's exit code and what it said."""
        self.close_stream()
        if complete:
            with contextlib.suppress(BrokenPipeError):  # it may have given up
                os.write(self._verdict, b"!")
        os.close(self._verdict)
        self._verdict = -1
        _, said = self.producer.communicate(timeout=LIMIT_S)
        return self.producer.returncode, said.decode()

    def close_stream(self) -> None:
        os.close(self.stream)
        self.stream = -1

    def close(self) -> None:
        for fd in (self.stream, self._verdict):
            if fd >= 0:
                os.close(fd)
        for process in (self.producer, self.archiver):
            process.kill()
            process.communicate()


@contextlib.contextmanager
def stream(folder: Path, *options: str, verdict: bool = True) -> Iterator[StreamRun]:
    run = StreamRun(folder, *options, verdict=verdict)
    try:
        yield run
    finally:
        run.close()


def content(length: int) -> bytes:
    """Random clusters, and zero ones between."""
    chance = random.Random(5)
    clusters = -(-length // CLUSTER)
    data = (chance.choice((bytes, chance.randbytes))(CLUSTER) for _ in range(clusters))
    return b"".join(data)[:length]


def saved(run: StreamRun, folder: Path) -> bytes:
    assert run.archiver.wait(LIMIT_S) == 0
    assert b"vmstate" in good("verify", run.archive) + good("list", run.archive)
    good("restore", run.archive, folder)
    return (folder / "vmstate.bin").read_bytes()


@pytest.mark.parametrize("length", [1, 16 * CLUSTER, 19_000_001])
def test_a_stream_is_restored_to_the_byte_and_filled_up_to_a_whole_cluster(
    tmp_path: Path, length: int
) -> None:
    data = content(length - 1) + b"!"
    with stream(tmp_path) as run:
        run.write(data)
        assert run.end()[0] == 0
        assert saved(run, tmp_path / "restored") == data + bytes(-length % CLUSTER)


def test_a_stream_without_anybody_to_vouch_for_it_ends_with_its_pipe(tmp_path: Path) -> None:
    with stream(tmp_path, verdict=False) as run:
        run.write(b"state")
        assert run.end()[0] == 0
        assert saved(run, tmp_path / "restored").rstrip(b"\0") == b"state"


@pytest.mark.parametrize(("data", "complete"), [(b"half of it", False), (b"", True)])
def test_a_stream_that_nobody_calls_complete_fails_the_backup(
    tmp_path: Path, data: bytes, complete: bool
) -> None:
    with stream(tmp_path) as run:
        run.write(data)
        code, text = run.end(complete=complete)
        assert (code, "is not complete" in text) == (1, True)
        assert run.archiver.wait(LIMIT_S) == 1
    assert not run.archive.exists()


def test_a_stream_waits_no_longer_than_a_guest_may_and_is_then_dropped(tmp_path: Path) -> None:
    with stream(tmp_path, "--buffer", "8M", "--guest-wait", "1") as run:
        run.write(content(CLUSTER))
        assert run.producer.stderr is not None
        while b"attached" not in run.producer.stderr.readline():
            pass
        run.archiver.send_signal(signal.SIGSTOP)
        # Far more than buffers and credit hold: without the end of the wait this would hang.
        with contextlib.suppress(BrokenPipeError):
            run.write(random.Random(1).randbytes(96 << 20))
        code, text = run.end()
        run.archiver.send_signal(signal.SIGCONT)
        assert code == 1
        assert "has waited 1 s for the archiver" in text
    assert not run.archive.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--stream-fd", "0"], "needs --size"),
        ([], "one of --disk, --nbd and --stream-fd"),
        (
            ["--stream-fd", "0", "--disk", "x", "--size", "1"],
            "one of --disk, --nbd and --stream-fd",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, words: list[str], text: str) -> None:
    assert text in bad("producer", "--archiver", f"ipc://{tmp_path}/a", *words, code=2)
