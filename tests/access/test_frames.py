# SPDX-License-Identifier: Apache-2.0
"""Frames that come next are there before they are asked for, where a file is read in order and nowhere else."""

from __future__ import annotations

import ctypes
import errno
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest

from tests.archives import encode_seek_table
from tests.restore.support import one_frame
from vmapipe.access.frames import FrameStorage
from vmapipe.access.storage import DamageError
from vmapipe.restore.archive.zstd import FrameReader, seekable_frames
from vmapipe.vma.seektable import Frame

FRAME_BYTES = 3 << 20
HEADER_BYTES = 512
# Of a dense extent, at level 1.
THIRD_BYTES = 310 * 4096
LIMIT_S = 60.0
PIECE_BYTES = 64 << 10


class Stored:
    """A file of frames in memory that records which of them were read, each from its first byte."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.plain = [random.Random(n).randbytes(64) * (size // 64) for n, size in enumerate(sizes)]
        self.packed = [one_frame(plain) for plain in self.plain]
        self.frames = [Frame(len(p), len(q)) for p, q in zip(self.packed, self.plain, strict=True)]
        self.file = b"".join(self.packed)
        self.starts = [sum(map(len, self.packed[:n])) for n in range(len(sizes))]
        self.read: list[int] = []
        self.changed = threading.Condition()
        self.failing: set[int] = set()

    def pread(self, length: int, offset: int) -> bytes:
        with self.changed:
            if offset in self.starts:
                self.read.append(self.starts.index(offset))
                self.changed.notify_all()
        if offset in self.starts and self.starts.index(offset) in self.failing:
            raise OSError(5, "Input/output error")
        return self.file[offset : offset + length]

    def at(self, number: int) -> int:
        return sum(map(len, self.plain[:number]))

    def wait_until_read(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.read, LIMIT_S)


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[Stored, FrameStorage]]:
    sizes: Sequence[int] = getattr(request, "param", [FRAME_BYTES] * 8)
    stored = Stored(sizes)
    released: list[bool] = []
    storage = FrameStorage("it", stored.pread, lambda: released.append(True), stored.frames)
    yield stored, storage
    if not released:
        storage.close()
    assert released == [True]


def read(storage: FrameStorage, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    if not storage.try_read_into(view, offset):
        assert storage.read_into(view, offset) == length
    return bytes(view)


WITH_HEADERS = [HEADER_BYTES, FRAME_BYTES] * 5


@pytest.mark.parametrize("opened", [WITH_HEADERS], indirect=True)
def test_what_a_random_read_decompresses_half_of_is_a_frame_of_data(
    opened: tuple[Stored, FrameStorage],
) -> None:
    usual_bytes = opened[1].usual_frame_bytes()
    assert FRAME_BYTES - HEADER_BYTES <= usual_bytes <= FRAME_BYTES


@pytest.mark.parametrize("opened", [[FRAME_BYTES] * 8, WITH_HEADERS], indirect=True)
def test_who_comes_from_the_end_of_a_frame_finds_the_one_behind_the_next_under_way(
    opened: tuple[Stored, FrameStorage],
) -> None:
    stored, storage = opened
    data = [n for n, plain in enumerate(stored.plain) if len(plain) == FRAME_BYTES]
    for number in data[:2]:
        assert read(storage, stored.at(number), FRAME_BYTES) == stored.plain[number]
    stored.wait_until_read(data[2])
    # What was read ahead is read from memory, and lets the next one be read ahead.
    for number in data[2:-1]:
        assert read(storage, stored.at(number), FRAME_BYTES) == stored.plain[number]
        stored.wait_until_read(number + (data[1] - data[0]))
    assert sorted(set(stored.read)) == sorted(stored.read), "each is decompressed once"


@pytest.mark.parametrize("opened", [[FRAME_BYTES] * 8, [THIRD_BYTES] * 8], indirect=True)
def test_who_reads_here_and_there_pays_for_no_other_frame(
    opened: tuple[Stored, FrameStorage],
) -> None:
    stored, storage = opened
    for number in (0, 1, 2, 4, 3, 6, 5):
        middle = len(stored.plain[number]) // 2
        assert (
            read(storage, stored.at(number) + middle, 4096) == stored.plain[number][middle:][:4096]
        )
    storage.close()  # a thread that has begun ends first
    assert sorted(stored.read) == [0, 1, 2, 3, 4, 5, 6]


def test_a_frame_that_cannot_be_read_ahead_is_an_error_to_who_reads_it_alone(
    opened: tuple[Stored, FrameStorage],
) -> None:
    stored, storage = opened
    stored.failing = {2}
    for number in (0, 1):
        assert read(storage, stored.at(number), FRAME_BYTES) == stored.plain[number]
    stored.wait_until_read(2)
    with pytest.raises(OSError, match="cannot read it at offset"):
        read(storage, stored.at(2), 4096)
    assert read(storage, stored.at(3), FRAME_BYTES) == stored.plain[3]


@pytest.mark.parametrize("hit", [0, 1], ids=["its start", "its middle"])
def test_a_frame_that_could_not_be_read_for_a_moment_is_not_damaged_and_is_read_the_next_time(
    hit: int,
) -> None:
    plain = random.Random(1).randbytes(4 * PIECE_BYTES)
    packed = one_frame(plain)
    faults = [OSError(errno.ETIMEDOUT, "Connection timed out")]

    def pread(length: int, offset: int) -> bytes:
        if offset == hit * PIECE_BYTES and faults:
            raise faults.pop()
        return packed[offset : offset + length]

    frames = [Frame(len(packed), len(plain))]
    storage = FrameStorage("it", pread, lambda: None, frames, piece_bytes=PIECE_BYTES)
    with pytest.raises(OSError, match="Connection timed out") as caught:
        read(storage, 0, len(plain))
    assert not isinstance(caught.value, DamageError)
    assert read(storage, 0, len(plain)) == plain
    storage.close()


def test_all_who_wait_for_a_frame_hear_what_kept_it_from_being_read() -> None:
    plain = random.Random(1).randbytes(4 * PIECE_BYTES)
    reader = FrameReader(failing_once(one_frame(plain)), len(plain))
    for _ in range(2):  # who comes later to the same reader, too
        with pytest.raises(OSError, match="no answer"):
            reader.go_to(len(plain))


def failing_once(packed: bytes) -> Iterator[bytes]:
    yield packed[: len(packed) // 2]
    raise OSError(errno.EIO, "no answer")


@pytest.mark.parametrize("opened", [[HEADER_BYTES] + [THIRD_BYTES] * 3], indirect=True)
def test_the_frames_of_an_extent_are_decompressed_side_by_side(
    opened: tuple[Stored, FrameStorage],
) -> None:
    stored, _ = opened

    def pread(length: int, offset: int) -> bytes:
        if offset == stored.starts[1]:
            stored.wait_until_read(2)  # or for ever
        return stored.pread(length, offset)

    storage = FrameStorage("it", pread, lambda: None, stored.frames)
    parts = storage.pieces(0, storage.size_bytes)
    assert b"".join(parts) == b"".join(stored.plain)
    storage.close()
    assert sorted(stored.read) == [0, 1, 2, 3], "each is decompressed once"


def print_heaps() -> None:
    """In a process of its own, which has none but the first: glibc's list of them (malloc_info(3))."""
    plain = bytes(FRAME_BYTES)
    packed = one_frame(plain)
    file = packed + encode_seek_table([Frame(len(packed), len(plain))])
    assert seekable_frames(lambda length, at: file[at : at + length], len(file), ())
    together = threading.Barrier(4)

    def take_memory() -> None:
        held = bytes(64 << 10)
        together.wait(LIMIT_S)
        del held

    threads = [threading.Thread(target=take_memory) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    libc = ctypes.CDLL(None)
    libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
    libc.fflush(None)


def test_frames_are_decompressed_into_one_heap_by_all_threads() -> None:
    words = [sys.executable, "-c", f"from {__name__} import print_heaps as f; f()"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert done.stdout.count("<heap nr=") == 1, done.stdout
