# SPDX-License-Identifier: Apache-2.0
"""Existing files and block devices that are restored onto: they must fit, and nobody may use them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from vmapipe.restore.errors import TargetError
from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.layout import TARGET_SLACK_BYTES

# linux/fs.h
_BLKROGET = 0x125E


class ExistingTarget:
    """An existing file or block device. What stands in it is overwritten in place."""

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
    if not os.path.samestat(after, before):
        os.close(fd)
        raise TargetError(f"{path} was replaced while it was opened")
    return fd
