# SPDX-License-Identifier: Apache-2.0
"""zstd between the store and an output: independent frames, and a seek table at the end.

`zstd -dc` reads the result, and a reader that knows the table
(vma/seektable.py) jumps into it. Only this file of the room imports the zstd library.
"""

from __future__ import annotations

import array
import functools
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from vmapipe.archiver.outputs.base import Buffers, Output, OutputFailure, OutputWrapper
from vmapipe.runtime.errors import UsageError
from vmapipe.vma.seektable import seek_table_ends

DEFAULT_LEVEL = 3
# zstd has 22; from 20 on a frame takes more than 100 MiB of memory to make,
# which is a poor trade for a few per cent.
MAX_LEVEL = 19
# More threads than this only take memory: 4 MiB in and 4 MiB out for each.
MAX_THREADS = 64
_OPTION = re.compile(r"zstd(?::([0-9]{1,2}))?")


class Compression(NamedTuple):
    """`level` 1..19, `threads` >= 1."""

    level: int = DEFAULT_LEVEL
    threads: int = 1


def parse_compression(text: str, threads: int) -> Compression:
    """`zstd` or `zstd:LEVEL`. Raises UsageError."""
    match = _OPTION.fullmatch(text)
    level = int(match[1] or DEFAULT_LEVEL) if match else 0
    if not 1 <= level <= MAX_LEVEL:
        raise UsageError(f"--compress {text}: use zstd or zstd:1 to zstd:{MAX_LEVEL}")
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads}: use 1 to {MAX_THREADS}")
    return Compression(level=level, threads=threads)


# A frame is closed at the end of the write that brings it to this length. A
# dense extent (3.6 MiB) is then a frame of its own, and jumping to any extent
# costs one such frame. Measured at level 3: 2 MiB frames are 0.9 % larger than
# 8 MiB ones, 4 MiB frames 0.3 %; the speed is the same.
FRAME_BYTES = 3 << 20
# Frames that wait for a thread or to be written, beyond one for each thread:
# enough that no thread stands still while a frame is being written.
_SPARE_FRAMES = 2


class ZstdOutput(OutputWrapper):
    """Compresses into another output.

    Each write must bring whole extents (or the header): frames are cut between
    writes. Memory: (threads + 3) frames, plain and compressed, of FRAME_BYTES
    and at most one write more each.
    """

    def __init__(self, inner: Output, compression: Compression) -> None:
        if not 1 <= compression.level <= MAX_LEVEL:
            raise UsageError(f"zstd levels are 1 to {MAX_LEVEL}, not {compression.level}")
        if compression.threads < 1:
            raise UsageError("compression needs at least one thread")
        super().__init__(inner)
        self._level = compression.level
        self._limit = compression.threads + _SPARE_FRAMES
        self._plain = bytearray()
        self._frames: deque[Future[tuple[bytes, int]]] = deque()
        self._table = array.array("I")
        self._thread = threading.local()
        _compressor(self._level)  # loads the library here, and not in the middle of a backup
        self._over = False
        self._pool = ThreadPoolExecutor(compression.threads, "zstd")

    def write(self, buffers: Buffers) -> None:
        self._check()
        # A copy, for the buffers belong to others again when we return.
        for buffer in buffers:
            self._plain += buffer
        if len(self._plain) >= FRAME_BYTES:
            self._close_frame()

    def commit(self) -> None:
        self._check()
        if self._plain:
            self._close_frame()
        while self._frames:
            self._write_frame()
        self._pool.shutdown()
        if sys.byteorder == "big":
            self._table.byteswap()
        head, foot = seek_table_ends(len(self._table) // 2)
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

    def _close_frame(self) -> None:
        plain, self._plain = self._plain, bytearray()
        self._frames.append(self._pool.submit(self._compress, plain))
        while len(self._frames) > self._limit or (self._frames and self._frames[0].done()):
            self._write_frame()

    def _compress(self, plain: bytearray) -> tuple[bytes, int]:
        compress: Callable[[bytearray], bytes] | None = getattr(self._thread, "compress", None)
        if compress is None:
            # One for each thread: it must not be shared, and making one is slow.
            compress = self._thread.compress = _compressor(self._level)
        return compress(plain), len(plain)

    def _write_frame(self) -> None:
        compressed, plain_bytes = self._frames.popleft().result()
        self._table.extend((len(compressed), plain_bytes))
        self._inner.write([compressed])


def _compressor(level: int) -> Callable[[bytearray], bytes]:
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
