# SPDX-License-Identifier: Apache-2.0
"""Digests as the manifest has them. The only file of this room that knows the xxhash library."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from xxhash import xxh3_128

# One read of a whole file's digest: more at once is not quicker.
_FILE_PIECE_BYTES = 1 << 20
# An extent in one go: with smaller pieces, threads wait for each other (Python's lock).
_PIECE_BYTES = 4 << 20
_buffers = threading.local()
Hasher = xxh3_128


class Readable(Protocol):
    """A file, or an input of ours."""

    def readinto(self, buffer: bytearray, /) -> int | None:
        """Fill it, as far as there is something; 0: the end."""


def extent_digest(*parts: bytes | memoryview) -> bytes:
    """XXH3, 128 bits, of the parts in order."""
    hasher = xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def read_digest(read_into: Callable[[memoryview, int], int], offset: int, length: int) -> bytes:
    """XXH3-128 of `length` bytes at `offset`, or of those that are there.

    Every thread has one buffer and keeps it: fresh memory for each extent
    would cost more than the reading.
    """
    view: memoryview | None = getattr(_buffers, "view", None)
    if view is None:
        view = _buffers.view = memoryview(bytearray(_PIECE_BYTES))
    hasher = xxh3_128()
    for at in range(0, length, _PIECE_BYTES):
        piece = view[: min(_PIECE_BYTES, length - at)]
        hasher.update(piece[: read_into(piece, offset + at)])
    return hasher.digest()


def file_digest(file: Readable, check: Callable[[], None]) -> tuple[int, bytes]:
    """(size in bytes, XXH3-128) of all that `file` gives; `check` is called now and then."""
    hasher = xxh3_128()
    buffer = bytearray(_FILE_PIECE_BYTES)
    view = memoryview(buffer)
    size_bytes = 0
    while got := file.readinto(buffer):
        hasher.update(view[:got])
        size_bytes += got
        check()
    return size_bytes, hasher.digest()
