# SPDX-License-Identifier: Apache-2.0
"""Digests as the manifest has them. The only file of this room that knows the blake3 library."""

from __future__ import annotations

import os
from collections.abc import Callable

from blake3 import blake3

from vmapipe.vma.manifest import EXTENT_DIGEST_BYTES

# One read of a whole file's digest: large enough for blake3's own threads.
_FILE_PIECE_BYTES = 8 << 20


def extent_digest(*parts: bytes | memoryview) -> bytes:
    """BLAKE3, 128 bits, of the parts in order. Other threads run meanwhile."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest(length=EXTENT_DIGEST_BYTES)


def file_digest(path: str, check: Callable[[], None]) -> tuple[int, bytes]:
    """(size in bytes, BLAKE3-256) of a whole file; `check` is called now and then. OSError."""
    hasher = blake3(max_threads=blake3.AUTO)
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
