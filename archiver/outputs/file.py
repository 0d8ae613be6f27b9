# SPDX-License-Identifier: Apache-2.0
"""A file that appears under its name when it is complete and on disk, and not before.

It is NAME.partial meanwhile, and locked (flock) by its one writer; the kernel releases
the lock when the writer dies, however that happens. So a .partial that is locked is being
written, and one that is not is a leftover. A leftover is removed, never written into: it may
have another owner, other permissions, or another name by which it is still read. Why it is
not a file without a name: docs/decisions/0023-partial-names.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence

from vmapipe.archiver.outputs import file
from vmapipe.archiver.outputs.base import (
    Buffers,
    DescriptorOutput,
    OutputFailure,
    WriteBehind,
    open_failure,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.folders import NO_LINKS, HeldFolder
from vmapipe.runtime.syscalls import write_at

# linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_FICLONERANGE = 0x4020940D
_NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ETXTBSY)
# Two file systems, one that cannot, a sandbox that forbids; and EIO, which may be the other file's.
_NO_COPIES = (*_NO_CLONES, errno.ENOSYS, errno.EIO)
# A shared range is a piece more in the file system's lists: less than a cluster is not worth it.
_WORTH_SHARING_BYTES = 60 << 10
# Of what was left, at a time.
_READ_BYTES = 1 << 20
# Often enough looked whether it is still wanted.
_COPY_BYTES = 64 << 20


class FileOutput(DescriptorOutput):
    """Written as NAME.partial beside NAME, locked, and given its name at the commit.

    `replace`: a file of that name may exist and is replaced in one step. For
    archives it is off: a backup never takes another one's place. `resume`: what an earlier
    writer of the same bytes has left is kept (`kept_bytes` of it), to be compared and gone on with,
    and what is written now stays as .partial when the writing is given up.
    """

    is_stream = False

    def __init__(
        self,
        path: str,
        *,
        cancel: Cancel | None = None,
        replace: bool = False,
        resume: bool = False,
    ) -> None:
        self._path = path
        self._resume = resume
        self._replace = replace
        self._has_name = False
        # Which file it was, once it is closed.
        self._status: os.stat_result | None = None
        folder, self._name = os.path.split(path)
        if self._name in ("", ".", ".."):
            raise UsageError(f"{path!r} is not a valid name for a file")
        self._partial = self._name + file.SUFFIX
        try:
            self._folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise open_failure("open the folder of", path, error) from error
        try:
            fd = file.claim(self._folder_fd, self._partial, path, resume=resume)
        except BaseException:
            os.close(self._folder_fd)
            raise
        super().__init__(fd, path, cancel)
        #: Bytes that an earlier writer has left; whoever writes next writes behind them.
        self.kept_bytes = self.written_bytes = os.lseek(fd, 0, os.SEEK_END)
        self._write_behind = WriteBehind(fd)
        self._block_bytes = os.fstatvfs(fd).f_frsize
        #: As far as it is known, its file system lets files share blocks.
        self.clones = True
        #: Bytes that it has in common with another file.
        self.shared_bytes = 0
        # Only now: while we have the lock, no other vmapipe gives a file this name.
        try:
            self._check_name()
        except BaseException:
            self.abandon()
            raise

    def write_shared(self, buffers: Buffers, places: Sequence[int], fd: int) -> None:
        """As `write`; where a buffer is what another file has at a place (-1: nowhere), share its blocks.

        So on XFS and btrfs, for whole blocks at places that fit; elsewhere all is written.
        """
        self._exclusively(self._write_shared, buffers, places, fd)

    def _write_shared(self, buffers: Buffers, places: Sequence[int], fd: int) -> None:
        todo: list[bytes | memoryview] = []
        block, at = self._block_bytes, self.written_bytes
        for buffer, place in zip(buffers, places, strict=True):
            # What of it is whole blocks here.
            start, stop = -at % block, (at + len(buffer)) // block * block - at
            fits = place >= 0 and (at - place) % block == 0 and stop - start >= _WORTH_SHARING_BYTES
            if fits and self.clones:
                view = memoryview(buffer)
                self._write_all([*todo, view[:start]])
                if self._clone(fd, place + start, stop - start, at + start):
                    os.lseek(self._fd, stop - start, os.SEEK_CUR)
                    self.written_bytes += stop - start
                    self.shared_bytes += stop - start
                    start = stop
                todo = [view[start:]]
            else:
                todo.append(buffer)
            at += len(buffer)
        self._write_all(todo)

    def _clone(self, fd: int, source_at: int, length: int, at: int) -> bool:
        """False: this file system, or this pair of files, cannot."""
        try:
            fcntl.ioctl(self._fd, _FICLONERANGE, struct.pack("qQQQ", fd, source_at, length, at))
        except OSError as error:
            if error.errno not in _NO_CLONES:
                raise
            self.clones = False
        return self.clones

    def kept(self) -> Iterator[bytes]:
        """Yield what an earlier writer has left, to its end. Raises OutputFailure."""
        at = 0
        while at < self.kept_bytes:
            self._interrupt.check()
            try:
                piece = os.pread(self._fd, min(_READ_BYTES, self.kept_bytes - at), at)
            except OSError as error:
                raise self._failure(error) from error
            if not piece:
                raise OutputFailure(
                    f"{self._path}{file.SUFFIX} is shorter than it was a moment ago"
                )
            yield piece
            at += len(piece)

    def start_anew(self) -> None:
        """Forget what was written, and what was left: it is not what was meant. Raises OutputFailure."""
        self._exclusively(self._start_anew)

    def _start_anew(self) -> None:
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.kept_bytes = self.written_bytes = 0

    def spoil(self) -> None:
        """Let nobody go on with it."""
        self._resume = False

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write at any place. Raises OutputFailure."""
        self._exclusively(self._write_at, data, offset)

    def _write_at(self, data: bytes | memoryview, offset: int) -> None:
        self._interrupt.check()
        write_at(self._fd, memoryview(data), offset)

    def extend(self, length: int) -> None:
        """Let it be so long, with zeroes where nothing was written. Raises OutputFailure."""
        self._exclusively(lambda: os.ftruncate(self._fd, length))

    def copy_from(self, fd: int, length: int) -> bool:
        """Begin with the first `length` bytes of another file; False: the kernel does not copy (all of) them.

        Raises OutputFailure.
        """
        copied = False

        def copy() -> None:
            nonlocal copied
            copied = self._copy_from(fd, length)

        self._exclusively(copy)
        return copied

    def _copy_from(self, fd: int, length: int) -> bool:
        at = 0
        while at < length:
            self._interrupt.check()
            try:
                got = os.copy_file_range(fd, self._fd, min(_COPY_BYTES, length - at), at, at)
            except OSError as error:
                if error.errno not in _NO_COPIES:
                    raise
                return False
            if not got:
                return False
            at += got
        return True

    def _complete(self) -> None:
        os.fsync(self._fd)
        # What a close would report (lost writes, on network file systems) is wanted before the
        # file has its name: then the archive is there, and a failure would be wrong.
        os.close(os.dup(self._fd))
        self._interrupt.check()
        self._give_name()
        self._has_name = True
        sync_folder(self._folder_fd)

    def _give_name(self) -> None:
        folder = self._folder_fd
        if self._replace:
            os.replace(self._partial, self._name, src_dir_fd=folder, dst_dir_fd=folder)
            return
        try:
            # Unlike rename, link never takes the place of a file that exists.
            os.link(self._partial, self._name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError as error:
            raise exists_failure(self._path) from error
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # The moment between the look and the rename is open to others.
            self._check_name()
            os.rename(self._partial, self._name, src_dir_fd=folder, dst_dir_fd=folder)
            return
        # With both names the archive is complete; a .partial that stays does no harm.
        with contextlib.suppress(OSError):
            os.unlink(self._partial, dir_fd=folder)

    def _check_name(self) -> None:
        """Raises OutputFailure when something has the name that may not be replaced."""
        try:
            status = os.stat(self._name, dir_fd=self._folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not self._replace:
            raise exists_failure(self._path)
        if not stat.S_ISREG(status.st_mode):
            text = f"{self._path} is not a file, and in the way of one: remove it"
            raise OutputFailure(text, target=self._path, errno=errno.EEXIST)

    def _discard(self) -> None:
        # The name first: once .partial is gone, the next backup may begin.
        names = [self._name] if self._has_name else []
        if not self._resume:
            names.append(self._partial)
        for name in names:
            self._remove(name)

    def _abort_without_lock(self) -> None:
        # A disk that hangs may still do this much; if not, the next backup
        # of this name removes the file.
        if not self._resume:
            self._remove(self._partial)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder_fd)

    def _close(self) -> None:
        self._status = os.fstat(self._fd) if self._fd >= 0 else self._status
        if self._folder_fd >= 0:
            folder_fd, self._folder_fd = self._folder_fd, -1
            os.close(folder_fd)
        try:
            super()._close()
        except OSError:
            # Complete, on the disk and under its name; see `_complete`.
            if not self._has_name:
                raise

    def withdraw(self) -> None:
        """Take it back after its commit, if the file of that name is still this one. Never raises."""
        with contextlib.suppress(OSError), HeldFolder(os.path.dirname(self._path)) as folder:
            now = folder.status(self._name)
            if now and self._status and os.path.samestat(now, self._status):
                os.unlink(self._name, dir_fd=folder.fd)


def remove_leftover(path: str) -> None:
    """Remove NAME.partial of a writer that was killed, if no process writes it. Never raises."""
    with contextlib.suppress(Failure, OSError):
        if os.path.lexists(path + file.SUFFIX):
            # Claiming the name removes a leftover; abandoning removes the claimed file again.
            FileOutput(path, replace=True).abandon()


def exists_failure(path: str) -> OutputFailure:
    text = f"{path} exists; vmapipe does not overwrite archives: remove it or choose another name"
    return OutputFailure(text, target=path, errno=errno.EEXIST)


def sync_folder(folder_fd: int) -> None:
    """Bring the names in a folder to the disk. Raises OSError."""
    try:
        os.fsync(folder_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to do there
            raise


SUFFIX = ".partial"
# Disks hold passwords and keys: only the owner may read a backup. Whoever
# wants to share it can chmod the finished file; the umask may take more away.
MODE = 0o600
# Each turn of the loop means that another process did something between two
# of our calls. So often in a row it is no chance any more.
_TRIES = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class _LockedError(Exception):
    """Another process has the lock."""


def claim(folder_fd: int, name: str, path: str, *, resume: bool = False) -> int:
    """Create `name` in the folder and lock it; return its descriptor.

    `resume`: a leftover is taken as it is, if it is ours, has no other name, and nobody else can read it.

    Raises OutputFailure, naming `path`, when another process is writing it or
    the folder cannot be written.
    """
    try:
        for _ in range(_TRIES):
            fd = (_take_leftover(folder_fd, name) if resume else None) or _create(
                folder_fd, name, os.O_RDWR if resume else os.O_WRONLY
            )
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


def _take_leftover(folder_fd: int, name: str) -> int | None:
    """None where there is none that may be gone on with. Raises _LockedError."""
    try:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=folder_fd)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        alone = ours and status.st_nlink == 1 and not status.st_mode & 0o077
        if alone and _lock(fd) and _has_name(fd, folder_fd, name):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _create(folder_fd: int, name: str, access: int) -> int | None:
    flags = access | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
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
    text = f"{path}{SUFFIX} is not a file of vmapipe; remove it or choose another name"
    return OutputFailure(text, target=path, errno=errno.EEXIST)
