# SPDX-License-Identifier: Apache-2.0
"""Keeps two programs from using one image against each other: the lock bytes that QEMU uses as well.

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
from typing import NamedTuple

# linux/fcntl.h; Python's fcntl has them from 3.13 on.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
# struct flock on 64-bit Linux: type, whence, start, length, pid, and padding.
_FLOCK = struct.Struct("hhqqi4x")

HELD_BASE = 100
_DENIED_BASE = 200
_CONSISTENT_READ = 0
WRITE = 1
_WRITE_UNCHANGED = 2
_RESIZE = 3
# As QEMU's locking=auto: a file system without such locks (NFS without lockd) is let be.
_NO_LOCKS = frozenset({errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


class Use(NamedTuple):
    """What one does with an image, and what others must not do with it meanwhile."""

    held: tuple[int, ...]
    denied: tuple[int, ...]


#: A disk at rest is read: nobody may write to it.
READING = Use((_CONSISTENT_READ,), (WRITE, _RESIZE))
#: A guest's disk is served: others may read, as far as they can cope with its changing.
SERVING = Use((_CONSISTENT_READ, WRITE), (WRITE, _RESIZE))
#: A disk is being overwritten: there is nothing in it for anybody until that is done.
OVERWRITING = Use(
    (_CONSISTENT_READ, WRITE, _RESIZE), (_CONSISTENT_READ, WRITE, _WRITE_UNCHANGED, _RESIZE)
)


def lock_image(fd: int, use: Use) -> None:
    """Hold the image for as long as `fd` is open. Raises BlockingIOError when somebody else does.

    `fd` must be open for reading (a shared lock asks for it). File systems without such
    locks are let be: there is then no protection.
    """
    try:
        for held in use.held:
            _lock(fd, HELD_BASE + held)
        for denied in use.denied:
            _lock(fd, _DENIED_BASE + denied)
        taken = [_DENIED_BASE + held for held in use.held]
        taken += [HELD_BASE + denied for denied in use.denied]
        busy = any(_is_locked(fd, byte) for byte in taken)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        # Somebody has locked a byte that we wanted to share, the whole file perhaps.
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        busy = True
    if busy:
        unlock_image(fd)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def unlock_image(fd: int) -> None:
    """Give back what `lock_image` took. Raises OSError."""
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, HELD_BASE, 200, 0))


def _lock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file holds the byte."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
