# SPDX-License-Identifier: Apache-2.0
"""Files and block devices that a restore writes, and the folders that they lie in.

New files appear under their names when they are complete; configs are new files. Existing
files and block devices must fit, must not be in use, and are overwritten in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable

from vmapipe.restore.archive.errors import PlanError, TargetError
from vmapipe.restore.targets.leftovers import PARTIAL, LeftoverRemover
from vmapipe.restore.targets.map_file import IMAGE_FORMATS
from vmapipe.restore.targets.plan import Larger, Plan, TargetSpec, check_plan, config_paths
from vmapipe.runtime.disk_use import device_in_use, use_of
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.image_format import format_of_content, format_of_name
from vmapipe.vma.header import Device, Header

# A target may be larger than its device by this much, as in the reference tool: storages
# round sizes up.
TARGET_SLACK_BYTES = 4 * 1024 * 1024
# linux/fs.h: whether a block device is read-only.
_BLKROGET = 0x125E


class Folders:
    """The folders that targets lie in, each opened once and held to the end. A context manager.

    `notices`: what the user should know of them.
    """

    def __init__(self, held: HeldFolder | None = None) -> None:
        """`held`: what the restore's own folder is, whatever stands at its path by now."""
        self.notices: list[str] = []
        self.own = held
        self._held: dict[str, HeldFolder] = {}
        self._removers: dict[HeldFolder, LeftoverRemover | None] = {}
        if held is not None:
            self._take(held)

    def __enter__(self) -> Folders:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for remover in self._removers.values():
            if remover is not None:
                remover.close()
        self._removers.clear()
        for folder in self._held.values():
            if folder is not self.own:
                folder.close()
        self._held.clear()

    def of(self, path: str) -> tuple[HeldFolder, str]:
        """The folder of a file, and the file's name in it. Raises OSError."""
        place, name = os.path.split(path)
        key = _key(place)
        if key not in self._held:
            self._take(HeldFolder(key))
        return self._held[key], name

    def make_partial(self, folder: HeldFolder) -> tuple[str, int]:
        """(name, descriptor) of a new file, which is removed even if we are killed. Raises OSError."""
        if folder not in self._removers:
            self._removers[folder] = None
            # Where no process can be started, the next restore removes it.
            with contextlib.suppress(OSError):
                self._removers[folder] = LeftoverRemover(folder)
        return folder.make_locked(*PARTIAL)

    @property
    def remover_fds(self) -> list[int]:
        """Descriptors for every process that writes to files of `make_partial` to inherit."""
        return [remover.fd for remover in self._removers.values() if remover is not None]

    def look_at(self, path: str) -> None:
        """Note whether others can change the folder of an existing target."""
        with contextlib.suppress(OSError):
            self.of(path)

    def _take(self, folder: HeldFolder) -> None:
        self._held[_key(folder.path)] = folder
        if changeable := folder.changeable_by_others():
            self.notices.append(
                f"other users can change {changeable}, and so decide where {folder.path} leads: "
                "restore to a folder that only you can change"
            )
        # Where files without a name cannot be, a killed restore leaves some with one.
        with contextlib.suppress(OSError):
            for name in folder.remove_leftovers(*PARTIAL):
                self.notices.append(
                    f"removed {os.path.join(folder.path, name)}, which a killed restore had left"
                )


def _key(folder: str) -> str:
    """Equal for a folder's path with and without slashes at its end."""
    return os.path.dirname(os.path.join(folder, "x")) or "."


class NewFile:
    """A file that has no name until it is published, or, where that cannot be, another one.

    A file without a name is gone whatever happens to us. Elsewhere (NFS, FUSE)
    `partial` is the name of a hidden file in the target's folder. A process that outlives
    us removes it; it is locked, so that the next restore does if nothing else could.
    """

    #: True: it may hold other data than zeroes before anything is written.
    has_old_data = False

    def __init__(self, path: str, folders: Folders) -> None:
        """Raises TargetError, also when something of that name exists."""
        self.path = path
        self.partial = ""
        self._published = False
        try:
            self.folder, self._name = folders.of(path)
            if self.folder.status(self._name) is not None:
                raise TargetError(
                    f"{path} exists already and is not overwritten: remove it, choose another folder, "
                    "or name it with --device NAME=TARGET to have the disk in it overwritten"
                )
            self.fd = self._open_unnamed(folders)
        except OSError as error:
            raise TargetError(f"cannot create {path}: {os_error_text(error)}") from error

    def _open_unnamed(self, folders: Folders) -> int:
        with contextlib.suppress(OSError):
            fd = self.folder.make_unnamed()
            # Without /proc it could never get its name.
            if os.path.exists(f"/proc/self/fd/{fd}"):
                return fd
            os.close(fd)
        self.partial, fd = folders.make_partial(self.folder)
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
            self._give_name()
            self._published = True
            self.partial = ""
            if not self.folder.holds(self._name, self.fd):
                raise TargetError(f"{self.path} was replaced by another program")
        except FileExistsError as error:
            raise TargetError(
                f"{self.path} has appeared meanwhile and is not overwritten"
            ) from error
        except OSError as error:
            raise TargetError(f"cannot name {self.path}: {os_error_text(error)}") from error

    def _give_name(self) -> None:
        if not self.partial:
            self.folder.name_unnamed(self.fd, self._name)
        elif self.folder.holds(self.partial, self.fd):
            self.folder.rename_new(self.partial, self._name)

    def withdraw(self) -> None:
        """Another file of the same job could not be published: take this one back."""
        if self._published:
            with contextlib.suppress(OSError):
                self.folder.remove(self._name, self.fd)
            self._published = False

    def close(self) -> None:
        """Remove what was not published."""
        if self.partial:
            with contextlib.suppress(OSError):
                self.folder.remove(self.partial, self.fd)
            self.partial = ""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def publish_all(files: list[NewFile]) -> None:
    """Give all of them their names, or none; they stay open. Raises TargetError."""
    try:
        for file in files:
            file.publish()
        for folder in {file.folder for file in files}:
            _sync(folder)
    except BaseException:
        for file in files:
            file.withdraw()
        raise


def _sync(folder: HeldFolder) -> None:
    try:
        folder.sync()
    except OSError as error:
        raise TargetError(
            f"cannot sync the folder {folder.path}: {os_error_text(error)}"
        ) from error


def open_configs(header: Header, folder: str, folders: Folders) -> list[NewFile]:
    """Write all configs to the disk, still without their names. Raises RestoreError.

    One that stands there already with the same content is left as it is, so that disks can
    be restored one after the other. A name that is unsafe, or taken by something else, is
    refused before anything is written.
    """
    files: list[NewFile] = []
    written: list[tuple[NewFile, bytes]] = []
    try:
        for path, config in zip(config_paths(header, folder), header.configs, strict=True):
            if not _is_there(path, config.data, folders):
                files.append(NewFile(path, folders))
                written.append((files[-1], config.data))
        for file, data in written:
            _write(file, data)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def _is_there(path: str, data: bytes, folders: Folders) -> bool:
    """Return whether this very config is there. Raises TargetError for anything else of its name."""
    try:
        folder, name = folders.of(path)
        if folder.status(name) is None:
            return False
        fd = folder.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and _read(fd, len(data) + 1) == data:
                return True
        finally:
            os.close(fd)
    except OSError:
        pass  # whatever it is, it is not this config
    raise TargetError(
        f"{path} exists already with another content and is not overwritten: "
        "use --no-configs, or another folder"
    )


def _read(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := os.read(fd, length - len(data))):
        data += more
    return data


def write_lines(file: NewFile, lines: Iterable[str]) -> None:
    """Write a file of text, a few lines at a time. Raises TargetError."""
    _write_all(file, (line.encode("utf-8", "surrogateescape") for line in lines))


def _write(file: NewFile, data: bytes) -> None:
    _write_all(file, [data])


def _write_all(file: NewFile, pieces: Iterable[bytes]) -> None:
    try:
        with open(file.fd, "wb", closefd=False) as out:
            for piece in pieces:
                out.write(piece)
        os.fsync(file.fd)
    except OSError as error:
        raise TargetError(f"cannot write {file.path}: {os_error_text(error)}") from error


def write_configs(header: Header, folder: str, folders: Folders) -> list[NewFile]:
    """Write all configs into the folder. Nothing is left where it fails.

    The files are open, so that they can be withdrawn; close them. Raises RestoreError,
    HeaderError.
    """
    check_plan(header, Plan(configs_folder=folder))
    files = open_configs(header, folder, folders)
    try:
        publish_all(files)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


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
        """Refuse to overwrite an image of another format with raw bytes, unless that was asked for."""
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
