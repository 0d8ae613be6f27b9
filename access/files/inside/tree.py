# SPDX-License-Identifier: Apache-2.0
"""Answers about a mounted file system: names are bytes, and no link is followed."""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    # These take as long to load as all others together.
    from collections.abc import Iterator

    from vmapipe.access.files.inside.port import Port

# The limits and kinds of messages.py, which takes too long to load here; a test compares them.
MAX_DATA_BYTES = 128 << 10
MAX_XATTRS = 256
# With a path of MAX_PATH_BYTES they are a message that the host takes.
MAX_XATTRS_BYTES = 60 << 10
MAX_PATH_BYTES = 65536
FILE, FOLDER, LINK, CHARACTER_DEVICE, BLOCK_DEVICE, FIFO, SOCKET = range(7)
_KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: FOLDER,
    stat.S_IFLNK: LINK,
    stat.S_IFCHR: CHARACTER_DEVICE,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFIFO: FIFO,
    stat.S_IFSOCK: SOCKET,
}
# As in parser.py: deeper than any real one. Each level holds two descriptors.
MAX_DEPTH = 256
# The reader takes no more pieces of one file.
MAX_STRETCHES = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A FIFO must not make it wait, and no time of last access is of interest.
_CONTENT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Tree:
    """The answers about a mounted file system: names are bytes, and no link is followed."""

    def __init__(self, port: Port, root: str) -> None:
        self._port = port
        self._root = root

    def find(self, path: bytes) -> bytes | None:
        """Return the path as it is told; None: there is no such thing."""
        names = [name for name in path.split(b"/") if name]
        if b"." in names or b".." in names:
            return None
        if not names:
            return b"/"
        try:
            folder = self._folder(names[:-1])
        except OSError:
            return None
        try:
            os.stat(names[-1], dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            return None if error.errno in (errno.ENOENT, errno.ENOTDIR) else b"/" + b"/".join(names)
        finally:
            os.close(folder)
        return b"/" + b"/".join(names)

    def answer(self, action: str, path: bytes, span: tuple[int, int]) -> None:
        """Answer a command of messages.py. `span`: offset and length, for "range"."""
        names = [name for name in path.split(b"/") if name]
        folder = self._folder(names[:-1])
        try:
            name = names[-1] if names else b"."
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if action == "entry":
                self._entry(folder, name, path, status)
            elif action == "range":
                self._range(folder, name, status, *span)
            elif action == "list" and stat.S_ISDIR(status.st_mode):
                below = os.open(name, _FOLDER, dir_fd=folder)
                try:
                    self._list(below, path)
                finally:
                    os.close(below)
            else:
                self._walk(folder, name, path, status, action)
        finally:
            os.close(folder)

    def _folder(self, names: list[bytes]) -> int:
        fd = os.open(self._root, _FOLDER)
        for name in names:
            below = -1
            try:
                below = os.open(name, _FOLDER, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def _list(self, folder: int, path: bytes) -> None:
        for name in self._names(folder, path):
            below = path.rstrip(b"/") + b"/" + name
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                self._entry(folder, name, below, status)
            except OSError as error:
                self._failed(below, error)

    def _names(self, folder: int, path: bytes) -> Iterator[bytes]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield os.fsencode(entry.name)
        except OSError as error:
            self._failed(path, error)

    def _walk(
        self, folder: int, name: bytes, path: bytes, status: os.stat_result, action: str
    ) -> None:
        """The entry and all below it. `action`: "walk", or "read" for the files' content, too."""
        self._visit(folder, name, path, status, action)
        if not stat.S_ISDIR(status.st_mode) or action == "list":
            return
        stack: list[tuple[int, bytes, Iterator[bytes]]] = []
        try:
            self._descend(stack, folder, name, path)
            while stack:
                here, above, names = stack[-1]
                found = next(names, None)
                if found is None:
                    os.close(here)
                    stack.pop()
                    continue
                below = above.rstrip(b"/") + b"/" + found
                try:
                    status = os.stat(found, dir_fd=here, follow_symlinks=False)
                except OSError as error:
                    self._failed(below, error)
                    continue
                self._visit(here, found, below, status, action)
                if stat.S_ISDIR(status.st_mode):
                    self._descend(stack, here, found, below)
        finally:
            for here, _, _ in stack:
                os.close(here)

    def _descend(
        self, stack: list[tuple[int, bytes, Iterator[bytes]]], folder: int, name: bytes, path: bytes
    ) -> None:
        if len(stack) >= MAX_DEPTH or len(path) + 256 > MAX_PATH_BYTES:
            self._port.tell("ENTRYFAILED", path, b"the folder is inside itself, or too deep")
            return
        try:
            fd = os.open(name, _FOLDER, dir_fd=folder)
        except OSError as error:
            self._failed(path, error)
            return
        stack.append((fd, path, self._names(fd, path)))

    def _visit(
        self, folder: int, name: bytes, path: bytes, status: os.stat_result, action: str
    ) -> None:
        try:
            self._entry(folder, name, path, status)
            if action == "read" and stat.S_ISREG(status.st_mode):
                self._content(folder, name, status)
        except OSError as error:
            self._failed(path, error)

    def _failed(self, path: bytes, error: OSError) -> None:
        self._port.tell("ENTRYFAILED", path, (error.strerror or str(error)).encode())

    def _entry(self, folder: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        kind = _KINDS[stat.S_IFMT(status.st_mode)]
        target, size = b"", 0
        if kind == LINK:
            target = os.readlink(name, dir_fd=folder)
        if kind in (FILE, LINK):
            size = status.st_size
        is_device = kind in (CHARACTER_DEVICE, BLOCK_DEVICE)
        self._port.tell(
            "ENTRY",
            path,
            kind,
            status.st_mode & 0o7777,
            status.st_uid,
            status.st_gid,
            size,
            status.st_mtime_ns,
            status.st_ino,
            status.st_nlink,
            status.st_rdev & 0xFFFFFFFF if is_device else 0,
            target,
            self._xattrs(folder, name, path),
        )

    def _xattrs(self, folder: int, name: bytes, path: bytes) -> list[bytes]:
        # There is no call that takes a folder's descriptor and a name.
        place = b"/proc/self/fd/%d/%s" % (folder, name)
        found: list[bytes] = []
        size = 0
        try:
            keys = os.listxattr(place, follow_symlinks=False)
            for key in keys:
                value = os.getxattr(place, key, follow_symlinks=False)
                raw = os.fsencode(key)
                size += len(raw) + len(value)
                if len(found) >= 2 * MAX_XATTRS or size > MAX_XATTRS_BYTES:
                    text = b"not all of its extended attributes could be taken"
                    self._port.tell("ENTRYFAILED", path, text)
                    break
                found += [raw, value]
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                self._failed(path, error)
        return found

    def _range(
        self, folder: int, name: bytes, status: os.stat_result, offset: int, length: int
    ) -> None:
        if not stat.S_ISREG(status.st_mode):
            return
        fd = os.open(name, _CONTENT, dir_fd=folder)
        try:
            for start, end in _stretches(fd, status, offset, min(offset + length, status.st_size)):
                self._data(fd, start, end)
        finally:
            os.close(fd)

    def _content(self, folder: int, name: bytes, status: os.stat_result) -> None:
        size = status.st_size
        if not size:
            return
        fd = os.open(name, _CONTENT, dir_fd=folder)
        try:
            stretches = _stretches(fd, status, 0, size)
            for start, end in stretches:
                self._port.tell("STRETCH", start, end - start)
            for start, end in stretches:
                self._data(fd, start, end)
        finally:
            os.close(fd)

    def _data(self, fd: int, start: int, end: int) -> None:
        while start < end:
            data = os.pread(fd, min(MAX_DATA_BYTES, end - start), start)
            if not data:
                raise OSError(errno.EIO, f"its content ends at byte {start}")
            self._port.tell("FILEDATA", start, data)
            start += len(data)


def _stretches(fd: int, status: os.stat_result, at: int, end: int) -> list[tuple[int, int]]:
    """Where there is data between two offsets."""
    if status.st_blocks * 512 >= status.st_size:
        return [(at, end)] if at < end else []
    found: list[tuple[int, int]] = []
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing but a hole
            raise
        if start >= end:
            break
        at = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        found.append((start, at))
        if len(found) >= MAX_STRETCHES:
            found[-1] = (start, end)
            break
    return found
