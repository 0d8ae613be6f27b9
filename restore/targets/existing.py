# SPDX-License-Identifier: Apache-2.0
"""Existing files and block devices that are restored onto: they must fit, and nobody may use them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from vmapipe.restore.errors import PlanError, TargetError
from vmapipe.restore.mapping import IMAGE_FORMATS
from vmapipe.restore.plan import Larger, TargetSpec
from vmapipe.runtime.disk_use import device_in_use, use_of
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.image_format import format_of_content, format_of_name
from vmapipe.vma.header import Device
from vmapipe.vma.layout import TARGET_SLACK_BYTES

# linux/fs.h
_BLKROGET = 0x125E


#: Equal for two paths of one file, or of one block device.
Identity = tuple[str, int, int]


def identity_of(status: os.stat_result) -> Identity:
    if stat.S_ISBLK(status.st_mode):
        return "block", status.st_rdev, 0
    return "file", status.st_dev, status.st_ino


class ExistingTarget:
    """An existing file or block device. What stands in it is overwritten in place.

    It is locked as QEMU locks its disks, for as long as its descriptor is open.
    """

    def __init__(self, spec: TargetSpec, device: Device) -> None:
        """Raises TargetError when it is in use or does not fit, PlanError when it is something else."""
        self.path = spec.path
        self.fd = open_existing(spec.path)
        try:
            status = os.fstat(self.fd)
            is_block = stat.S_ISBLK(status.st_mode)
            check_free(self.fd, spec.path)
            if is_block:
                self._check_writable()
            self._check(spec, device, is_block=is_block)
        except BaseException:
            os.close(self.fd)
            raise
        self.identity = identity_of(status)

    def _check(self, spec: TargetSpec, device: Device, *, is_block: bool) -> None:
        """Raises TargetError, PlanError."""
        there = os.lseek(self.fd, 0, os.SEEK_END)
        if spec.image_format != "raw" and not spec.overwrite:
            self._check_content(spec.path, device.name, there)
        allowed = spec.larger is Larger.ALWAYS or (spec.larger is Larger.DEVICES and is_block)
        check_size(spec.path, device, there, larger=allowed, in_the_reference=spec.larger)

    def _check_content(self, path: str, name: str, size_bytes: int) -> None:
        """What is not a raw disk is not overwritten with one, unless that was said."""
        found = format_of_content(lambda at, length: os.pread(self.fd, length, at), size_bytes)
        promised = found.driver if found is not None else format_of_name(path)
        if found is None and not promised:
            return
        what = f"looks like {found.words}" if found is not None else f"is called {promised}"
        into = ""
        if promised in IMAGE_FORMATS:
            into = f", or {name}={path},format={promised} --overwrite to write into the image"
        raise PlanError(
            f"{path} {what}, and would be overwritten with raw bytes: if that is meant, say "
            f"{name}={path},format=raw (in a map: format=raw:), or --overwrite{into}"
        )

    def _check_writable(self) -> None:
        """The kernel lets a read-only block device be opened, and refuses every write."""
        read_only = bytearray(4)
        fcntl.ioctl(self.fd, _BLKROGET, read_only)
        if any(read_only):
            raise TargetError(f"{self.path} is a read-only block device")

    def close(self) -> None:
        os.close(self.fd)


def check_size(
    path: str, device: Device, there: int, *, larger: bool, in_the_reference: Larger
) -> None:
    """Raises TargetError when a target of `there` bytes does not fit a device."""
    size_bytes = device.size_bytes
    if there >= size_bytes and (larger or there <= size_bytes + TARGET_SLACK_BYTES):
        return
    relation, way_out = "smaller", ""
    if there >= size_bytes:
        relation = "more than 4 MiB larger"
        way_out = "; --allow-larger takes it, and leaves what is beyond as it is"
        if in_the_reference is Larger.NEVER:
            way_out = (
                "; `vmapipe restore --map` takes a larger block device, and with --allow-larger a "
                "larger file"
            )
    raise TargetError(
        f"{path} has {there} bytes, {relation} than device {device.name!r} with "
        f"{size_bytes} bytes{way_out}",
        reference_text=(
            f"vma_reader_register_bs for stream {device.name} failed - "
            f"unexpected size {there} != {size_bytes}"
        ),
    )


def check_free(fd: int, path: str) -> None:
    """Lock it. Raises TargetError when anybody else uses it as a disk."""
    try:
        used = use_of(fd, path, writing=True)
    except OSError as error:
        raise TargetError(f"cannot see whether {path} is in use: {os_error_text(error)}") from error
    if used:
        raise TargetError(
            f"{path} is in use: {used}; a restore would destroy what runs on it: end that first. "
            "Nothing was written"
        )


def open_existing(path: str) -> int:
    """A descriptor for reading and writing. Raises TargetError."""
    rdev = 0
    try:
        before = os.stat(path)
        # For reading, too: a lock like QEMU's asks for it, and what is there is looked at.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
        if stat.S_ISBLK(before.st_mode):
            # The kernel refuses it where the device is mounted or otherwise in use.
            flags |= os.O_EXCL
            rdev = before.st_rdev
        elif not stat.S_ISREG(before.st_mode):
            raise TargetError(f"{path} is neither a file nor a block device")
        fd = os.open(path, flags)
    except OSError as error:
        used = f": {device_in_use(rdev)}" if error.errno == errno.EBUSY and rdev else ""
        raise TargetError(f"cannot write to {path}: {os_error_text(error)}{used}") from error
    if not os.path.samestat(os.fstat(fd), before):
        os.close(fd)
        raise TargetError(f"{path} was replaced while it was opened")
    return fd
