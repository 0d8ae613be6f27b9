# SPDX-License-Identifier: Apache-2.0
"""The plain bytes of a zstd file of independent frames, at any place, and frames ahead of who reads in order."""

from __future__ import annotations

import functools
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

from vmapipe.access.storage import CACHE_BYTES, Cache, damage_error, read_error, whole_read
from vmapipe.restore.archive.input import Pread
from vmapipe.restore.archive.zstd import FrameReader, decompress_start
from vmapipe.runtime.threads import DaemonPool
from vmapipe.vma.seektable import Frame, usual_frame_bytes

# Of a compressed frame in a file at a time: a read of its start does not need all.
_PIECE_BYTES = 256 << 10
# A frame, of any that we write.
WHOLE_FRAME_BYTES = 32 << 20
# Of a compressed frame's start, for the header in it: zstd's blocks hold up to 128 KiB
# of plain data, and random data does not get smaller.
_START_BYTES = 132 << 10
# What a frame in memory takes at least, however little it holds.
_LEAST_COST_BYTES = 64 << 10
# A frame that holds less is a header between two of a disk's data.
_HEADER_FRAME_BYTES = 64 << 10
# Whoever reads so near to a frame's end, and then as near to the next one's start, reads in order: several requests
# that are under way at a time. A random read seldom does, nor with frames of a third of an extent.
_NEAR_BYTES = 1 << 20
_NEAR_PARTS = 8
# Ahead of that: for each thread that decompresses an extent, as one frame or as several.
_AHEAD_BYTES = 3 << 20
# More threads than this decompress faster than one connection takes it.
_MAX_THREADS = 4
# A thread ends with the frame that it is at; one that a hung disk keeps is left behind.
_JOIN_S = 2.0


class FrameStorage:
    """A zstd file, or object, of independent frames with a seek table. `release` ends it.

    `pread` (length, offset) reads the compressed bytes, fewer only at the end, and may
    raise OSError or Failure. A frame is decompressed whole when it is read for the first time, which compares
    its checksum, and later as far as it is needed. It is kept while there is room in the cache; a
    thread that wants a frame which another one decompresses waits for it. Where frames are read in
    order, the next ones are decompressed by threads meanwhile.
    """

    def __init__(
        self,
        name: str,
        pread: Pread,
        release: Callable[[], None],
        frames: Iterable[Frame],
        cache_bytes: int = CACHE_BYTES,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        """`piece_bytes`: of compressed data at a time; where a request costs more than bytes, a frame's."""
        self._piece_bytes = piece_bytes
        self._name = name
        self._pread_file = pread
        self._release = release
        self._cache = Cache(cache_bytes, _cost_of_frame)
        self._file_at, self._plain_at = array("Q", [0]), array("Q", [0])
        for frame in frames:
            self._file_at.append(self._file_at[-1] + frame.compressed_bytes)
            self._plain_at.append(self._plain_at[-1] + frame.plain_bytes)
        self._proved = bytearray(len(self._plain_at) - 1)
        self.size_bytes = self._plain_at[-1]
        self._threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
        self._pool: DaemonPool | None = None
        self._fetching: set[int] = set()
        self._planning = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        for number, at, end in self._parts(offset, len(view)):
            frame = self._frame(number, end)
            frame.copy_to(view[done : done + end - at], at)
            done += end - at
            self._was_read(number, frame, at, end)
        return done

    def pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        """The same bytes where they lie in memory; as many as there are.

        Where that is several frames, threads decompress the next ones meanwhile.
        """
        parts = list(self._parts(offset, length))
        large = [n for n, _, _ in parts if self._plain_bytes(n) >= _HEADER_FRAME_BYTES]
        with self._planning:
            for number in large[1:]:
                self._begin_to_fetch(number)
        for number, at, end in parts:
            yield from self._frame(number, end).pieces(at, end)

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The frames that hold these bytes: number, and from where to where in its plain bytes."""
        end = min(offset + length, self.size_bytes)
        while offset < end:
            number = bisect_right(self._plain_at, offset) - 1
            start = self._plain_at[number]
            stop = min(end, self._plain_at[number + 1])
            yield number, offset - start, stop - start
            offset = stop

    def usual_frame_bytes(self) -> int:
        """What a random read decompresses half of."""
        return usual_frame_bytes(map(self._plain_bytes, range(len(self._proved))))

    def _plain_bytes(self, number: int) -> int:
        return self._plain_at[number + 1] - self._plain_at[number]

    def _frame(self, number: int, end: int) -> FrameReader:
        """The frame, decompressed up to `end` at least. Raises OSError (EIO)."""
        frame = self._cache.get(number, self._read_frame)
        try:
            frame.go_to(end if self._proved[number] else self._plain_bytes(number))
        except BaseException as error:
            # Whatever it was, this reader cannot go on: the next one begins anew.
            self._cache.forget(number)
            if not isinstance(error, ValueError):
                raise
            raise damage_error(self._name, self._file_at[number], str(error)) from error
        self._proved[number] = 1
        return frame

    def read_start(self, length: int, offset: int) -> bytes:
        """`length` bytes, of a frame that begins at or before `offset`, and no more work than that.

        For headers: of the 3.6 MiB of a frame only the first block is decompressed.
        """
        number = bisect_right(self._plain_at, offset) - 1
        at = offset - self._plain_at[number]
        if self._cache.kept(number) is not None:
            view = memoryview(bytearray(max(0, min(length, self._plain_bytes(number) - at))))
            self._frame(number, at + len(view)).copy_to(view, at)
            return bytes(view)
        file_at, end = self._file_at[number], self._file_at[number + 1]

        def pieces() -> Iterator[bytes]:
            for piece_at in range(file_at, end, _START_BYTES):
                yield self._pread(min(_START_BYTES, end - piece_at), piece_at)

        try:
            return decompress_start(pieces(), at + length)[at:]
        except ValueError as error:
            raise damage_error(self._name, offset, str(error)) from error

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        number = bisect_right(self._plain_at, offset) - 1
        if offset + len(view) > self._plain_at[min(number + 1, len(self._plain_at) - 1)]:
            return False
        frame = self._cache.kept(number)
        at = offset - self._plain_at[number]
        # A frame that was not proved to its end has no bytes yet.
        if frame is None or not self._proved[number] or at + len(view) > frame.done_bytes:
            return False
        frame.copy_to(view, at)
        self._was_read(number, frame, at, at + len(view))
        return True

    def _read_frame(self, number: int) -> FrameReader:
        file_at = self._file_at[number]
        end, step = self._file_at[number + 1], self._piece_bytes
        pieces = (self._pread(min(step, end - at), at) for at in range(file_at, end, step))
        return FrameReader(pieces, self._plain_bytes(number))

    def _pread(self, length: int, offset: int) -> bytes:
        data = whole_read(self._name, self._pread_file, length, offset)
        if len(data) != length:
            raise read_error(self._name, offset, "the file is shorter than it was")
        return data

    # --- Ahead of the reader

    def _was_read(self, number: int, frame: FrameReader, at: int, end: int) -> None:
        """Read ahead where a client comes to this frame from the end of the one before."""
        is_first, frame.read_to = not frame.read_to, end
        if is_first and at < self._near_bytes(number) and self._was_read_to_its_end(number - 1):
            self._read_ahead(number + 1)

    def _was_read_to_its_end(self, number: int) -> bool:
        while number > 0 and self._plain_bytes(number) < _HEADER_FRAME_BYTES:
            number -= 1
        before = self._cache.kept(number)
        return before is not None and (
            before.read_to > before.plain_bytes - self._near_bytes(number)
        )

    def _near_bytes(self, number: int) -> int:
        return min(_NEAR_BYTES, self._plain_bytes(number) // _NEAR_PARTS)

    def _read_ahead(self, number: int) -> None:
        """From frame `number` on."""
        wanted = self._threads * _AHEAD_BYTES
        with self._planning:
            while wanted > 0 and number < len(self._proved):
                wanted -= self._plain_bytes(number)
                self._begin_to_fetch(number)
                number += 1

    def _begin_to_fetch(self, number: int) -> None:
        """In a thread, if it is not there. `_planning` is held."""
        if number in self._fetching or self._cache.kept(number) is not None:
            return
        self._fetching.add(number)
        if self._pool is None:
            self._pool = DaemonPool(self._threads, "ahead")
        self._pool.submit(functools.partial(self._fetch, number))

    def _fetch(self, number: int) -> None:
        try:
            self._frame(number, self._plain_bytes(number))
        except OSError:
            pass  # it is told to whoever reads it
        finally:
            with self._planning:
                self._fetching.discard(number)

    def close(self) -> None:
        if self._pool is None or self._pool.close(_JOIN_S):
            self._release()  # else it ends with the process


def _cost_of_frame(frame: FrameReader) -> int:
    # What of it is not decompressed yet takes no more than that, as a rule.
    return max(frame.plain_bytes, _LEAST_COST_BYTES)
