# SPDX-License-Identifier: Apache-2.0
"""Two system calls that Python's `os` does not have, through the C library."""

from __future__ import annotations

import functools
import os
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


def rename_noreplace(source: str, target: str) -> None:
    """Rename, or raise FileExistsError. OSError where the file system cannot (EINVAL, ENOSYS)."""
    if _libc().renameat2(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
    ):
        raise _os_error()


def _os_error() -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
