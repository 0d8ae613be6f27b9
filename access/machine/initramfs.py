# SPDX-License-Identifier: Apache-2.0
"""The first file system of a kernel that we start: files, and programs of this host with their libraries.

It is not compressed: writing it takes milliseconds, so that none is kept, and an emulated
processor has nothing to unpack.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import subprocess

from vmapipe.runtime.errors import Failure, os_error_text

# ldd's answer for one library: "libm.so.6 => /lib/libm.so.6 (0x…)", or "/lib64/ld-linux… (0x…)".
_LIBRARY = re.compile(r"(?:=> |^\s*)(/\S.*) \(0x", re.MULTILINE)
_LDD_S = 30.0
# ELF, 64 bits (elf.h): where its header says where the segments and the sections are.
_PROGRAM_HEADERS_AT, _SECTIONS_AT, _COUNTS_AT = 32, 40, 54
_SEGMENT = struct.Struct("<IIQQQQQQ")


class Initramfs:
    """Collects files; `finish` gives the archive (cpio, "newc", as the kernel takes it).

    The form: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
    """

    def __init__(self) -> None:
        self._out = bytearray()
        self._folders: set[str] = set()
        self._names: set[str] = set()
        #: Folders of the libraries, for LD_LIBRARY_PATH.
        self.library_folders: list[str] = []

    def add_folder(self, path: str) -> None:
        """Add a folder, and those that it is in. Paths are absolute."""
        path = os.path.normpath(path)
        if path == "/" or path in self._folders:
            return
        self.add_folder(os.path.dirname(path))
        self._folders.add(path)
        self._add(path, stat.S_IFDIR | 0o755, b"", 2)

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file; one that is there already stays."""
        path = os.path.normpath(path)
        if path in self._names:
            return
        self._names.add(path)
        self.add_folder(os.path.dirname(path))
        self._add(path, stat.S_IFREG | mode, data, 1)

    def add_program(self, path: str) -> None:
        """Add a program or library of this host, at its place, with the libraries that it needs.

        Raises Failure.
        """
        self._add_from_host(path)
        for library in _libraries(path):
            self._add_from_host(library)
            folder = os.path.dirname(library)
            if folder not in self.library_folders:
                self.library_folders.append(folder)

    def finish(self) -> bytes:
        self._add("/TRAILER!!!", 0, b"", 1)
        return bytes(self._out)

    def _add_from_host(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise Failure(f"cannot read {path}: {os_error_text(error)}") from error
        self.add_file(path, without_sections(data), 0o755)

    def _add(self, path: str, mode: int, data: bytes, links: int) -> None:
        name = os.fsencode(path.lstrip("/")) + b"\0"
        number = len(self._names) + len(self._folders)
        fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name), 0)
        self._out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._out += bytes(-len(self._out) % 4)
        self._out += data
        self._out += bytes(-len(self._out) % 4)


def find_program(name: str) -> str | None:
    """Return the path of a program; a user's PATH often lacks the folders of root's."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _libraries(path: str) -> list[str]:
    ldd = find_program("ldd")
    if ldd is None:
        raise Failure(
            "the libraries of a program are not known: there is no ldd (Debian: libc-bin)"
        )
    try:
        result = subprocess.run(
            [ldd, path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LDD_S,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"ldd {path} is not done within {_LDD_S:.0f} s") from error
    text = os.fsdecode(result.stdout)
    if "not found" in text:
        raise Failure(f"{path} needs a library that is not there: ldd {path} names it")
    # A static program has none, and ldd fails.
    return _LIBRARY.findall(text)


def without_sections(data: bytes) -> bytes:
    """Return an ELF program less what is not loaded, such as symbols for debuggers."""
    if data[:6] != b"\x7fELF\x02\x01":
        return data
    (table,) = struct.unpack_from("<Q", data, _PROGRAM_HEADERS_AT)
    size, count = struct.unpack_from("<HH", data, _COUNTS_AT)
    if size != _SEGMENT.size or table + count * size > len(data):
        return data
    end = table + count * size
    for index in range(count):
        kind, _, offset, _, _, length, _, _ = _SEGMENT.unpack_from(data, table + index * size)
        if kind:
            end = max(end, offset + length)
    if end > len(data):
        return data
    kept = bytearray(data[:end])
    struct.pack_into("<Q", kept, _SECTIONS_AT, 0)
    struct.pack_into("<HHH", kept, _COUNTS_AT + 4, 0, 0, 0)
    return bytes(kept)
