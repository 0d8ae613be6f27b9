# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's `os` does not have, whole reads and writes, and waiting for descriptors.

The former go through the C library. The latter is poll(2) whatever the descriptors'
numbers are: `select.select()` cannot take one above 1023, so a process with that many
connections would end at its next wait. Nothing in this program calls that (`make lint`
sees to it)."""

from __future__ import annotations

import array
import errno
import functools
import math
import os
import select
import socket
import struct
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

# What the kernel says of sectors that a disk cannot give: those around them may be readable.
_SECTORS_LOST = frozenset(
    {errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ, errno.EBADMSG, errno.EUCLEAN}
)
# The page cache reads no less.
_LOST_BYTES = 4096

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
# linux/fs.h and fcntl.h
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
# sched_setattr has no function in the C library of Debian 12. asm/unistd.h.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
# malloc.h
_M_ARENA_MAX = -8
# struct sched_attr, first version (linux/sched/types.h): size, policy, flags,
# nice, priority, and runtime, deadline, period in nanoseconds.
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")


@functools.cache
def _libc() -> ctypes.CDLL:
    # Imported here: few processes call what is below, and it takes 2 ms of a start.
    import ctypes

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


def share_one_heap() -> None:
    """Have all threads take memory from one heap, those that have taken none yet; glibc's mallopt(3)."""
    mallopt = getattr(_libc(), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


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


def _read_or_lose(fd: int, block: memoryview, offset: int, lost: list[tuple[int, int]]) -> int:
    try:
        return os.preadv(fd, [block], offset)
    except OSError as error:
        if error.errno not in _SECTORS_LOST:
            raise
    if offset >= os.lseek(fd, 0, os.SEEK_END):
        return 0
    block[:] = bytes(len(block))
    if lost and sum(lost[-1]) == offset:
        lost[-1] = (lost[-1][0], lost[-1][1] + len(block))
    else:
        lost.append((offset, len(block)))
    return len(block)


def read_at(
    fd: int,
    view: memoryview,
    offset: int,
    failed: Callable[[int, OSError], Exception] | None = None,
    lost: list[tuple[int, int]] | None = None,
) -> int:
    """Fill `view` from `offset` on; returns how much there is, less only at the file's end.

    Raises OSError, or what `failed` makes of the offset that could not be read and the OSError.
    With `lost`, sectors that the disk has lost are zeroes instead, and are added there as
    (offset, length).
    """
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            if lost is not None and error.errno in _SECTORS_LOST:
                at = offset + done
                block = view[done : done + _LOST_BYTES - at % _LOST_BYTES]
                # Some file systems refuse a whole read for one sector in its middle.
                got = _read_or_lose(fd, block, at, lost)
                if not got:
                    break
                done += got
                continue
            if failed is None:
                raise
            raise failed(offset + done, error) from error
        if not got:
            break
        done += got
    return done


def try_read_at(fd: int, view: memoryview, offset: int) -> bool:
    """Fill `view` without waiting for a disk; False where that cannot be done, or has an error."""
    try:
        return os.preadv(fd, [view], offset, os.RWF_NOWAIT) == len(view)
    except OSError:
        return False


def read_exactly_at(fd: int, view: memoryview, offset: int, name: str) -> None:
    """Fill `view` from `offset` on. Raises OSError, also (EIO) where the file `name` ends before."""
    done = read_at(fd, view, offset)
    if done < len(view):
        raise OSError(errno.EIO, f"{name} ends at {offset + done}: it was cut from outside")


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def set_time_slice(policy: int, nice: int, slice_ns: int) -> None:
    """Set the time slice of this thread and of those it will start. Raises OSError where unknown.

    Linux before 6.12 takes the call and has no slices of one's own.
    """
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, policy, 0, nice, 0, slice_ns, 0, 0)
    if _libc().syscall(number, 0, attributes, 0):
        raise _os_error()


def _os_error() -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


# poll() takes milliseconds as an int; a longer wait begins anew where it matters.
_MAX_WAIT_S = 24 * 3600.0


def readable(fds: Collection[int], timeout_s: float | None = None) -> list[int]:
    """Return those of `fds` that can be read or have ended, as soon as one can; `timeout_s`: [].

    None waits without an end. A signal does not shorten the wait: watch a
    Cancel's descriptor with the others for that. Raises OSError for a descriptor
    that is not open.
    """
    return _ready(fds, select.POLLIN, timeout_s)


def writable(fd: int, timeout_s: float | None = None) -> bool:
    """Wait until a write would not block (it may fail); False after `timeout_s`, see `readable`."""
    return bool(_ready((fd,), select.POLLOUT, timeout_s))


def _ready(fds: Collection[int], event: int, timeout_s: float | None) -> list[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, event)
    if timeout_s is None or math.isinf(timeout_s):
        found = poller.poll()
    else:
        found = poller.poll(min(max(timeout_s, 0.0), _MAX_WAIT_S) * 1000)
    if any(events & select.POLLNVAL for _, events in found):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return [fd for fd, _ in found]


# Python's flags are enums, and joining two of them takes longer than a system call.
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))


def receive_fds(
    sock: socket.socket, size_bytes: int, max_fds: int, flags: int = 0
) -> tuple[bytes, list[int]]:
    """Do what `socket.recv_fds` does, which ignores its flags in Python 3.11. Raises OSError."""
    fds = array.array("i")
    space = socket.CMSG_SPACE(max_fds * fds.itemsize)
    packet, control, _, _ = sock.recvmsg(size_bytes, space, flags | _CLOSE_ON_EXEC)
    for level, kind, data in control:
        if (level, kind) == _RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds)
