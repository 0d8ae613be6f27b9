# SPDX-License-Identifier: Apache-2.0
"""The plain bytes of a base, from its start to its end: a plain archive's own, or out of its zstd frames."""

from __future__ import annotations

import array
import os
import sys
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from vmapipe.archiver.base.source import BaseSource, read_source
from vmapipe.archiver.outputs.compress import Compressed, decompress
from vmapipe.clusters.sizes import MAX_EXTENT_BYTES
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import (
    FOOTER_BYTES,
    is_cut,
    is_zstd,
    seek_table_bytes,
    seek_table_entries,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

# Two of the largest extents: the next one is read together with what is left of this one.
_BUFFER_BYTES = 2 * MAX_EXTENT_BYTES
# Ours hold an extent's data, or what was gathered to less than 3 MiB and the write that brought it there.
_MAX_FRAME_BYTES = 2 * MAX_EXTENT_BYTES
# Frames that are decompressed ahead, beyond one for each thread.
_SPARE_FRAMES = 1
# Decompressing keeps up with any disk with so many.
_MAX_THREADS = 4
_TOO_EARLY = "it ends too early"


class BaseContent(Protocol):
    """Errors: OSError, and ValueError, in words, where it is damaged."""

    def have(self, at: int, length: int) -> memoryview:
        """`length` plain bytes from `at` on, not before what was had last; good until the next call."""

    def frames_of(self, at: int, length: int) -> list[Compressed]:
        """The frames that hold exactly these bytes, which were just had, as they are; none: there are no such."""

    def close(self) -> None:
        """Give up what it holds, but not the file."""


class PlainContent:
    """Of a plain archive."""

    def __init__(self, source: BaseSource) -> None:
        self._source = source
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        #: The buffer holds the archive's bytes from `_from` on, `_length` of them.
        self._from = self._length = 0

    def have(self, at: int, length: int) -> memoryview:
        start = at - self._from
        if start > self._length:
            self._from, self._length, start = at, 0, 0
        if start + length > self._length:
            left = self._length - start
            self._buffer[:left] = self._buffer[start : start + left]
            self._from, self._length, start = at, left, 0
            while self._length < length:
                room = self._view[self._length :]
                got = self._source.read_into(room, self._from + self._length)
                if not got:
                    raise ValueError(_TOO_EARLY)
                self._length += got
        return self._view[start : start + length]

    def frames_of(self, at: int, length: int) -> list[Compressed]:
        return []

    def close(self) -> None:
        """Do nothing."""


class FrameTable:
    """The seek table of a file, 8 bytes a frame. Raises OSError; ValueError, in words, for one of no use here."""

    def __init__(self, source: BaseSource) -> None:
        file_bytes = source.size_bytes
        foot = (
            read_source(source, FOOTER_BYTES, file_bytes - FOOTER_BYTES) if file_bytes > 9 else b""
        )
        table_bytes = seek_table_bytes(foot)
        if table_bytes is None or table_bytes > file_bytes:
            raise ValueError("it is compressed in one piece, or not with zstd")
        if not is_cut(foot):
            raise ValueError(
                "its zstd frames hold headers and data together, as older versions of vmapipe made "
                "them; the new archive's do not"
            )
        self._entries = array.array("I")
        try:
            raw = seek_table_entries(read_source(source, table_bytes, file_bytes - table_bytes))
        except ArchiveError as error:
            raise ValueError(str(error)) from error
        self._entries.frombytes(raw)
        if sys.byteorder == "big":
            self._entries.byteswap()
        if sum(self._entries[::2]) != file_bytes - table_bytes or not self._entries:
            raise ValueError("its table of frames does not fit it")
        if (
            max(self._entries[1::2]) > _MAX_FRAME_BYTES
            or max(self._entries[::2]) > _MAX_FRAME_BYTES
        ):
            raise ValueError("its zstd frames are larger than vmapipe makes them")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Compressed and plain bytes of each frame."""
        return zip(self._entries[::2], self._entries[1::2], strict=True)


class FrameContent:
    """Of an archive of independent frames, of which some are decompressed ahead."""

    def __init__(self, source: BaseSource) -> None:
        """Raises OSError; ValueError as FrameTable does."""
        self._source = source
        self._left = iter(FrameTable(source))
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        # The first frame alone: no more of it is looked at by most that open a base.
        self._most, self._then = 1, threads + _SPARE_FRAMES
        self._ahead: deque[tuple[Compressed, Future[bytes]]] = deque()
        self._file_at = 0
        # What was had last lies in these, the first of which begins at `_kept_from`.
        self._kept: list[Compressed] = []
        self._kept_from = 0
        # The current frame's bytes, from `_start` to `_end` of the plain archive.
        self._plain = memoryview(b"")
        self._start = self._end = 0
        # Late: it brings `logging` along, and most backups have no such base.
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(threads, "base")

    def have(self, at: int, length: int) -> memoryview:
        while at >= self._end:
            self._next()
        del self._kept[:-1]
        self._kept_from = self._start
        start = at - self._start
        if at + length <= self._end:
            return self._plain[start : start + length]
        joined = bytearray(self._plain[start:])
        while len(joined) < length:
            self._next()
            joined += self._plain[: length - len(joined)]
        return memoryview(joined)

    def frames_of(self, at: int, length: int) -> list[Compressed]:
        return list(self._kept) if (at, at + length) == (self._kept_from, self._end) else []

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> None:
        while len(self._ahead) < self._most:
            sizes = next(self._left, None)
            if sizes is None:
                break
            compressed_bytes, plain_bytes = sizes
            # Read here: a thread of the pool must not hang in a dead disk.
            data = read_source(self._source, compressed_bytes, self._file_at)
            frame = Compressed(data, plain_bytes)
            self._ahead.append((frame, self._pool.submit(decompress, frame)))
            self._file_at += compressed_bytes
        self._most = self._then
        if not self._ahead:
            raise ValueError(_TOO_EARLY)
        frame, plain = self._ahead.popleft()
        self._kept.append(frame)
        self._plain = memoryview(plain.result())
        self._start, self._end = self._end, self._end + len(self._plain)


def open_content(source: BaseSource) -> BaseContent:
    """Return what the archive holds. Raises OSError; ValueError, in words, where it cannot be had."""
    if is_zstd(read_source(source, 4, 0)):
        return FrameContent(source)
    return PlainContent(source)
