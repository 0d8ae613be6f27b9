# SPDX-License-Identifier: Apache-2.0
"""zstd between the store and an output: independent frames, and a seek table at the end.

`zstd -dc` reads the result, and a reader that knows the table
(vma/seektable.py) jumps into it. The data of an extent is one to three frames of its own, which do not
depend on the archive's uuid: a later archive takes them as they are. Only this file of the room imports
the zstd library.
"""

from __future__ import annotations

import array
import functools
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.archiver.outputs.base import MAX_THREADS, Buffers, Output, OutputFailure, OutputWrapper
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, MAX_EXTENT_DATA_BYTES
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.process import keep_freed_memory
from vmapipe.vma.seektable import seek_table_ends

if TYPE_CHECKING:
    from concurrent.futures import Future

DEFAULT_LEVEL = 3
# zstd has 22; from 20 on a frame takes more than 100 MiB of memory to make,
# which is a poor trade for a few per cent.
MAX_LEVEL = 19
_OPTION = r"zstd(?::([0-9]{1,2}))?"


class Compression(NamedTuple):
    """`level` 1..19, `threads` >= 1."""

    level: int = DEFAULT_LEVEL
    threads: int = 1


def parse_compression(text: str, threads: int) -> Compression:
    """`zstd` or `zstd:LEVEL`. Raises UsageError."""
    match = re.fullmatch(_OPTION, text)
    level = int(match[1] or DEFAULT_LEVEL) if match else 0
    if not 1 <= level <= MAX_LEVEL:
        raise UsageError(f"--compress {text}: use zstd or zstd:1 to zstd:{MAX_LEVEL}")
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads}: use 1 to {MAX_THREADS}")
    return Compression(level=level, threads=threads)


# A frame is closed at the end of the write that brings it to this length, where extents have little
# data. Measured at level 3: 2 MiB frames are 0.9 % larger than
# 8 MiB ones, 4 MiB frames 0.3 %; the speed is the same.
FRAME_BYTES = 3 << 20
# The data of an extent is frames of its own from this length on, and its header ends the frame before.
# Measured at level 3: an archive of dense extents is 0.004 % larger so; one of a disk with many holes 0.25 %,
# and 0.8 % if extents with 1 MiB were cut, too: they compress better together.
CUT_BYTES = 2 << 20
# Of such data a frame holds no more than this, so that a random read of a served archive, which decompresses half of a frame on
# average, costs less: by level (docs/decisions/0038-frames.md has the figures). A match reaches back 512 KiB at level 1, where three frames for an
# extent cost 0.1 to 0.9 % of room; at levels 2 and 3 two cost 0.1 to 2.5 %, and three up to 4.8 %. Higher levels are for whoever wants
# a small archive: one frame.
_PIECE_BYTES = {1: 20 * CLUSTER_BYTES, 2: 30 * CLUSTER_BYTES, 3: 30 * CLUSTER_BYTES}
# Frames that wait for a thread or to be written, beyond one for each thread:
# enough that no thread stands still while a frame is being written.
_SPARE_FRAMES = 2


class Compressed(NamedTuple):
    """A whole frame, and the length of what it holds."""

    data: bytes
    plain_bytes: int


class ZstdOutput(OutputWrapper):
    """Compresses into another output.

    Each write must bring one extent, its header as the first buffer, or several without data, or
    the archive's header: frames are cut between writes, and behind the header of an extent
    with CUT_BYTES and more. Such a header and its data are one piece of work for a thread. Memory:
    (threads + 3) of these, plain and compressed, of FRAME_BYTES and at most one write more each.
    """

    def __init__(self, inner: Output, compression: Compression) -> None:
        if not 1 <= compression.level <= MAX_LEVEL:
            raise UsageError(f"zstd levels are 1 to {MAX_LEVEL}, not {compression.level}")
        if compression.threads < 1:
            raise UsageError("compression needs at least one thread")
        super().__init__(inner)
        self._level = compression.level
        self._piece_bytes = _PIECE_BYTES.get(compression.level, MAX_EXTENT_DATA_BYTES)
        self._frame_bytes = min(FRAME_BYTES, self._piece_bytes)
        self._limit = compression.threads + _SPARE_FRAMES
        self._plain = bytearray()
        self._frames: deque[Future[list[Compressed]]] = deque()
        self._table = array.array("I")
        self._thread = threading.local()
        keep_freed_memory()  # before a thread has a heap of its own: 20 % fewer faults, 5 % of the processor time
        _compressor(self._level)  # loads the library here, and not in the middle of a backup
        self._over = False
        # Late: most backups compress nothing, and it brings `logging` along.
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(compression.threads, "zstd")

    def write(self, buffers: Buffers) -> None:
        self._check()
        # Copies, for the buffers belong to others again when we return.
        if sum(map(len, buffers[1:])) >= CUT_BYTES:
            self._plain += buffers[0]
            self._close_frame(*self._pieces(b"".join(buffers[1:])))
            return
        for buffer in buffers:
            self._plain += buffer
        if len(self._plain) >= self._frame_bytes:
            self._close_frame()

    def _pieces(self, data: bytes) -> list[memoryview]:
        """The data of an extent, a frame each: as few as the level allows, of about the same length."""
        blocks = -(-len(data) // BLOCK_BYTES)
        step = BLOCK_BYTES * -(-blocks // -(-len(data) // self._piece_bytes))
        return [memoryview(data)[at : at + step] for at in range(0, len(data), step)]

    def write_kept(self, header: bytes | memoryview, kept: Sequence[Compressed]) -> None:
        """Write an extent whose data another archive has as frames of its own: the frames as they are."""
        self._check()
        self._plain += header
        self._close_frame(*kept)

    def commit(self) -> None:
        self._check()
        if self._plain:
            self._close_frame()
        while self._frames:
            self._write_frame()
        self._pool.shutdown()
        if sys.byteorder == "big":
            self._table.byteswap()
        head, foot = seek_table_ends(len(self._table) // 2, is_cut=True)
        self._inner.write([head, memoryview(self._table).cast("B"), foot])
        self._inner.commit()
        self._over = True

    def abandon(self) -> None:
        self._over = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._inner.abandon()

    def _check(self) -> None:
        if self._over:
            raise OutputFailure(f"{self.description} takes no more: it is complete or given up")

    def _close_frame(self, *behind: memoryview | Compressed) -> None:
        """Make frames of what waits and of what comes `behind` it, which may be one already."""
        parts, self._plain = (self._plain, *behind), bytearray()
        self._frames.append(self._pool.submit(self._compress, parts))
        while len(self._frames) > self._limit or (self._frames and self._frames[0].done()):
            self._write_frame()

    def _compress(self, parts: Sequence[bytearray | memoryview | Compressed]) -> list[Compressed]:
        compress: Callable[[bytearray | memoryview], bytes] | None
        compress = getattr(self._thread, "compress", None)
        if compress is None:
            # One for each thread: it must not be shared, and making one is slow.
            compress = self._thread.compress = _compressor(self._level)
        return [
            part if isinstance(part, Compressed) else Compressed(compress(part), len(part))
            for part in parts
        ]

    def _write_frame(self) -> None:
        frames = self._frames.popleft().result()
        for compressed, plain_bytes in frames:
            self._table.extend((len(compressed), plain_bytes))
        self._inner.write([frame.data for frame in frames])


def decompress(frame: Compressed) -> bytes:
    """Return what the frame holds. Raises ValueError where that is damaged, or of another length."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    decompressor = zstd.ZstdDecompressor()
    try:
        # One byte more than there may be, so that it goes on to the end and its checksum.
        plain = decompressor.decompress(frame.data, frame.plain_bytes + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"the zstd data is damaged: {error}") from error
    if len(plain) != frame.plain_bytes or not decompressor.eof or decompressor.unused_data:
        raise ValueError("a zstd frame is not as long as its seek table says")
    return plain


def _compressor(level: int) -> Callable[[bytearray | memoryview], bytes]:
    """Return a function that makes one frame, with its length and a checksum, of all that it gets."""
    # Late: a compiled library takes 15 ms, and most backups do not compress.
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    options: Mapping[int, int] = {
        zstd.CompressionParameter.compression_level: level,
        zstd.CompressionParameter.checksum_flag: 1,
    }
    return functools.partial(
        zstd.ZstdCompressor(options=options).compress, mode=zstd.ZstdCompressor.FLUSH_FRAME
    )
