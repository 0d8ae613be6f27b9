# SPDX-License-Identifier: Apache-2.0
"""Sends a growing file to the disk while it is written, and its pages out of memory."""

from __future__ import annotations

import os

# Measured with 2 GiB into new files: with these two numbers the write took
# 1.1 s together with its fsync and seldom more; left to the kernel 1.4 to 3.1 s,
# of which 0.4 to 0.7 s were the fsync. Pages that are given back are taken
# again for what follows, and pages that were used before are quicker than new
# ones. Steps of 8 MiB, or no second look, lost half of it.
STEP_BYTES = 32 << 20
# How far behind pages may still be on their way to the disk. A disk that is
# slower than that loses nothing: its pages stay in memory as usual.
LAG_BYTES = 256 << 20


class WriteBehind:
    """Tell it how long the file is; `start` is where the archive begins in it, in bytes."""

    def __init__(self, fd: int, start: int = 0) -> None:
        self._fd = fd
        self._start = start
        self._next = start + STEP_BYTES
        self._works = True

    def reached(self, position: int) -> None:
        """The file is written up to `position`, in bytes."""
        if position < self._next or not self._works:
            return
        self._next = position + STEP_BYTES
        begin = max(self._start, position - LAG_BYTES)
        try:
            # DONTNEED starts writing dirty pages and drops clean ones. The
            # guests' page cache is worth more than that of an archive.
            os.posix_fadvise(self._fd, begin, position - begin, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._works = False  # a file system without it: only slower
