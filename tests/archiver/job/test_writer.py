# SPDX-License-Identifier: Apache-2.0
"""The store: never makes the job wait, tells what is written, and ends in one of two ways."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.archiver.extents import Archive, archive, dense, device, disk, sparse
from tests.archiver.memory import Fault, MemoryOutput
from tests.archiver.outputs.targets import LIMIT_S, decompressed
from vmapipe.archiver.job.writer import GATHER_BYTES, ArchiveWriter, WriterState
from vmapipe.archiver.outputs.base import Output
from vmapipe.archiver.outputs.compress import Compression
from vmapipe.archiver.outputs.manifests import Digests, ManifestFile, ManifestLines, beside
from vmapipe.archiver.outputs.open import open_output

DENSE = dense(58 * 4)


class Loop:
    """What the main loop does: sleeps until the store has something to tell."""

    def __init__(
        self,
        output: Output,
        digests: Digests | None = None,
        compression: Compression | None = None,
    ) -> None:
        self._wake = threading.Semaphore(0)
        self.store: ArchiveWriter[int] = ArchiveWriter(
            output, digests, self._wake.release, compression
        )
        self.written: list[dict[int, Any]] = []

    def put(self, made: Archive) -> None:
        self.store.begin(made.header, made.raw_header)
        for extent in made.extents:
            self.store.put(extent)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self._wake.acquire(timeout=deadline - time.monotonic()), "nothing happens"
            self.written += [extent.notes for extent in self.store.take_written()]

    def until_over(self) -> None:
        self.until(lambda: self.store.state is not WriterState.RUNNING)
        # What was written before the end is told with it.
        self.written += [extent.notes for extent in self.store.take_written()]


def test_a_whole_archive_is_written_and_committed(memory: Callable[..., MemoryOutput]) -> None:
    output = memory()
    loop = Loop(output)
    loop.put(DENSE)
    loop.store.finish()
    loop.until_over()
    assert loop.store.state is WriterState.COMMITTED
    assert loop.store.committed
    assert loop.store.error is None
    assert output.committed
    assert output.data == DENSE.plain
    assert loop.store.plain_bytes == loop.store.stored_bytes == len(DENSE.plain)
    assert loop.store.backlog_bytes == 0


def test_notes_are_told_in_order_each_once(memory: Callable[..., MemoryOutput]) -> None:
    runs = disk(1, [0xFFFF] * 300) + disk(2, [1] * 300)
    made = archive(runs, [device(1, 300), device(2, 300)])
    loop = Loop(memory())
    loop.put(made)
    loop.store.finish()
    loop.until_over()
    assert loop.written == [extent.notes for extent in made.extents]
    assert loop.store.take_written() == []


def test_only_what_the_output_has_taken_is_told(memory: Callable[..., MemoryOutput]) -> None:
    stall = Fault(3, stalls=True)
    loop = Loop(memory(stall))
    loop.put(DENSE)
    assert stall.fired.wait(LIMIT_S)
    # Write 1 was the header, 2 the first extent; 3 has not returned.
    loop.until(lambda: bool(loop.written))
    assert loop.written == [DENSE.extents[0].notes]
    first = DENSE.extents[0].total_bytes
    assert loop.store.plain_bytes == len(DENSE.raw_header) + first
    assert loop.store.backlog_bytes == len(DENSE.plain) - loop.store.plain_bytes
    stall.release()
    loop.store.finish()
    loop.until_over()
    assert loop.store.committed


def test_putting_never_waits_for_the_output(memory: Callable[..., MemoryOutput]) -> None:
    stall = Fault(1, stalls=True)
    loop = Loop(memory(stall))
    loop.put(DENSE)  # would hang
    loop.store.finish()
    assert stall.fired.wait(LIMIT_S)
    assert loop.store.state is WriterState.RUNNING
    stall.release()
    loop.until_over()
    assert loop.store.committed


def test_small_extents_are_written_together_and_large_ones_alone(
    memory: Callable[..., MemoryOutput],
) -> None:
    # All is queued while the header is being written.
    zeroes = sparse(58 * 5000)
    for made in (zeroes, DENSE):
        stall = Fault(1, stalls=True)
        output = memory(stall)
        loop = Loop(output)
        loop.put(made)
        stall.release()
        loop.store.finish()
        loop.until_over()
        assert output.data == made.plain
        header, *writes = output.pieces
        assert header == len(made.raw_header)
        sizes = {extent.total_bytes for extent in made.extents}
        assert max(writes) < GATHER_BYTES + max(sizes)
        if made is zeroes:
            assert writes == [GATHER_BYTES] * 2 + [5000 * 512 - 2 * GATHER_BYTES]
        else:
            assert writes == [extent.total_bytes for extent in made.extents]


def test_every_write_ends_where_an_extent_ends(memory: Callable[..., MemoryOutput]) -> None:
    masks = [0xFFFF, 0, 1, 0] * 1000
    made = archive(disk(1, masks), [device(1, len(masks))])
    output = memory()
    loop = Loop(output)
    loop.put(made)
    loop.store.finish()
    loop.until_over()
    ends = set(itertools.accumulate(e.total_bytes for e in made.extents))
    _, *writes = output.pieces
    assert set(itertools.accumulate(writes)) <= ends


@pytest.mark.parametrize("write", [1, 2, 4])
def test_a_failed_write_ends_the_job_with_its_words(
    memory: Callable[..., MemoryOutput], write: int
) -> None:
    output = memory(Fault(write, "cannot write X: no space"))
    loop = Loop(output)
    loop.put(DENSE)
    loop.until_over()
    assert loop.store.state is WriterState.FAILED
    assert str(loop.store.error) == "cannot write X: no space"
    assert loop.written == [extent.notes for extent in DENSE.extents[: max(0, write - 2)]]
    loop.store.abandon()
    assert output.abandoned
    assert str(loop.store.error) == "cannot write X: no space"


def test_a_failed_commit_ends_the_job_with_its_words(memory: Callable[..., MemoryOutput]) -> None:
    output = memory(Fault(None, "the command ended with exit status 3"))
    loop = Loop(output)
    loop.put(DENSE)
    loop.store.finish()
    loop.until_over()
    assert loop.store.state is WriterState.FAILED
    assert str(loop.store.error) == "the command ended with exit status 3"
    loop.store.abandon()
    assert output.abandoned


def test_what_is_put_after_an_error_is_dropped(memory: Callable[..., MemoryOutput]) -> None:
    output = memory(Fault(1))
    loop = Loop(output)
    loop.put(DENSE)
    loop.until_over()
    before = loop.store.backlog_bytes
    loop.store.put(DENSE.extents[0])
    loop.store.finish()
    assert loop.store.backlog_bytes == before
    loop.store.abandon()
    assert loop.store.state is WriterState.FAILED


def test_a_defect_of_ours_fails_the_job_as_well(memory: Callable[..., MemoryOutput]) -> None:
    loop = Loop(memory())
    loop.put(DENSE)
    no_bytes: Any = ["no bytes"]
    loop.store.put(DENSE.extents[0]._replace(buffers=no_bytes))
    loop.until_over()
    assert loop.store.state is WriterState.FAILED
    assert isinstance(loop.store.error, TypeError)
    loop.store.abandon()


# --- abandoning ---


def test_a_store_that_never_began_can_be_abandoned(memory: Callable[..., MemoryOutput]) -> None:
    output = memory()
    loop = Loop(output)
    loop.store.abandon()
    assert output.abandoned
    assert loop.store.state is WriterState.FAILED


def test_abandoning_twice_or_after_the_commit_is_no_error(
    memory: Callable[..., MemoryOutput],
) -> None:
    output = memory()
    loop = Loop(output)
    loop.put(DENSE)
    loop.store.finish()
    loop.until_over()
    loop.store.abandon()
    loop.store.abandon()
    assert loop.store.committed
    assert not output.abandoned
    assert output.data == DENSE.plain


@pytest.mark.parametrize("place", [1, 2, None])
def test_a_write_or_commit_that_stands_still_can_be_abandoned(
    memory: Callable[..., MemoryOutput], place: int | None
) -> None:
    stall = Fault(place, stalls=True)
    output = memory(stall)
    loop = Loop(output)
    loop.put(DENSE)
    loop.store.finish()
    assert stall.fired.wait(LIMIT_S)
    loop.store.abandon()
    assert output.abandoned
    assert loop.store.state is WriterState.FAILED
    assert "abandoned" in str(loop.store.error)


def test_a_store_that_was_abandoned_wakes_nobody(memory: Callable[..., MemoryOutput]) -> None:
    calls: list[int] = []
    stall = Fault(2, stalls=True)
    store: ArchiveWriter[int] = ArchiveWriter(memory(stall), None, lambda: calls.append(1))
    store.begin(DENSE.header, DENSE.raw_header)
    store.put(DENSE.extents[0])
    assert stall.fired.wait(LIMIT_S)
    store.abandon()
    assert calls == []


@pytest.mark.parametrize("spec", ["fd:{}", "exec:sleep 1000"])
@pytest.mark.parametrize("compression", [None, Compression(threads=2)])
@pytest.mark.parametrize("digested", [False, True])
def test_a_full_pipe_does_not_hold_up_an_abandon(
    spec: str,
    compression: Compression | None,
    digested: bool,
    stuck: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So long a busy machine does not take for a write that ends: the two are told apart.
    monkeypatch.setattr("vmapipe.archiver.outputs.base.ABANDON_WAIT_S", 2 * LIMIT_S)
    theirs, ours = os.pipe()
    if "{}" not in spec:
        os.close(ours)
    output = open_output(spec.format(ours))
    digests = Digests(ManifestLines(lambda line: None)) if digested else None
    loop = Loop(output, digests, compression)
    # Random, or there would be nothing left to fill the pipe with.
    made = archive(disk(1, [0xFFFF] * 580), [device(1, 580)])
    noise = os.urandom(4 << 20)
    loop.store.begin(made.header, made.raw_header)
    for extent in made.extents:
        loop.store.put(extent._replace(buffers=[noise]))
    assert stuck.wait(LIMIT_S)
    started = time.monotonic()
    loop.store.abandon()
    assert time.monotonic() - started < LIMIT_S
    assert loop.store.state is WriterState.FAILED
    os.close(theirs)


def test_an_abandoned_archive_and_its_manifest_leave_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "vm.vma")
    loop = Loop(open_output(path), Digests(ManifestFile(beside(path), replace=True)))
    loop.put(DENSE)
    loop.until(lambda: bool(loop.written))
    loop.store.abandon()
    assert list(tmp_path.iterdir()) == []


# --- all of it together ---


@pytest.mark.parametrize("compression", [None, Compression(threads=2)])
def test_a_compressed_and_digested_archive_in_a_file(
    tmp_path: Path, compression: Compression | None
) -> None:
    path = tmp_path / "vm.vma"
    digests = Digests(ManifestFile(beside(str(path)), replace=True))
    loop = Loop(open_output(str(path)), digests, compression)
    assert loop.store.description == str(path)
    loop.put(DENSE)
    loop.store.finish()
    loop.until_over()
    assert loop.store.committed
    raw = path.read_bytes()
    assert (decompressed(raw) if compression else raw) == DENSE.plain
    assert loop.store.stored_bytes == len(raw)
    assert loop.store.plain_bytes == len(DENSE.plain)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vm.vma", "vm.vma.manifest.json"]


def test_a_full_disk_leaves_neither_archive_nor_manifest(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, before[1]))
    try:
        path = str(tmp_path / "vm.vma")
        loop = Loop(open_output(path), Digests(ManifestFile(beside(path), replace=True)))
        loop.put(DENSE)
        loop.store.finish()
        loop.until_over()
        assert "File too large after 6.0 MiB" in str(loop.store.error)
        loop.store.abandon()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


STUCK = """
import os
from tests.archiver.extents import dense
from vmapipe.archiver.outputs import stream
from vmapipe.archiver.outputs.open import open_output
from vmapipe.archiver.job.writer import ArchiveWriter
from vmapipe.runtime.syscalls import writable

# A pipe that can only be written by waiting: nobody can get the writer out of it.
stream._open_anew = lambda number: None
theirs, ours = os.pipe()
made = dense(580)
store = ArchiveWriter(open_output(f"fd:{ours}"), None, lambda: None)
store.begin(made.header, made.raw_header)
for extent in made.extents:
    store.put(extent)
while writable(ours, 0):
    pass  # until the pipe is full
print("stuck", flush=True)
store.abandon()
print(store.state.name, flush=True)
"""


def test_a_writer_that_hangs_in_the_kernel_keeps_neither_abandon_nor_the_process() -> None:
    words = [sys.executable, "-P", "-c", STUCK]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stuck\n"
        # The limits of the output and of the store are some seconds; without them it is for ever.
        rest, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, rest) == (0, b"FAILED\n")
    assert process.returncode != -signal.SIGKILL
