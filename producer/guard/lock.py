# SPDX-License-Identifier: Apache-2.0
"""Keeps two programs from writing to one image: the lock bytes that QEMU uses as well.

QEMU takes shared OFD locks on byte 100+N of an image for each permission N
that it has, and on byte 200+N for each that others must not have; who opens
the image looks whether anybody holds the opposite byte (QEMU's
block/file-posix.c; the permissions are in include/block/block-common.h).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

# linux/fcntl.h; Python's fcntl has them from 3.13 on.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
# struct flock on 64-bit Linux: type, whence, start, length, pid, and padding.
_FLOCK = struct.Struct("hhqqi4x")

_HELD_BASE = 100
_DENIED_BASE = 200
_CONSISTENT_READ = 0
_WRITE = 1
_RESIZE = 3
_HELD = (_CONSISTENT_READ, _WRITE)
_DENIED = (_WRITE, _RESIZE)


def lock_for_writing(fd: int) -> None:
    """Hold the image for as long as `fd` is open. Raises BlockingIOError when somebody else does.

    File systems without such locks are let be: there is then no protection.
    """
    try:
        for held in _HELD:
            _lock(fd, _HELD_BASE + held)
        for denied in _DENIED:
            _lock(fd, _DENIED_BASE + denied)
        taken = [_DENIED_BASE + held for held in _HELD] + [
            _HELD_BASE + denied for denied in _DENIED
        ]
        busy = any(_is_locked(fd, byte) for byte in taken)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return
        raise
    if busy:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _lock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file holds the byte."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
