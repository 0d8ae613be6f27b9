# SPDX-License-Identifier: Apache-2.0
"""NAME.partial: one writer at a time, and what a crash left behind is in nobody's way.

The file is locked (flock) while it is written; the kernel gives the lock back
when the writer dies, however that happens. So a .partial that is locked is
being written, and one that is not is a leftover. A leftover is removed, never
written into: it may have another owner, other permissions, or another name by
which somebody still reads it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from vmapipe.archiver.outputs.errors import OutputFailure, open_failure

SUFFIX = ".partial"
# Disks hold passwords and keys: only the owner may read a backup. Whoever
# wants to share it can chmod the finished file; the umask may take more away.
MODE = 0o600
# Each turn of the loop means that another process did something between two
# of our calls. So often in a row it is no chance any more.
_TRIES = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class _LockedError(Exception):
    """Somebody else has the lock."""


def claim(folder_fd: int, name: str, path: str) -> int:
    """Create `name` in the folder and lock it; return its descriptor.

    Raises OutputFailure, naming `path`, when another process is writing it or
    the folder cannot be written.
    """
    try:
        for _ in range(_TRIES):
            fd = _create(folder_fd, name)
            if fd is None:
                _remove_leftover(folder_fd, name, path)
            elif _is_ours(fd, folder_fd, name):
                return fd
            else:
                os.close(fd)
    except _LockedError as error:
        raise _busy(path) from error
    except OSError as error:
        raise open_failure("create", path, error) from error
    raise _busy(path)


def _create(folder_fd: int, name: str) -> int | None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, MODE, dir_fd=folder_fd)
    except FileExistsError:
        return None


def _is_ours(fd: int, folder_fd: int, name: str) -> bool:
    """Lock a file that we created; whether it still has its name then.

    Somebody may have taken it for a leftover in the moment before the lock.
    """
    try:
        _lock(fd)
    except _LockedError:
        return False
    return _has_name(fd, folder_fd, name)


def _remove_leftover(folder_fd: int, name: str, path: str) -> None:
    """Raises _LockedError when it is none."""
    try:
        # Writable, because a lock on NFS asks for it; NONBLOCK, in case it is a FIFO.
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=folder_fd)
    except FileNotFoundError:
        return  # gone meanwhile
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _foreign(path) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _foreign(path)
        if not _lock(fd):
            text = (
                f"{path}{SUFFIX} exists, and this file system cannot tell whether it is being "
                f"written; remove it if no backup is running"
            )
            raise OutputFailure(text, target=path, errno=errno.EEXIST)
        if _has_name(fd, folder_fd, name):
            os.unlink(name, dir_fd=folder_fd)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """False where the file system has no locks. Raises _LockedError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _LockedError from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _has_name(fd: int, folder_fd: int, name: str) -> bool:
    try:
        named = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), named)


def _busy(path: str) -> OutputFailure:
    text = f"{path}: another backup is writing it; choose another name or wait for its end"
    return OutputFailure(text, target=path, errno=errno.EEXIST)


def _foreign(path: str) -> OutputFailure:
    text = f"{path}{SUFFIX} is no file of vmapipe; remove it or choose another name"
    return OutputFailure(text, target=path, errno=errno.EEXIST)
