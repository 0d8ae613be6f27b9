# SPDX-License-Identifier: Apache-2.0
"""Opens what is restored to: new files, which appear when they are complete, and existing ones."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat

from vmapipe.restore.errors import TargetError
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.syscalls import rename_noreplace
from vmapipe.vma.layout import TARGET_SLACK_BYTES

# A disk holds all that the machine knows: not for other users, unless its owner says so.
_MODE = 0o600
# linux/fs.h
_BLKROGET = 0x125E
# What a file system says that has no files without a name, or no links.
_NO_UNNAMED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_NOREPLACE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class NewFile:
    """A file that has no name until it is published, or, where that cannot be, another one.

    A file without a name is gone whatever happens to us. Elsewhere (NFS, FUSE)
    `partial` is the path of a hidden file beside the target.
    """

    def __init__(self, path: str) -> None:
        """Raises TargetError, also when something of that name exists."""
        self.path = path
        self.partial = ""
        self._published = False
        folder, self._name = os.path.split(path)
        self._folder = folder or "."
        if os.path.lexists(path):
            raise TargetError(f"{path} exists already and is not overwritten")
        try:
            self.fd = self._open_unnamed()
        except OSError as error:
            raise TargetError(f"cannot create {path}: {os_error_text(error)}") from error

    def _open_unnamed(self) -> int:
        with contextlib.suppress(OSError):
            fd = open_unnamed(self._folder)
            # Without /proc it could never get its name.
            if os.path.exists(f"/proc/self/fd/{fd}"):
                return fd
            os.close(fd)
        partial = os.path.join(self._folder, f".vmapipe-{secrets.token_hex(8)}.partial")
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        self.partial = partial
        return fd

    def set_size(self, size_bytes: int) -> None:
        try:
            os.ftruncate(self.fd, size_bytes)
        except OSError as error:
            raise TargetError(
                f"cannot make {self.path} {size_bytes} bytes long: {os_error_text(error)}"
            ) from error

    def publish(self) -> None:
        """Give it its name, which must still be free. The data must be on the disk."""
        try:
            if self.partial:
                self._publish_partial()
            else:
                self._publish_unnamed()
        except FileExistsError as error:
            raise TargetError(
                f"{self.path} has appeared meanwhile and is not overwritten"
            ) from error
        except OSError as error:
            raise TargetError(f"cannot name {self.path}: {os_error_text(error)}") from error
        self._published = True
        self.partial = ""

    def _publish_unnamed(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With a folder's descriptor Python calls linkat, which follows /proc's symlink.
            os.link(f"/proc/self/fd/{self.fd}", self._name, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def _publish_partial(self) -> None:
        try:
            os.link(self.partial, self.path)
            os.unlink(self.partial)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        try:
            rename_noreplace(self.partial, self.path)
            return
        except OSError as error:
            if error.errno not in _NO_NOREPLACE:
                raise
        # Neither links nor a safe rename (FAT): look, then rename.
        if os.path.lexists(self.path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path)
        os.rename(self.partial, self.path)

    def withdraw(self) -> None:
        """Another file of the same job could not be published: take this one back."""
        if self._published:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def close(self) -> None:
        """What was not published is gone."""
        os.close(self.fd)
        if self.partial:
            with contextlib.suppress(OSError):
                os.unlink(self.partial)
            self.partial = ""


def open_unnamed(folder: str) -> int:
    """A descriptor of a new file without a name. OSError where there is no such thing."""
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE)


class ExistingTarget:
    """An existing file or block device. What stands in it is overwritten in place."""

    partial = ""

    def __init__(self, path: str, device_name: str, size_bytes: int) -> None:
        """Raises TargetError when it does not fit a device of `size_bytes` bytes."""
        self.path = path
        self.fd = _open_existing(path)
        try:
            status = os.fstat(self.fd)
            is_block = stat.S_ISBLK(status.st_mode)
            if is_block:
                self._check_writable()
            self._check_size(device_name, size_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.identity = (
            ("block", status.st_rdev, 0) if is_block else ("file", status.st_dev, status.st_ino)
        )

    def _check_writable(self) -> None:
        """The kernel lets a read-only block device be opened, and refuses every write."""
        read_only = bytearray(4)
        fcntl.ioctl(self.fd, _BLKROGET, read_only)
        if any(read_only):
            raise TargetError(f"{self.path} is a read-only block device")

    def _check_size(self, device_name: str, size_bytes: int) -> None:
        there = os.lseek(self.fd, 0, os.SEEK_END)
        if size_bytes <= there <= size_bytes + TARGET_SLACK_BYTES:
            return
        relation = "smaller" if there < size_bytes else "more than 4 MiB larger"
        raise TargetError(
            f"{self.path} has {there} bytes, {relation} than device {device_name!r} with "
            f"{size_bytes} bytes",
            reference_text=(
                f"vma_reader_register_bs for stream {device_name} failed - "
                f"unexpected size {there} != {size_bytes}"
            ),
        )

    def close(self) -> None:
        os.close(self.fd)


def _open_existing(path: str) -> int:
    try:
        before = os.stat(path)
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK
        if stat.S_ISBLK(before.st_mode):
            # The kernel refuses it where the device is mounted or otherwise in use.
            flags |= os.O_EXCL
        elif not stat.S_ISREG(before.st_mode):
            raise TargetError(f"{path} is neither a file nor a block device")
        fd = os.open(path, flags)
    except OSError as error:
        in_use = ": it is mounted or in use" if error.errno == errno.EBUSY else ""
        raise TargetError(f"cannot write to {path}: {os_error_text(error)}{in_use}") from error
    after = os.fstat(fd)
    if stat.S_IFMT(after.st_mode) != stat.S_IFMT(before.st_mode):
        os.close(fd)
        raise TargetError(f"{path} was replaced while it was opened")
    return fd


def sync_folders(paths: list[str]) -> None:
    """Bring the names of these files to the disk. Raises TargetError."""
    for folder in {os.path.dirname(path) or "." for path in paths}:
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            # Some file systems know no fsync of a folder.
            if error.errno != errno.EINVAL:
                raise TargetError(
                    f"cannot sync the folder {folder}: {os_error_text(error)}"
                ) from error
