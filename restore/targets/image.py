# SPDX-License-Identifier: Apache-2.0
"""Images of formats other than raw, new and existing ones: written over NBD, through qemu-storage-daemon."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess

from vmapipe.restore.archive.errors import TargetError
from vmapipe.restore.targets.files import (
    Folders,
    NewFile,
    check_free,
    check_size,
    identity_of,
    open_existing,
)
from vmapipe.restore.targets.plan import Larger, TargetSpec
from vmapipe.runtime.disk_use import unlock_image
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.image_format import format_of_content, references
from vmapipe.runtime.storage_daemon import StorageDaemon, option_text
from vmapipe.runtime.text import name_text
from vmapipe.vma.header import Device

EXPORT = "disk"
_QEMU_IMG_S = 60.0
# What every format of QEMU's can hold.
_SECTOR_BYTES = 512


class Served:
    """An image by its descriptor, which qemu-storage-daemon serves to the workers."""

    def __init__(self, path: str, fd: int, image_format: str) -> None:
        """Raises TargetError."""
        self._path = path
        self._fd = fd
        driver = "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"
        try:
            self._daemon: StorageDaemon | None = StorageDaemon(
                path,
                "qemu-storage-daemon",
                lambda socket: [
                    *("--blockdev", f"driver={driver},node-name=file,filename={_place(fd)}"),
                    *("--blockdev", f"driver={image_format},node-name=image,file=file"),
                    *("--nbd-server", f"addr.type=unix,addr.path={option_text(socket)}"),
                    *("--export", f"type=nbd,id=e,node-name=image,name={EXPORT},writable=on"),
                ],
            )
        except Failure as error:
            raise TargetError(str(error)) from error

    @property
    def nbd(self) -> str:
        """The socket that workers connect to."""
        return self._daemon.socket if self._daemon is not None else ""

    def opened_files(self) -> list[str]:
        return self._daemon.opened_files() if self._daemon is not None else []

    def finish(self) -> None:
        """Bring what was written to the disk. Raises TargetError."""
        try:
            if self._daemon is not None:
                self._daemon.stop()
                self._daemon = None
            os.fsync(self._fd)
        except Failure as error:
            raise TargetError(str(error)) from error
        except OSError as error:
            raise TargetError(f"cannot write to {self._path}: {os_error_text(error)}") from error

    def close(self) -> None:
        if self._daemon is not None:
            self._daemon.close()
            self._daemon = None


class NewImage(NewFile):
    """A `NewFile` whose content is an image of `size_bytes` bytes; workers write to `served`."""

    def __init__(self, path: str, folders: Folders, image_format: str, size_bytes: int) -> None:
        """Raises TargetError."""
        super().__init__(path, folders)
        self.served: Served | None = None
        try:
            _create(path, _place(self.fd), image_format, size_bytes)
            self.served = Served(path, self.fd, image_format)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.served is not None:
            self.served.close()
        super().close()


class ExistingImage:
    """An image that exists, of a format other than raw: its disk is overwritten in place."""

    def __init__(self, spec: TargetSpec, device: Device) -> None:
        """Raises TargetError when it is in use, does not fit, or refers to other files."""
        self.path = spec.path
        self.fd = open_existing(spec.path)
        self.served: Served | None = None
        try:
            status = os.fstat(self.fd)
            check_free(self.fd, spec.path)
            # QEMU's programs lock it themselves, and would meet our own lock.
            unlock_image(self.fd)
            self._check(spec, device)
            self.served = Served(spec.path, self.fd, spec.image_format)
            self._refuse_other_files()
        except BaseException:
            self.close()
            raise
        self.identity = identity_of(status)

    def _check(self, spec: TargetSpec, device: Device) -> None:
        """Raises TargetError."""
        size_bytes = os.lseek(self.fd, 0, os.SEEK_END)
        found = format_of_content(self._read, size_bytes)
        if found is None or found.driver != spec.image_format:
            there = found.words if found is not None else "not an image of a format known here"
            raise TargetError(f"{spec.path} is to be a {spec.image_format} image, but is {there}")
        for reference in references(spec.image_format, self._read):
            raise TargetError(
                f"{spec.path} refers to another file, {reference}, which a restore into it would "
                "read or write: restore to a new image"
            )
        argv = ["info", "--output=json", "-f", spec.image_format, "--", _place(self.fd)]
        told = _qemu_img(spec.path, spec.image_format, argv, "cannot read")
        try:
            there_bytes = int(json.loads(told)["virtual-size"])
        except (ValueError, KeyError, TypeError) as error:
            raise TargetError(f"{spec.path}: qemu-img tells no size of it") from error
        larger = spec.larger is Larger.ALWAYS
        check_size(spec.path, device, there_bytes, larger=larger, in_the_reference=spec.larger)

    def _read(self, offset: int, length: int) -> bytes:
        # What an image says of offsets may be anything.
        return os.pread(self.fd, length, offset) if offset < 1 << 63 else b""

    def _refuse_other_files(self) -> None:
        """The image may have been changed since, or QEMU know more than we do. TargetError."""
        image = os.fstat(self.fd)
        for opened in self.served.opened_files() if self.served is not None else ():
            status = os.stat(opened)
            same_device = stat.S_ISBLK(status.st_mode) and status.st_rdev == image.st_rdev
            if not (same_device or os.path.samestat(status, image)):
                raise TargetError(
                    f"{self.path} refers to another file, {name_text(os.readlink(opened))}: "
                    "restore to a new image"
                )

    def close(self) -> None:
        if self.served is not None:
            self.served.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def new_overlay(path: str, folders: Folders, size_bytes: int, backing: str) -> NewFile:
    """A new qcow2 image without data of its own, above the raw disk at the address `backing`.

    That need not be there yet. It is open, and without its name: publish and close it. Raises
    TargetError.
    """
    file = NewFile(path, folders)
    try:
        words = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]
        words += [_place(file.fd), str(size_bytes)]
        _qemu_img(path, "qcow2", words, "cannot make")
        os.fsync(file.fd)
    except BaseException:
        file.close()
        raise
    return file


def _place(fd: int) -> str:
    """A file that QEMU opens by a path although it has none, or may have another by then."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def _create(path: str, place: str, image_format: str, size_bytes: int) -> None:
    """Raises TargetError. Some formats refuse a size that is not whole sectors."""
    size_bytes = -(-size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
    argv = ["create", "-q", "-f", image_format, place, str(size_bytes)]
    _qemu_img(path, image_format, argv, "cannot make")


def _qemu_img(path: str, image_format: str, argv: list[str], failed: str) -> str:
    """Run qemu-img and return what it prints; `failed` begins the TargetError."""
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        raise TargetError(
            f"{path}: for a {image_format} image, qemu-img is needed (Debian: qemu-utils)"
        )
    try:
        done = subprocess.run(
            [qemu_img, *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_QEMU_IMG_S,
        )
    except subprocess.TimeoutExpired:
        raise TargetError(
            f"{path}: qemu-img {argv[0]} takes longer than {_QEMU_IMG_S:.0f} s"
        ) from None
    if done.returncode:
        lines = (done.stderr.strip() or "it gave no reason").splitlines()
        reason = lines[-1].removeprefix("qemu-img: ").replace(argv[-1], path)
        raise TargetError(f"{failed} {path}: {reason}")
    return done.stdout
