# SPDX-License-Identifier: Apache-2.0
"""A file that appears under its name when it is complete and on disk, and not before."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from vmapipe.archiver.outputs import partial
from vmapipe.archiver.outputs.descriptor import DescriptorOutput
from vmapipe.archiver.outputs.errors import OutputFailure, open_failure
from vmapipe.archiver.outputs.output import Buffers
from vmapipe.archiver.outputs.writebehind import WriteBehind
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.folders import HeldFolder

# What file systems without hard links answer (vfat, exfat, some network and
# FUSE ones); EMLINK cannot happen to a file with one name, but costs nothing.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class FileOutput(DescriptorOutput):
    """Written as NAME.partial beside NAME, locked, and given its name at the commit.

    `replace`: a file of that name may exist and is replaced in one step. For
    archives it is off: a backup never takes another one's place.
    """

    is_stream = False

    def __init__(self, path: str, *, cancel: Cancel | None = None, replace: bool = False) -> None:
        self._path = path
        self._replace = replace
        self._has_name = False
        # Which file it was, once it is closed.
        self._status: os.stat_result | None = None
        folder, self._name = os.path.split(path)
        if self._name in ("", ".", ".."):
            raise UsageError(f"{path!r} is no name for a file")
        self._partial = self._name + partial.SUFFIX
        try:
            self._folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise open_failure("open the folder of", path, error) from error
        try:
            fd = partial.claim(self._folder_fd, self._partial, path)
        except BaseException:
            os.close(self._folder_fd)
            raise
        super().__init__(fd, path, cancel)
        self._write_behind = WriteBehind(fd)
        # Only now: while we have the lock, no other vmapipe gives a file this name.
        try:
            self._check_name()
        except BaseException:
            self.abandon()
            raise

    def write(self, buffers: Buffers) -> None:
        super().write(buffers)
        self._write_behind.reached(self.written_bytes)

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
            if error.errno not in _NO_LINKS:
                raise
            # The moment between the look and the rename is open to others.
            self._check_name()
            os.rename(self._partial, self._name, src_dir_fd=folder, dst_dir_fd=folder)
            return
        # With both names the archive is complete; a .partial that stays is in nobody's way.
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
            text = f"{self._path} is no file, and in the way of one: remove it"
            raise OutputFailure(text, target=self._path, errno=errno.EEXIST)

    def _discard(self) -> None:
        # The name first: once .partial is gone, the next backup may begin.
        names = [self._name] if self._has_name else []
        for name in [*names, self._partial]:
            self._remove(name)

    def _forsake(self) -> None:
        # A disk that hangs may still do this much; if not, the next backup
        # of this name removes the file.
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
    """Remove NAME.partial of a writer that was killed, if nobody writes it. Never raises."""
    with contextlib.suppress(Failure, OSError):
        if os.path.lexists(path + partial.SUFFIX):
            # Whoever claims the name removes what is left; and takes its own away again.
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
