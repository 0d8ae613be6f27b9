# SPDX-License-Identifier: Apache-2.0
"""What becomes of files from an archive: a tar stream, one file's bytes, or files below a folder.

Each writer takes the parser's messages in order and believes none of them: names are
checked, what is more than was announced is refused, what is less is padded with zeroes and told.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Callable
from typing import BinaryIO

from vmapipe.access.files.messages import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    FIFO,
    FILE,
    FOLDER,
    LINK,
    SOCKET,
    Entry,
    FileData,
    Stretch,
)
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.syscalls import write_at
from vmapipe.runtime.text import name_text

Report = Callable[[str], None]
_TYPES = {
    FILE: tarfile.REGTYPE,
    FOLDER: tarfile.DIRTYPE,
    LINK: tarfile.SYMTYPE,
    CHARACTER_DEVICE: tarfile.CHRTYPE,
    BLOCK_DEVICE: tarfile.BLKTYPE,
    FIFO: tarfile.FIFOTYPE,
}
# One entry's fault, and of the folder here: a name that it cannot hold (longer, of other letters,
# taken if small and large letters are the same), a link where there are none.
_NAME_ERRORS = (errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EPERM)
_ZEROES = bytes(64 << 10)
# Files with several names that are known again, some 300 bytes each; those behind are written twice.
_MAX_LINKED = 1 << 20
# More pieces than any file system has: 24 bytes each are kept until the file is written.
_MAX_STRETCHES = 1 << 20


def shown(path: bytes) -> str:
    """A path for a person, its odd bytes escaped."""
    return name_text(os.fsdecode(path))


def relative_path(path: bytes, top: bytes) -> bytes:
    """`path` below the folder that `top` is in. Raises Failure for one that could lead elsewhere."""
    base = top.rpartition(b"/")[0]
    below = path[len(base) + 1 :]
    names = below.split(b"/")
    is_inside = path == top or path.startswith(top.rstrip(b"/") + b"/")
    is_plain = b"\0" not in below and not any(name in (b"", b".", b"..") for name in names)
    if not is_inside or (below and not is_plain):
        raise Failure(f"the parser named a path that is not below {shown(top)}: {shown(path)}")
    return below


class _Content:
    """The content of one file as it comes: its stretches first, then their bytes in order."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.stretches: list[Stretch] = []
        self._done = 0  # stretches
        self._at = 0  # bytes of the next one

    def add(self, stretch: Stretch) -> None:
        end = self.stretches[-1].offset + self.stretches[-1].length if self.stretches else 0
        size = self.entry.size_bytes
        if stretch.offset < end or stretch.offset + stretch.length > size:
            raise Failure(f"{shown(self.entry.path)}: its pieces are not in order")
        if len(self.stretches) >= _MAX_STRETCHES:
            raise Failure(f"{shown(self.entry.path)}: it is in more than {_MAX_STRETCHES} pieces")
        self.stretches.append(stretch)

    def take(self, data: FileData) -> None:
        """Raises Failure for bytes that are not the next ones."""
        while self._done < len(self.stretches):
            offset, length = self.stretches[self._done]
            if self._at < length:
                if data.offset == offset + self._at and len(data.data) <= length - self._at:
                    self._at += len(data.data)
                    return
                break
            self._done, self._at = self._done + 1, 0
        raise Failure(f"{shown(self.entry.path)}: bytes that were not announced")

    @property
    def data_bytes(self) -> int:
        return sum(stretch.length for stretch in self.stretches)

    @property
    def missing_bytes(self) -> int:
        return sum(stretch.length for stretch in self.stretches[self._done :]) - self._at


class TarWriter:
    """A tar stream (pax) with owners, modes, times, links, holes, xattrs and device nodes."""

    def __init__(self, out: BinaryIO, top: bytes, report: Report) -> None:
        self._out = out
        self._top = top
        self._report = report
        self._content: _Content | None = None
        self._is_open = False
        self._written = 0
        self._names: dict[int, str] = {}
        self.is_whole = True

    def entry(self, entry: Entry) -> None:
        self._end_content()
        name = os.fsdecode(relative_path(entry.path, self._top)) or "."
        if entry.kind == SOCKET:
            self._report(f"{shown(entry.path)}: a socket, which tar cannot hold, is left out")
            return
        if entry.kind == LINK and not _is_target(entry.target):
            self._report(f"{shown(entry.path)}: a link that leads nowhere is left out")
            self.is_whole = False
            return
        info = _tar_info(entry, name)
        if entry.kind == FILE and entry.links > 1:
            known = self._names.get(entry.inode)
            if known is None and len(self._names) < _MAX_LINKED:
                self._names[entry.inode] = name
            if known is not None:
                # With a size bsdtar takes what comes next for the file's content.
                info.type, info.linkname, info.size = tarfile.LNKTYPE, known, 0
                self._write(_header(info))
                return
        if entry.kind == FILE:
            self._content = _Content(entry)
            self._info = info
            return
        self._write(_header(info))

    def stretch(self, stretch: Stretch) -> None:
        if self._content is not None:
            self._content.add(stretch)

    def data(self, data: FileData) -> None:
        if self._content is None:
            return  # of a name of a file that is there already
        self._open()
        self._content.take(data)
        self._write(data.data)

    def failed(self, text: str) -> None:
        """The entry that came last could not be read to its end."""
        self.is_whole = False

    def close(self) -> None:
        self._end_content()
        self._write(bytes(1024))
        self._write(bytes(-self._written % tarfile.RECORDSIZE))
        self._out.flush()

    def _open(self) -> None:
        """Write the header, which needs all stretches, before the first byte."""
        if self._is_open or self._content is None:
            return
        self._is_open = True
        info, content = self._info, self._content
        if content.data_bytes == content.entry.size_bytes:
            self._write(_header(info))
            return
        # A file with holes as GNU tar writes it, "PAX format, version 1.0" in its manual.
        pairs = [(part.offset, part.length) for part in content.stretches]
        if not pairs or sum(pairs[-1]) < content.entry.size_bytes:
            pairs.append((content.entry.size_bytes, 0))
        rows = "".join(f"{offset}\n{length}\n" for offset, length in pairs)
        table = f"{len(pairs)}\n{rows}".encode()
        table += bytes(-len(table) % 512)
        headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": info.name,
            "GNU.sparse.realsize": str(content.entry.size_bytes),
        }
        folder, _, name = info.name.rpartition("/")
        info.name = f"{folder}/GNUSparseFile.0/{name}" if folder else f"GNUSparseFile.0/{name}"
        # The path in front: Python's tarfile takes what comes last for the name.
        info.pax_headers = {"path": info.name, **info.pax_headers, **headers}
        info.size = len(table) + content.data_bytes
        self._write(_header(info))
        self._write(table)

    def _end_content(self) -> None:
        if self._content is None:
            return
        self._open()
        missing = self._content.missing_bytes
        if missing:
            self.is_whole = False
            self._report(
                f"{shown(self._content.entry.path)}: {missing} bytes could not be read "
                "and are zeroes in the tar stream"
            )
        while missing > 0:
            piece = _ZEROES[:missing]
            self._write(piece)
            missing -= len(piece)
        self._write(bytes(-self._written % 512))
        self._content, self._is_open = None, False

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._written += len(data)


def _tar_info(entry: Entry, name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = _TYPES.get(entry.kind, tarfile.REGTYPE)
    info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
    info.size = entry.size_bytes if entry.kind == FILE else 0
    info.linkname = os.fsdecode(entry.target)
    info.devmajor, info.devminor = os.major(entry.device), os.minor(entry.device)
    seconds, nanoseconds = divmod(entry.mtime_ns, 10**9)
    info.mtime = seconds
    headers = {"mtime": f"{seconds}.{nanoseconds:09d}"} if nanoseconds and seconds >= 0 else {}
    for key, value in zip(entry.xattrs[::2], entry.xattrs[1::2], strict=False):
        # As GNU tar writes a name that would end the keyword. Other bytes than text it cannot hold.
        name = key.decode("utf-8", "ignore").replace("%", "%25").replace("=", "%3D")
        if "\0" not in name:
            headers[f"SCHILY.xattr.{name}"] = os.fsdecode(value)
    info.pax_headers = headers
    return info


def _is_target(target: bytes) -> bool:
    """Whether a link can lead there: a damaged file system has others."""
    return target != b"" and b"\0" not in target


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


class FileWriter:
    """The bytes of one file, holes as zeroes: for `cat`."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._content: _Content | None = None
        self._at = 0
        self.is_whole = True
        #: Where to go on, if it is a link.
        self.target: bytes | None = None

    def entry(self, entry: Entry) -> None:
        if entry.kind == LINK and self._content is None:
            self.target = entry.target
            return
        if entry.kind != FILE or self._content is not None:
            raise Failure(f"{shown(entry.path)} is not a file")
        self._content = _Content(entry)

    def stretch(self, stretch: Stretch) -> None:
        if self._content is not None:
            self._content.add(stretch)

    def data(self, data: FileData) -> None:
        if self._content is None:
            raise Failure("the parser sent bytes of no file")
        self._content.take(data)
        self._fill(data.offset)
        self._out.write(data.data)
        self._at += len(data.data)

    def failed(self, text: str) -> None:
        """What was written so far is right, and not all."""
        self.is_whole = False
        raise Failure(text)

    def close(self) -> None:
        if self._content is not None:
            self._fill(self._content.entry.size_bytes)
        elif self.target is None:
            raise Failure("there is no such file")
        self._out.flush()

    def _fill(self, end: int) -> None:
        while self._at < end:
            piece = _ZEROES[: end - self._at]
            self._out.write(piece)
            self._at += len(piece)


class FolderWriter:
    """Files and folders below an open folder of this host. Nothing that exists is touched.

    Every name is made relative to a descriptor of the folder that this run has made, so
    that no link, of the archive or of somebody else here, leads elsewhere. Without
    owners and device nodes, which need root: `tar` has them.
    """

    def __init__(self, folder_fd: int, top: bytes, new_name: bytes, report: Report) -> None:
        self._folder_fd = folder_fd
        self._top = top
        self._new_name = new_name
        self._report = report
        # Open folders from the outermost to that of the entry which came last.
        self._open: list[tuple[bytes, int, Entry]] = []
        self._content: _Content | None = None
        self._fd = -1
        self._made: dict[int, tuple[bytes, ...]] = {}
        # What is below an entry that could not be made.
        self._left_out = b""
        self.files = 0
        self.is_whole = True

    def entry(self, entry: Entry) -> None:
        self._end_content()
        names = [self._new_name]
        below = relative_path(entry.path, self._top)
        if entry.path != self._top:
            names += below.split(b"/")[1 if self._top.strip(b"/") else 0 :]
        if self._left_out and entry.path.startswith(self._left_out):
            return
        if entry.kind == LINK and not _is_target(entry.target):
            self._report(f"{shown(entry.path)}: a link that leads nowhere is left out")
            self.is_whole = False
            return
        parent_fd, name = self._parent(names), names[-1]
        try:
            self._make(entry, parent_fd, name, tuple(names))
        except OSError as error:
            text = f"cannot make {shown(b'/'.join(names))}: {os_error_text(error)}"
            if error.errno == errno.EEXIST:
                text = f"{shown(b'/'.join(names))} exists already"
            if len(names) == 1 or error.errno not in _NAME_ERRORS:
                raise Failure(text) from error
            self._report(text)
            self.is_whole = False
            self._left_out = entry.path + b"/"

    def _parent(self, names: list[bytes]) -> int:
        """The descriptor of the folder that this name goes into, which came before it."""
        while len(self._open) >= len(names):
            self._close_folder()
        if len(self._open) != len(names) - 1 or any(
            opened[0] != name for opened, name in zip(self._open, names, strict=False)
        ):
            raise Failure("the parser named an entry before its folder")
        return self._open[-1][1] if self._open else self._folder_fd

    def _make(self, entry: Entry, parent_fd: int, name: bytes, names: tuple[bytes, ...]) -> None:
        if entry.kind == FOLDER:
            os.mkdir(name, 0o700, dir_fd=parent_fd)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._open.append((name, os.open(name, flags, dir_fd=parent_fd), entry))
        elif entry.kind == LINK:
            os.symlink(entry.target, name, dir_fd=parent_fd)
            self._set_times(entry, name, parent_fd)
        elif entry.kind == FILE:
            known = self._made.get(entry.inode) if entry.links > 1 else None
            if known is not None and known[:-1] == names[:-1]:
                os.link(known[-1], name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
                return
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(name, flags, 0o600, dir_fd=parent_fd)
            self._content = _Content(entry)
            if entry.links > 1 and len(self._made) < _MAX_LINKED:
                self._made[entry.inode] = names
            self.files += 1
        else:
            what = "device nodes, FIFOs and sockets are left out (`vmapipe files tar` has them)"
            self._report(f"{shown(entry.path)}: {what}")

    def stretch(self, stretch: Stretch) -> None:
        if self._content is not None:
            self._content.add(stretch)

    def data(self, data: FileData) -> None:
        if self._content is None:
            return  # of a second name of a file
        self._content.take(data)
        try:
            write_at(self._fd, memoryview(data.data), data.offset)
        except OSError as error:
            path = shown(self._content.entry.path)
            raise Failure(f"cannot write the copy of {path}: {os_error_text(error)}") from error

    def failed(self, text: str) -> None:
        """The file that came last is not whole; it stays, and is told."""
        self.is_whole = False

    def close(self) -> None:
        self._end_content()
        while self._open:
            self._close_folder()

    def _end_content(self) -> None:
        if self._content is None:
            return
        content, fd = self._content, self._fd
        self._content, self._fd = None, -1
        entry = content.entry
        try:
            self._set_size(entry, fd)
            self._set_xattrs(entry, fd)
            # Not the bits that make it run as its owner, who is another one here.
            os.fchmod(fd, entry.mode & 0o777)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            path = shown(entry.path)
            raise Failure(f"cannot write the copy of {path}: {os_error_text(error)}") from error
        finally:
            os.close(fd)
        if content.missing_bytes:
            self.is_whole = False
            self._report(
                f"{shown(entry.path)}: {content.missing_bytes} bytes could not be read "
                "and are zeroes in the copy"
            )

    def _set_size(self, entry: Entry, fd: int) -> None:
        try:
            os.ftruncate(fd, entry.size_bytes)
        except (OSError, OverflowError) as error:
            # Made up, or larger than a file can be here: it keeps what there is of it.
            if isinstance(error, OSError) and error.errno not in (errno.EFBIG, errno.EINVAL):
                raise
            self.is_whole = False
            size = f"{entry.size_bytes} bytes"
            self._report(f"{shown(entry.path)}: a file of {size} cannot be made here")

    def _set_xattrs(self, entry: Entry, fd: int) -> None:
        for key, value in zip(entry.xattrs[::2], entry.xattrs[1::2], strict=False):
            if key.startswith(b"user.") and b"\0" not in key:
                try:
                    os.setxattr(fd, key, value)
                except OSError as error:
                    self._report(f"{shown(entry.path)}: {shown(key)} not kept: {error.strerror}")

    def _set_times(self, entry: Entry, name: bytes, parent_fd: int) -> None:
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent_fd, follow_symlinks=False)

    def _close_folder(self) -> None:
        _, fd, entry = self._open.pop()
        try:
            os.fchmod(fd, stat.S_IMODE(entry.mode) & 0o777 or 0o700)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            raise Failure(f"cannot end {shown(entry.path)}: {os_error_text(error)}") from error
        finally:
            os.close(fd)
