# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's `os` does not have, through the C library."""

from __future__ import annotations

import errno
import functools
import os
import platform
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
# linux/fs.h and fcntl.h
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
# linux/openat2.h: struct open_how is flags, mode, resolve. The number is everywhere the same.
_OPENAT2 = 437
_OPEN_HOW = struct.Struct("=QQQ")
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
# sched_setattr has no function in the C library of Debian 12. asm/unistd.h.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
# struct sched_attr, first version (linux/sched/types.h): size, policy, flags,
# nice, priority, and runtime, deadline, period in nanoseconds.
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes  # here: few processes need it

    libc = ctypes.CDLL(None, use_errno=True)
    # off64_t on every architecture, unlike off_t.
    libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.renameat2.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )
    return libc


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); sizes in bytes. Raises OSError."""
    if _libc().fallocate64(fd, mode, offset, length):
        raise _os_error()


def rename_noreplace(source: str, target: str, folder_fd: int = _AT_FDCWD) -> None:
    """Rename, or raise FileExistsError. OSError where the file system cannot (EINVAL, ENOSYS).

    Both are relative to the folder with the descriptor `folder_fd`.
    """
    if _libc().renameat2(
        folder_fd, os.fsencode(source), folder_fd, os.fsencode(target), _RENAME_NOREPLACE
    ):
        raise _os_error()


def openat2(folder_fd: int, path: str, flags: int, mode: int, resolve: int) -> int:
    """openat2(2): a descriptor, under the rules of `resolve`. Raises OSError (ENOSYS: no such call)."""
    how = _OPEN_HOW.pack(flags, mode, resolve)
    fd = _libc().syscall(_OPENAT2, folder_fd, os.fsencode(path), how, len(how))
    if fd < 0:
        raise _os_error()
    return int(fd)


def set_time_slice(policy: int, nice: int, slice_ns: int) -> None:
    """Of this thread, and those that it will start. Raises OSError where that is not known.

    Linux before 6.12 takes the call and has no slices of one's own.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, policy, 0, nice, 0, slice_ns, 0, 0)
    if _libc().syscall(number, 0, attributes, 0):
        raise _os_error()


def _os_error() -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
