# SPDX-License-Identifier: Apache-2.0
"""`vmapipe` on a disk that has lost sectors: python -m tests.restore.lost_sectors FILE AT,AT… COMMAND…

Reading those sectors of FILE fails with EIO, in this process and in those that it forks. It is a
program because a process with threads, as pytest may be, does not fork.
"""

from __future__ import annotations

import errno
import os
import sys

from vmapipe.control.main import main
from vmapipe.restore.verify import compare

SECTOR_BYTES = 4096


def lose(path: str, places: list[int]) -> None:
    pread, preadv, inode = os.pread, os.preadv, os.stat(path).st_ino

    def check(fd: int, length: int, offset: int) -> int:
        """How much there is before the next lost byte."""
        if os.fstat(fd).st_ino != inode:
            return length
        for at in places:
            if at <= offset < at + SECTOR_BYTES:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if offset < at < offset + length:
                length = at - offset
        return length

    def short_pread(fd: int, length: int, offset: int) -> bytes:
        return pread(fd, check(fd, length, offset), offset)

    def short_preadv(fd: int, views: list[memoryview], offset: int) -> int:
        (view,) = views
        return preadv(fd, [view[: check(fd, len(view), offset)]], offset)

    os.pread = short_pread
    os.preadv = short_preadv  # type: ignore[assignment]
    # It would map the file, whose reading cannot be made to fail here.
    setattr(compare, "can_fork", lambda: False)  # noqa: B010  not one of its own names


if __name__ == "__main__":
    lose(sys.argv[1], [int(word) for word in sys.argv[2].split(",")])
    sys.exit(main(sys.argv[3:]))
