# SPDX-License-Identifier: Apache-2.0
"""A place of archives: a folder or a bucket's prefix, with the same questions and answers."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from vmapipe.archiver.base.choice import ARCHIVE_ENDING
from vmapipe.archiver.service.storage import is_of_service
from vmapipe.crypt.magic import MAGIC, is_encrypted
from vmapipe.runtime.arguments import check_readable
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.immutable import lift, locked_until
from vmapipe.runtime.object_names import SCHEME, is_object
from vmapipe.runtime.objectstore import StoredFolder, StoredObject
from vmapipe.runtime.side_files import write_whole

# linux/fs.h and linux/fiemap.h: _IOWR('f', 11, struct fiemap)
_FS_IOC_FIEMAP = 0xC020660B
# fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count, fm_reserved
_HEAD = struct.Struct("=QQIIII")
# fe_logical, fe_physical, fe_length, 2 x reserved, fe_flags, 3 x reserved
_EXTENT = struct.Struct("=QQQQQI3I")
_LAST, _SHARED = 0x1, 0x2000
_EXTENTS = 256
_MOST_CALLS = 4096


class StoredName(NamedTuple):
    """A file or object of a place. `identity` changes when its content does."""

    name: str
    size_bytes: int
    changed_s: float
    identity: str


class KeptPlace(Protocol):
    """Its names are single components. Every method raises Failure, with words for the user."""

    name: str
    #: Whether clients of a service choose the names there.
    is_service: bool

    def names(self) -> Iterator[StoredName]:
        """Yield all files or objects there; links, folders and the like are none."""

    def full_name(self, name: str) -> str:
        """Return the path or the object's name."""

    def read_small(self, name: str, limit_bytes: int) -> bytes | None:
        """Return a small file; None: there is none, it is larger, or it is something else."""

    def write_small(self, name: str, data: bytes) -> None:
        """Write a small file in one step, in place of one that is there."""

    def has(self, name: str) -> bool: ...

    def remove(self, name: str) -> None:
        """Remove it; no error where it is not there. A lock that is over is lifted before."""

    def locked_until_s(self, name: str) -> float:
        """Until when nobody may remove it, in seconds since 1970; 0: it is not locked."""

    def shared_bytes(self, name: str) -> int | None:
        """How much of it other files have in common with it, on the same blocks; None: not known."""

    def is_encrypted(self, name: str) -> bool: ...

    def close(self) -> None: ...


def is_place(name: str) -> bool:
    """Return whether the user's word names a folder or a bucket's prefix, and no archive. Raises Failure."""
    if not is_object(name):
        return os.path.isdir(name)
    if ARCHIVE_ENDING.search(name):  # that object is meant, and not a prefix
        return False
    if name.endswith("/") or "/" not in name.removeprefix(SCHEME):
        return True
    with contextlib.closing(StoredObject(name)) as store:
        return store.head() is None


def open_place(name: str) -> KeptPlace:
    """Raises Failure, UsageError."""
    check_readable(name)
    return ArchiveBucket(name) if is_object(name) else ArchiveFolder(name)


class ArchiveFolder:
    """See `KeptPlace`. Everything in it is named by its descriptor."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.folder = HeldFolder(name)
        except OSError as error:
            raise Failure(f"cannot look into {name}: {os_error_text(error)}") from error
        self.is_service = is_of_service(self.folder)

    def names(self) -> Iterator[StoredName]:
        try:
            for name in self.folder.names():
                status = self.folder.status(name)
                if status and stat.S_ISREG(status.st_mode):
                    identity = f"{status.st_size} {status.st_mtime_ns}"
                    yield StoredName(name, status.st_size, status.st_mtime, identity)
        except OSError as error:
            raise Failure(f"cannot look into {self.name}: {os_error_text(error)}") from error

    def full_name(self, name: str) -> str:
        return os.path.join(self.folder.path, name)

    def read_small(self, name: str, limit_bytes: int) -> bytes | None:
        try:
            fd = self._open(name)
            if fd is None:
                return None
            with open(fd, "rb") as file:
                data = file.read(limit_bytes + 1)
        except OSError as error:
            raise self._failure("read", name, error) from error
        return data if len(data) <= limit_bytes else None

    def _open(self, name: str) -> int | None:
        """A regular file's descriptor; None: there is none. A FIFO's writer is not waited for."""
        try:
            fd = self.folder.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        return fd

    def write_small(self, name: str, data: bytes) -> None:
        try:
            write_whole(self.full_name(name), data, 0o600)
        except OSError as error:
            raise self._failure("write", name, error) from error

    def has(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            return self.folder.status(name) is not None
        return True

    def remove(self, name: str) -> None:
        try:
            if self.folder.status(name) is None:
                return
            lift(self.folder, name)
            with contextlib.suppress(FileNotFoundError):
                # A link itself goes, and not what it leads to.
                os.unlink(name, dir_fd=self.folder.fd)
        except OSError as error:
            raise self._failure("remove", name, error) from error

    def locked_until_s(self, name: str) -> float:
        return locked_until(self.folder, name)

    def shared_bytes(self, name: str) -> int | None:
        try:
            fd = self._open(name)
        except OSError:
            return None
        if fd is None:
            return None
        try:
            return _shared_bytes(fd)
        finally:
            os.close(fd)

    def is_encrypted(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            fd = self._open(name)
            if fd is not None:
                try:
                    return is_encrypted(os.pread(fd, len(MAGIC), 0))
                finally:
                    os.close(fd)
        return False

    def _failure(self, verb: str, name: str, error: OSError) -> Failure:
        return Failure(f"cannot {verb} {self.full_name(name)}: {os_error_text(error)}")

    def close(self) -> None:
        self.folder.close()


class ArchiveBucket:
    """See `KeptPlace`."""

    # A service leaves no mark in a bucket: `prune --keep-within 7d` does there what a mark does in a folder.
    is_service = False

    def __init__(self, name: str) -> None:
        if name.removeprefix(SCHEME).strip("/") == "":
            raise UsageError(f"{name!r} names no bucket: use s3://BUCKET/PREFIX")
        self._store = StoredFolder(name)
        self.name = self._store.name
        self._locks: bool | None = None

    def names(self) -> Iterator[StoredName]:
        for found in self._store.objects():
            yield StoredName(found.name, found.size_bytes, found.changed_s, found.etag)

    def full_name(self, name: str) -> str:
        return f"{self.name}/{name}"

    def read_small(self, name: str, limit_bytes: int) -> bytes | None:
        return self._store.object(name).read_small(limit_bytes)

    def write_small(self, name: str, data: bytes) -> None:
        self._store.object(name).put(data, "", {})

    def has(self, name: str) -> bool:
        return self._store.object(name).head() is not None

    def remove(self, name: str) -> None:
        self._store.object(name).remove()

    def locked_until_s(self, name: str) -> float:
        if self._locks is None:
            self._locks = self._store.has_object_lock()
        if not self._locks:
            return 0.0
        found = self._store.object(name).head()
        return found.locked_until_s if found is not None else 0.0

    def shared_bytes(self, name: str) -> int | None:
        return None

    def is_encrypted(self, name: str) -> bool:
        return name.endswith(".age")

    def close(self) -> None:
        self._store.close()


def _shared_bytes(fd: int) -> int | None:
    """Return how much of the file `fd` lies on blocks that other files have, too (XFS, btrfs), in bytes.

    None where the file system does not tell.
    """
    start = shared = 0
    for _ in range(_MOST_CALLS):
        buffer = array.array("B", bytes(_HEAD.size + _EXTENTS * _EXTENT.size))
        _HEAD.pack_into(buffer, 0, start, (1 << 64) - 1 - start, 0, 0, _EXTENTS, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
        except OSError:
            return None
        mapped = _HEAD.unpack_from(buffer)[3]
        if not mapped:
            return shared
        for index in range(mapped):
            fields = _EXTENT.unpack_from(buffer, _HEAD.size + index * _EXTENT.size)
            logical, length, flags = fields[0], fields[2], fields[5]
            shared += length if flags & _SHARED else 0
            if flags & _LAST:
                return shared
            start = logical + length
    return shared
