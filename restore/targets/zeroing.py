# SPDX-License-Identifier: Apache-2.0
"""Makes ranges of a target read as zero: by hole if it can, else by writing zeroes."""

from __future__ import annotations

import errno
import mmap
import os

from vmapipe.runtime.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)

# Below this, writing zeroes is quicker than changing the file's extents.
RANGE_BYTES = 64 * 1024
_ZEROES_BYTES = 1 << 20
# Not supported here; EINVAL: a block device's sectors are larger than the range's ends.
_TRY_ANOTHER_WAY = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


def zero_pages() -> memoryview:
    """1 MiB of zeroes that costs next to no memory (all of it is one page)."""
    return memoryview(mmap.mmap(-1, _ZEROES_BYTES, prot=mmap.PROT_READ))


class Zeroer:
    """Zeroes ranges of one descriptor, a file's or a block device's.

    Neighbouring ranges that come one after the other are merged; `flush` at
    the end. OSError carries no offset: `at` tells where it happened.
    """

    def __init__(self, fd: int, zeroes: memoryview) -> None:
        self.at = 0
        self._fd = fd
        self._zeroes = zeroes
        self._start = self._end = 0
        # A hole gives the storage back. A block device that cannot discard
        # still zeroes quicker itself than through us.
        self._modes = [
            FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
        ]

    def add(self, offset: int, length: int) -> None:
        """Zero these bytes now or at the next `flush`. Raises OSError."""
        if offset != self._end:
            self.flush()
            self._start = offset
        self._end = offset + length

    def flush(self) -> None:
        start, end = self._start, self._end
        self._start = self._end = 0
        if start < end:
            self.at = start
            self._zero(start, end)

    def _zero(self, start: int, end: int) -> None:
        while self._modes and end - start >= RANGE_BYTES:
            try:
                fallocate(self._fd, self._modes[0], start, end - start)
                return
            except OSError as error:
                if error.errno not in _TRY_ANOTHER_WAY:
                    raise
                if error.errno == errno.EINVAL:
                    break  # for this range only
                self._modes.pop(0)
        while start < end:
            self.at = start
            start += os.pwrite(self._fd, self._zeroes[: end - start], start)
