# SPDX-License-Identifier: Apache-2.0
"""Digests as the manifest has them. The only file of this room that knows the xxhash library."""

from __future__ import annotations

import os
from collections.abc import Callable

from xxhash import xxh3_128

# One read of a whole file's digest: more at once is not quicker.
_FILE_PIECE_BYTES = 1 << 20


def extent_digest(*parts: bytes | memoryview) -> bytes:
    """XXH3, 128 bits, of the parts in order."""
    hasher = xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def file_digest(path: str, check: Callable[[], None]) -> tuple[int, bytes]:
    """(size in bytes, XXH3-128) of a whole file; `check` is called now and then. OSError."""
    hasher = xxh3_128()
    buffer = bytearray(_FILE_PIECE_BYTES)
    view = memoryview(buffer)
    size_bytes = 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while got := file.readinto(buffer):
            hasher.update(view[:got])
            size_bytes += got
            check()
    return size_bytes, hasher.digest()
