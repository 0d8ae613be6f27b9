# SPDX-License-Identifier: Apache-2.0
"""Small files beside the work: logs, notes, metrics, rules, configurations, manifests.

Whoever can put a file beside ours can put a FIFO there, a device or a link: opening one
must neither wait nor lead elsewhere. Every function raises OSError, with words for the user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.folders import HeldFolder

#: Of a restore test's result, behind the archive's name. Here, so that who lists archives does not load all that
#: reads one.
DRILL_SUFFIX = ".drill.json"
_READ_BYTES = 1 << 16
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a link",
}


def open_regular(path: str) -> int:
    """A descriptor to read a regular file, and nothing else, from."""
    # NONBLOCK: a FIFO would wait for its writer, deaf to signals.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _refuse_others(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_awaited(path: str, limit_bytes: int, cancel: Cancel | None) -> bytes:
    """Read a file, or a pipe to its end; of more than `limit_bytes` the first so many.

    `cancel` ends the wait for its writer. Raises Cancelled, too.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if cancel is not None:
            poller.register(cancel.fd, select.POLLIN)
        found = b""
        while len(found) < limit_bytes:
            poller.poll()
            if cancel is not None:
                cancel.check()
            try:
                piece = os.read(fd, min(_READ_BYTES, limit_bytes - len(found)))
            except BlockingIOError:
                continue  # another reader was quicker
            if not piece:
                break
            found += piece
        return found
    finally:
        os.close(fd)


def read_keys(path: str, limit_bytes: int, cancel: Cancel | None) -> str:
    """Read a file of keys, or a pipe to its end, as text. Raises ValueError for a larger one, OSError, Cancelled."""
    raw = read_awaited(path, limit_bytes + 1, cancel)
    if len(raw) > limit_bytes:
        raise ValueError(f"it has more than {limit_bytes} bytes")
    return raw.decode("utf-8", "replace")


def open_new(path: str, mode: int = 0o666) -> int:
    """A descriptor to write a new file to; nothing may have its name. The umask counts."""
    with HeldFolder(os.path.dirname(path)) as folder:
        return folder.open(os.path.basename(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def open_to_append(path: str, mode: int = 0o666) -> int:
    """A descriptor to write to the end of a file, which is made if it is not there; links as for `open_to_change`."""
    return _open_or_make(path, os.O_WRONLY | os.O_APPEND, mode)


def open_to_change(path: str, mode: int = 0o600) -> int:
    """A descriptor to read and write a file, which is made if it is not there.

    A link is followed only where nobody but root and us can have put it; a file that has
    other names only where nobody else can have given it this one.
    """
    return _open_or_make(path, os.O_RDWR, mode)


def _open_or_make(path: str, flags: int, mode: int) -> int:
    flags |= os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY
    place, name = os.path.split(path)
    with HeldFolder(place) as folder:
        status = folder.status(name)
        if status and stat.S_ISLNK(status.st_mode):
            if status.st_uid not in (0, os.geteuid()) or folder.changeable_by_others():
                raise _refusal(errno.ELOOP, f"it is a link that another user may have made: {path}")
            fd = os.open(path, flags | os.O_CLOEXEC, mode)
        else:
            fd = folder.open(name, flags, mode)
        try:
            status = os.fstat(fd)
            if not stat.S_ISCHR(status.st_mode):
                _refuse_others(status, path)
            if status.st_nlink > 1 and folder.changeable_by_others():
                raise _refusal(
                    errno.EMLINK,
                    f"the file has another name, too, and may be somebody else's: {path}",
                )
        except BaseException:
            os.close(fd)
            raise
    return fd


def write_whole(path: str, data: bytes, mode: int) -> None:
    """Write a file in one step: who reads it at any moment sees all of it, or what was there before.

    A link or a FIFO of that name goes; what it leads to stays as it is.
    """
    place, name = os.path.split(path)
    with HeldFolder(place) as folder:
        # Under no name that a program looks for before it is whole.
        partial = f".{name.partition('.')[0][:100]}.{os.urandom(4).hex()}"
        fd = folder.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, mode)
                os.fsync(fd)
            folder.replace(partial, name)
            folder.sync()
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder.fd)
            raise


def _refuse_others(status: os.stat_result, path: str) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "something else")
        raise _refusal(errno.EINVAL, f"it is {what}, not a regular file: {path}")


def _refusal(number: int, text: str) -> OSError:
    return OSError(number, text)
