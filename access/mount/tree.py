# SPDX-License-Identifier: Apache-2.0
"""All that a mounted archive shows, by path: disks/NAME.raw, config/NAME, files/DISK/PART/…"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.access.archive import OpenArchive
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files.messages import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    FIFO,
    FILE,
    FOLDER,
    LINK,
    SOCKET,
    Entry,
)
from vmapipe.access.mount.guest import GuestDisk
from vmapipe.protocol.nbd.constants import NBD_STATE_HOLE
from vmapipe.runtime.text import name_text
from vmapipe.vma.errors import HeaderError
from vmapipe.vma.names import safe_file_name

_KINDS = {
    FILE: stat.S_IFREG,
    FOLDER: stat.S_IFDIR,
    LINK: stat.S_IFLNK,
    CHARACTER_DEVICE: stat.S_IFCHR,
    BLOCK_DEVICE: stat.S_IFBLK,
    FIFO: stat.S_IFIFO,
    SOCKET: stat.S_IFSOCK,
}
#: The folder of a file system that has the whole disk.
WHOLE = b"whole"
# What a file's size may be in a `struct stat`.
_MAX_SIZE = (1 << 63) - 1
# st_blocks counts these.
_STAT_BLOCK_BYTES = 512


def is_file_name(name: str) -> bool:
    """Whether a disk or a configuration of this name can be a file here, by the rules of a restore."""
    try:
        safe_file_name(name, "", suffix=".raw")
    except HeaderError:
        return False
    return True


class Attributes(NamedTuple):
    """What stat() tells. `mode` has the kind, too; `stored_bytes`: without holes."""

    mode: int
    size_bytes: int
    stored_bytes: int
    mtime_ns: int
    uid: int
    gid: int
    links: int = 1
    device: int = 0

    def as_stat(self) -> dict[str, int]:
        return {
            "st_mode": self.mode,
            "st_size": min(self.size_bytes, _MAX_SIZE),
            "st_blocks": min(-(-self.stored_bytes // _STAT_BLOCK_BYTES), _MAX_SIZE),
            "st_nlink": self.links,
            "st_uid": self.uid,
            "st_gid": self.gid,
            "st_rdev": self.device,
            "st_atime": self.mtime_ns,
            "st_mtime": self.mtime_ns,
            "st_ctime": self.mtime_ns,
        }


class _Guest(NamedTuple):
    """A path inside a file system of a disk."""

    disk: GuestDisk
    volume: bytes
    path: bytes


class _Folder(dict[bytes, "_Node"]):
    """A folder of ours, by name."""


_Node = _Folder | ArchiveDisk | bytes | GuestDisk | _Guest


class ArchiveTree:
    """Answers by path what a folder with the archive in it has. Every method raises OSError.

    Any thread may call it. A path is bytes, absolute, without `.` and `..`.
    """

    def __init__(
        self,
        archive: OpenArchive,
        named: Sequence[tuple[str, ArchiveDisk]],
        guests: Mapping[str, GuestDisk],
        report: Callable[[str], None],
    ) -> None:
        """`named`: the disks, by names that files can have.

        `guests`: the file systems of each, by its name; none: they are not shown. `report` is told of
        configurations that no file here can be called as.
        """
        self._mtime_ns = archive.header.ctime_s * 10**9
        disks, files, config = _Folder(), _Folder(), _Folder()
        for name, disk in named:
            disks[os.fsencode(f"{name}.raw")] = disk
            if name in guests:
                files[os.fsencode(name)] = guests[name]
        for one in archive.header.configs:
            if not is_file_name(one.name) or os.fsencode(one.name) in config:
                report(
                    f"{archive.name}: the configuration {name_text(one.name)} is not shown: no file "
                    "here can have this name, or another one has it (vmapipe config shows it)"
                )
                continue
            config[os.fsencode(one.name)] = one.data
        self._root = _Folder({b"disks": disks, b"config": config})
        if guests:
            self._root[b"files"] = files
        self.size_bytes = sum(disk.size_bytes for _, disk in named)

    def attributes(self, path: bytes) -> Attributes:
        node = self._node(path)
        owner = os.geteuid(), os.getegid()
        match node:
            case _Guest():
                return _of_entry(node.disk.entry(node.volume, node.path))
            case ArchiveDisk():
                mode, stored = stat.S_IFREG | 0o400, node.stored_bytes()
                return Attributes(mode, node.size_bytes, stored, self._mtime_ns, *owner)
            case bytes():
                size = len(node)
                return Attributes(stat.S_IFREG | 0o400, size, size, self._mtime_ns, *owner)
        return Attributes(stat.S_IFDIR | 0o500, 0, 0, self._mtime_ns, *owner, links=2)

    def names(self, path: bytes) -> Iterator[tuple[bytes, int]]:
        """The entries of a folder, each with the kind that its mode has."""
        node = self._node(path)
        if isinstance(node, _Guest):
            entries = node.disk.entries(node.volume, node.path)
            return iter([(name, _KINDS[entry.kind]) for name, entry in entries.items()])
        if isinstance(node, GuestDisk):
            node = _volume_folders(node)
        if not isinstance(node, _Folder):
            raise _os_error(errno.ENOTDIR)
        return iter([(name, _kind(child)) for name, child in node.items()])

    def read(self, path: bytes, offset: int, length: int) -> bytes:
        node = self._node(path)
        match node:
            case bytes():
                return node[offset : offset + length]
            case ArchiveDisk():
                data = bytearray(max(0, min(length, node.size_bytes - offset)))
                view = memoryview(data)
                if not node.try_read(view, offset):
                    node.read(view, offset)
                return bytes(data)
            case _Guest():
                size = node.disk.entry(node.volume, node.path).size_bytes
                length = max(0, min(length, size - offset))
                return node.disk.read(node.volume, node.path, offset, length) if length else b""
        raise _os_error(errno.EISDIR)

    def link_target(self, path: bytes) -> bytes:
        node = self._node(path)
        if isinstance(node, _Guest):
            entry = node.disk.entry(node.volume, node.path)
            if entry.kind == LINK:
                return entry.target
        raise _os_error(errno.EINVAL)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        """Those of users: what a kernel makes of the others, they were not made for."""
        node = self._node(path)
        if not isinstance(node, _Guest):
            return {}
        flat = node.disk.entry(node.volume, node.path).xattrs
        pairs = zip(flat[::2], flat[1::2], strict=False)
        return {name: value for name, value in pairs if name.startswith(b"user.")}

    def seek(self, path: bytes, offset: int, *, to_hole: bool) -> int:
        """Where the next hole or data begins, `lseek` with SEEK_HOLE or SEEK_DATA."""
        node = self._node(path)
        size = (
            node.size_bytes if isinstance(node, ArchiveDisk) else self.attributes(path).size_bytes
        )
        if not 0 <= offset < size:
            raise _os_error(errno.ENXIO)
        if not isinstance(node, ArchiveDisk):
            return size if to_hole else offset  # all of it is data
        for length, flags in node.extents(offset, size - offset):
            if bool(flags & NBD_STATE_HOLE) == to_hole:
                return offset
            offset += length
        if to_hole:
            return size
        raise _os_error(errno.ENXIO)

    def _node(self, path: bytes) -> _Node:
        names = [name for name in path.split(b"/") if name]
        node: _Node = self._root
        for at, name in enumerate(names):
            if isinstance(node, GuestDisk):
                node = _volume_folders(node)
            if not isinstance(node, _Folder):
                raise _os_error(errno.ENOTDIR)
            if name not in node:
                raise _os_error(errno.ENOENT)
            node = node[name]
            if isinstance(node, _Guest):
                return node._replace(path=b"/" + b"/".join(names[at + 1 :]))
        return node


def _volume_folders(guest: GuestDisk) -> _Folder:
    """A folder for each file system; a name with a slash (a volume group's) gives one in another."""
    top = _Folder()
    for volume in guest.volumes():
        *above, last = volume.name.removeprefix(b"/").split(b"/") if volume.name else [WHOLE]
        folder = top
        for name in above:
            below = folder.setdefault(name, _Folder())
            if not isinstance(below, _Folder):
                break
            folder = below
        else:
            folder.setdefault(last, _Guest(guest, volume.name, b"/"))
    return top


def _kind(node: _Node) -> int:
    return stat.S_IFREG if isinstance(node, (ArchiveDisk, bytes)) else stat.S_IFDIR


def _of_entry(entry: Entry) -> Attributes:
    return Attributes(
        _KINDS[entry.kind] | entry.mode,
        entry.size_bytes,
        entry.size_bytes,
        entry.mtime_ns,
        entry.uid,
        entry.gid,
        max(1, entry.links),
        entry.device,
    )


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
