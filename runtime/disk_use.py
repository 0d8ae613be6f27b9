# SPDX-License-Identifier: Apache-2.0
"""Use of an image file or a block device by other programs and by the kernel; QEMU's locks on it.

Programs that take QEMU's locks are found by these (`lock_image`). Others have the file open
for writing, which the kernel tells by refusing a lease; a block device is asked for with
O_EXCL, and looked for in /sys, /proc/self/mountinfo and /proc/swaps. Who it is, is then
looked up for the message, as far as /proc lets us see.

The locks: QEMU takes shared OFD locks on byte 100+N of an image for each permission N that
it has, and on byte 200+N for each that others must not have; a program that opens the image
looks for a lock on the opposite byte (QEMU's block/file-posix.c; the permissions are in
include/block/block-common.h).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import stat
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from vmapipe.runtime.text import one_line

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
    """What a program does with an image, and what other programs must not do with it meanwhile."""

    held: tuple[int, ...]
    denied: tuple[int, ...]


#: A disk at rest is read: no program may write to it.
READING = Use((_CONSISTENT_READ,), (WRITE, _RESIZE))
#: A guest's disk is served: others may read, as far as they can cope with its changing.
SERVING = Use((_CONSISTENT_READ, WRITE), (WRITE, _RESIZE))
#: A disk is being overwritten: nothing in it can be used until that is done.
OVERWRITING = Use(
    (_CONSISTENT_READ, WRITE, _RESIZE), (_CONSISTENT_READ, WRITE, _WRITE_UNCHANGED, _RESIZE)
)


def lock_image(fd: int, use: Use) -> None:
    """Lock the image for as long as `fd` is open. Raises BlockingIOError when another program has.

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
        # Another program has locked a byte that we wanted to share, the whole file perhaps.
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
    """Return whether another open file holds the byte."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


# More names than these do not help.
_MAX_NAMED = 3
# A device of ours that is probed by another process of ours at the same moment is not in use.
_PROBES = 5
_PROBE_AGAIN_S = 0.05
# fdinfo: `lock:	1: OFDLCK  ADVISORY  READ -1 fe:01:1234 100 101`.
_LOCK = r"(?m)^lock:\s.*\s(\d+) (\d+|EOF)$"
_FLAGS = r"(?m)^flags:\s*([0-7]+)$"
_ESCAPED = r"\\([0-7]{3})"


class User(NamedTuple):
    """A process that has the file open; `writes`: for writing; `locks`: with locks as a disk has."""

    pid: int
    name: str
    writes: bool
    locks: bool

    def __str__(self) -> str:
        return f"{one_line(self.name)} (process {self.pid})"


def use_of(fd: int, path: str, *, writing: bool) -> str:
    """Return how others use the disk that `fd` has open, as text; empty: they do not. Raises OSError.

    `fd` is open for reading, or, where it is to be overwritten (`writing`), for both. On
    return the disk is locked against QEMU for as long as `fd` is open, if it is free.
    """
    status = os.fstat(fd)
    is_block = stat.S_ISBLK(status.st_mode)
    used = _use_of_device(status.st_rdev, writing) if is_block else _use_of_file(status)
    if used:
        return used
    try:
        lock_image(fd, OVERWRITING if writing else READING)
    except BlockingIOError:
        return _named(list(_users(status)), "it is locked by", locks=True)
    if is_block and not writing:
        used = _probed(path, status)
    elif not is_block and _is_open_for_writing(fd, status):
        used = _named([user for user in _users(status) if user.writes], "it is written to by")
    if is_block and not used:
        # A device that QEMU has open without locks is never refused.
        writers = [user for user in _users(status) if user.writes]
        used = _named(writers, "it is written to by") if writers else ""
    return used


def _named(users: list[User], what: str, *, locks: bool = False) -> str:
    """`what`, and the processes; of those with locks only these, if there are any."""
    users = [user for user in users if user.locks] or users if locks else users
    if not users:
        return f"{what} another program"
    names = ", ".join(map(str, users[:_MAX_NAMED]))
    more = len(users) - _MAX_NAMED
    return f"{what} {names}" + (f" and {more} more" if more > 0 else "")


# --- Files ---


def _use_of_file(status: os.stat_result) -> str:
    """A file that is a disk of the kernel's."""
    for loop in _loops(status):
        below = _use_of_device_number(_number(f"/sys/block/{loop}/dev"))
        return f"it is attached to /dev/{loop}" + (f", and {below}" if below else "")
    for path in _swaps():
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), status):
                return "it is used as swap space"
    return ""


def _is_open_for_writing(fd: int, status: os.stat_result) -> bool:
    """Return whether another open file of it is open for writing: the kernel then gives no lease.

    On NFS, FUSE, or as somebody who does not own the file, this cannot be known.
    """
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        # Our own descriptor would count; another one, for reading, is refused for the others'.
        kind = fcntl.F_WRLCK
    else:
        kind = fcntl.F_RDLCK
    try:
        # A program that opens it in this moment makes the kernel send a signal: one that is harmless.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            return False
        if kind == fcntl.F_RDLCK:
            return True
        # A lease for writing is refused for readers, too, which are not meant.
        return any(user.writes for user in _users(status))
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


# --- Block devices ---


def _use_of_device(rdev: int, writing: bool) -> str:
    """Return how the kernel uses a device: mounted, swap, held by another device, a loop's file."""
    used = _use_of_device_number(rdev, read_only_counts=writing)
    if used:
        return used
    for loop in _loops_on(rdev):
        return f"/dev/{loop} lies on it"
    return ""


def _use_of_device_number(rdev: int, *, read_only_counts: bool = True) -> str:
    for number, name in _with_partitions(rdev):
        itself = "it" if number == rdev else f"its partition /dev/{name}"
        if mounted := _mounted_at(number, read_only_counts=read_only_counts):
            return f"{itself} is mounted at {one_line(mounted)}"
        if any(_rdev(path) == number for path in _swaps()):
            return f"{itself} is used as swap space"
        if holders := _names(f"/sys/dev/block/{_text(number)}/holders"):
            held = ", ".join(_device_name(holder) for holder in holders[:_MAX_NAMED])
            return f"{itself} is held by {held}"
    return ""


def _with_partitions(rdev: int) -> Iterator[tuple[int, str]]:
    """The device and its partitions, with their names in /dev."""
    folder = os.path.realpath(f"/sys/dev/block/{_text(rdev)}")
    yield rdev, os.path.basename(folder)
    for name in _names(folder):
        if os.path.exists(f"{folder}/{name}/partition"):
            yield _number(f"{folder}/{name}/dev"), name


def _mounted_at(rdev: int, *, read_only_counts: bool) -> str:
    for line in _lines("/proc/self/mountinfo"):
        # 36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/sda1 rw,errors=continue
        before, dash, after = line.partition(" - ")
        fields, options = before.split(), after.split()
        if not dash or len(fields) < 5 or len(options) < 3:
            continue
        # btrfs has a number of its own, and names its device.
        if fields[2] != _text(rdev) and _rdev(_unescaped(options[1])) != rdev:
            continue
        if read_only_counts or "ro" not in options[2].split(","):
            return _unescaped(fields[4])
    return ""


def _probed(path: str, status: os.stat_result) -> str:
    """Probe a device that is only read by O_EXCL: it also finds users that /proc hides."""
    for number, _ in _with_partitions(status.st_rdev):
        if _mounted_at(number, read_only_counts=True):
            return ""  # read-only, as was looked up before
    for attempt in range(_PROBES):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
            return ""
        except OSError as error:
            if error.errno != errno.EBUSY:
                return ""
        if attempt < _PROBES - 1:
            time.sleep(_PROBE_AGAIN_S)
    return "it is mounted or held elsewhere"


def device_in_use(rdev: int) -> str:
    """Why the kernel refuses O_EXCL on a block device, as far as it can be seen."""
    return _use_of_device(rdev, writing=True) or "it is mounted or in use"


def _loops(status: os.stat_result) -> Iterator[str]:
    """The loop devices that have this file."""
    for loop, path in _loop_files():
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), status):
                yield loop


def _loops_on(rdev: int) -> Iterator[str]:
    for loop, path in _loop_files():
        if _rdev(path) == rdev:
            yield loop


def _loop_files() -> Iterator[tuple[str, str]]:
    for name in _names("/sys/block"):
        if name.startswith("loop"):
            for line in _lines(f"/sys/block/{name}/loop/backing_file"):
                yield name, line.removesuffix("\n")


def _device_name(name: str) -> str:
    """dm-3 is known to its owner as /dev/mapper/vg-lv."""
    for line in _lines(f"/sys/block/{name}/dm/name"):
        return one_line(f"/dev/mapper/{line.strip()}")
    return f"/dev/{name}"


def _swaps() -> list[str]:
    return [_unescaped(line.split()[0]) for line in _lines("/proc/swaps")[1:] if line.strip()]


# --- Processes ---


def _users(status: os.stat_result) -> Iterator[User]:
    """Other processes that have it open, as far as we may look at them."""
    is_block = stat.S_ISBLK(status.st_mode)
    for pid in filter(str.isdecimal, _names("/proc")):
        if int(pid) == os.getpid():
            continue
        user: User | None = None
        for fd in _names(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                there = os.stat(f"/proc/{pid}/fd/{fd}")
                if is_block:
                    same = stat.S_ISBLK(there.st_mode) and there.st_rdev == status.st_rdev
                else:
                    same = os.path.samestat(there, status)
                if same:
                    user = _joined(user, _user(pid, fd))
        if user is not None:
            yield user


def _user(pid: str, fd: str) -> User:
    info = "".join(_lines(f"/proc/{pid}/fdinfo/{fd}"))
    flags = re.search(_FLAGS, info)
    writes = flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
    locks = [int(found[1]) for found in re.finditer(_LOCK, info)]
    # Who has the byte of a disk's writer writes, whatever it has opened.
    writes = writes or HELD_BASE + WRITE in locks
    return User(int(pid), "".join(_lines(f"/proc/{pid}/comm")).strip(), writes, bool(locks))


def _joined(one: User | None, other: User) -> User:
    if one is None:
        return other
    return one._replace(writes=one.writes or other.writes, locks=one.locks or other.locks)


# --- What the kernel's files hold; those that are gone or hidden hold nothing ---


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.readlines()
    except OSError:
        return []


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _number(path: str) -> int:
    """A device's number from a file with `8:1`; 0 where it cannot be read."""
    for line in _lines(path):
        major, _, minor = line.strip().partition(":")
        with contextlib.suppress(ValueError):
            return os.makedev(int(major), int(minor))
    return 0


def _text(rdev: int) -> str:
    return f"{os.major(rdev)}:{os.minor(rdev)}"


def _rdev(path: str) -> int:
    """The number of the block device at a path; 0: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else 0


def _unescaped(text: str) -> str:
    """Spaces and the like are \\040 in these files."""
    return re.sub(_ESCAPED, lambda found: chr(int(found[1], 8)), text)
