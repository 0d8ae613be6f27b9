# SPDX-License-Identifier: Apache-2.0
"""Files that nobody can remove or change until a day that stands beside them: immutable, as by `chattr +i`.

Root can lift that, and so can prune when the day has come. In a store Object Lock does it, which binds root, too.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import stat
import time

from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder

# linux/fs.h
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_IMMUTABLE = 0x10
SUFFIX = ".lock.json"
_FORMAT = "vmapipe-lock"
_MAX_BYTES = 4096
_CANNOT = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
#: Immutable, and nothing says until when: whoever did it lifts it.
WITHOUT_END_S = 253_370_764_800.0


def check_folder(folder: str) -> None:
    """Check that files of this folder can be locked, by doing so. Raises Failure."""
    try:
        with HeldFolder(folder) as held:
            name, fd = held.make_locked(".vmapipe-lock-", "")
            try:
                _set(fd, on=True)
                _set(fd, on=False)
            finally:
                os.unlink(name, dir_fd=held.fd)
                os.close(fd)
    except OSError as error:
        raise Failure(
            f"--lock: files in {folder or '.'} cannot be made immutable: {_reason(error)}"
        ) from error


def _reason(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "that takes root, or CAP_LINUX_IMMUTABLE; start the service or the command with it"
    if error.errno in _CANNOT:
        return "its file system has no such flag; choose one that has (ext4, XFS, btrfs), or leave --lock out"
    return os_error_text(error)


def lock_files(archive: str, companions: list[str], until_s: float) -> None:
    """Lock an archive with what belongs to it, as far as that is there. Raises Failure."""
    folder, name = os.path.split(archive)
    record = {"format": _FORMAT, "version": 1, "until": int(until_s)}
    try:
        with HeldFolder(folder) as held:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(held.open(name + SUFFIX, flags), "wb") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            for each in [name + SUFFIX, *map(os.path.basename, companions), name]:
                _change(held, each, on=True)
    except OSError as error:
        raise Failure(f"{archive} is stored, and cannot be locked: {_reason(error)}") from error


def lock_beside(archive: str, names: list[str]) -> None:
    """Lock what has come beside an archive since that was locked, for as long. Raises Failure.

    Neither the mark by which it is protected nor when it was verified: both change.
    """
    folder = os.path.split(archive)[0]
    try:
        with HeldFolder(folder) as held:
            for each in map(os.path.basename, names):
                _change(held, each, on=True)
    except OSError as error:
        raise Failure(f"what stands beside {archive} cannot be locked: {_reason(error)}") from error


def _change(folder: HeldFolder, name: str, *, on: bool) -> None:
    """Raises OSError; what is not there is passed over."""
    with contextlib.suppress(FileNotFoundError):
        fd = folder.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _set(fd, on=on)
        finally:
            os.close(fd)


def _flags(fd: int) -> int:
    flags = array.array("l", [0])
    fcntl.ioctl(fd, _GET_FLAGS, flags)
    return flags[0] & 0xFFFFFFFF


def _set(fd: int, *, on: bool) -> None:
    flags = _flags(fd)
    wanted = flags | _IMMUTABLE if on else flags & ~_IMMUTABLE
    if wanted != flags:
        fcntl.ioctl(fd, _SET_FLAGS, array.array("l", [wanted]))


def _is_immutable(folder: HeldFolder, name: str) -> bool:
    """False, too, where that cannot be known: then nothing but the file system's refusal tells."""
    with contextlib.suppress(OSError):
        status = folder.status(name)
        if status is None or not stat.S_ISREG(status.st_mode):
            return False
        fd = folder.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return bool(_flags(fd) & _IMMUTABLE)
        finally:
            os.close(fd)
    return False


def locked_until(folder: HeldFolder, name: str) -> float:
    """Seconds since 1970; 0: it is not locked. Never raises.

    A record counts only if it is immutable itself: who could write it could remove the archive.
    """
    if not _is_immutable(folder, name):
        return 0.0
    return _recorded(folder, name) or WITHOUT_END_S


def _recorded(folder: HeldFolder, name: str) -> float:
    if not _is_immutable(folder, name + SUFFIX):
        return 0.0
    try:
        with open(folder.open(name + SUFFIX, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            record = json.loads(file.read(_MAX_BYTES))
        if record["format"] != _FORMAT:
            return 0.0
        return max(1.0, float(record["until"]))
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return 0.0


def lift(folder: HeldFolder, name: str) -> None:
    """Lift a lock that is over, from an archive and its companions alike. Raises OSError.

    The record goes with the archive: what stands beside it is unlocked as the archive is.
    """
    if not _is_immutable(folder, name):
        return
    until_s = locked_until(folder, name)
    if name.endswith(SUFFIX):
        until_s = _recorded(folder, name.removesuffix(SUFFIX)) or WITHOUT_END_S
    if until_s > time.time() and until_s != WITHOUT_END_S:
        raise OSError(errno.EPERM, "it is locked")
    _change(folder, name, on=False)
