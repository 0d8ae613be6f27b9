# SPDX-License-Identifier: Apache-2.0
"""Formats of image files: by content, by name, and which other files an image refers to.

An image refers to backing files, data files, extents. The image's author, or a guest that
writes what looks like one into its raw disk, chooses these names, and QEMU opens what they
name: any file of the host, any address. So they are looked for before QEMU sees the image.
Never too few are found: a header that cannot be understood is QEMU's to refuse, and the
program that starts QEMU looks afterwards at what QEMU has really opened.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

from vmapipe.runtime.text import name_text

#: Bytes at an offset; fewer at the end.
Read = Callable[[int, int], bytes]


class Found(NamedTuple):
    """`words` for a message; `driver`: what QEMU calls the format, empty where it is none."""

    words: str
    driver: str = ""


# (offset, bytes there); of several for one format any counts.
_MAGICS: tuple[tuple[int, bytes, Found], ...] = (
    (0, b"QFI\xfb", Found("a qcow2 image", "qcow2")),
    (0, b"KDMV", Found("a vmdk image", "vmdk")),
    (0, b"COWD", Found("a vmdk image", "vmdk")),
    (0, b"# Disk DescriptorFile", Found("a vmdk image", "vmdk")),
    (0, b"vhdxfile", Found("a vhdx image", "vhdx")),
    (0, b"conectix", Found("a vpc image", "vpc")),
    (0, b"<<< ", Found("a vdi image", "vdi")),
    (0x40, b"\x7f\x10\xda\xbe", Found("a vdi image", "vdi")),
    (0, b"QED\0", Found("a qed image", "qed")),
    (0, b"WithoutFreeSpace", Found("a parallels image", "parallels")),
    (0, b"WithouFreSpacExt", Found("a parallels image", "parallels")),
    (0, b"Bochs Virtual HD Image", Found("a bochs image", "bochs")),
    (0, b"LUKS\xba\xbe", Found("a LUKS container", "luks")),
    (0x8001, b"CD001", Found("an ISO 9660 image")),
    (0, b"VMA\0", Found("a VMA archive")),
    (0, b"\x28\xb5\x2f\xfd", Found("a zstd file")),
    (0, b"\x1f\x8b\x08", Found("a gzip file")),
    (0, b"\x89LZO\0", Found("an lzop file")),
    (0, b"\xfd7zXZ\0", Found("an xz file")),
    (0x101, b"ustar", Found("a tar file")),
)
# A fixed VHD is a raw disk with this behind it; Apple's images have theirs there, too.
_LAST_BYTES = 512
_AT_THE_END = ((b"conectix", Found("a vpc image", "vpc")), (b"koly", Found("a dmg image", "dmg")))

# A name's end, in small letters, and the format that it promises.
_EXTENSIONS = {
    "qcow2": "qcow2",
    "qcow": "qcow2",
    "qed": "qed",
    "vdi": "vdi",
    "vhdx": "vhdx",
    "vhd": "vpc",
    "vpc": "vpc",
    "vmdk": "vmdk",
    "parallels": "parallels",
    "hdd": "parallels",
    "iso": "iso",
    "dmg": "dmg",
    "luks": "luks",
}


def format_of_content(read: Read, size_bytes: int) -> Found | None:
    """Return the format found; None: a raw disk, or a format that is not known here."""
    head = read(0, 0x120)
    for offset, magic, found in _MAGICS:
        there = head[offset : offset + len(magic)]
        if offset >= len(head) and offset + len(magic) <= size_bytes:
            there = read(offset, len(magic))
        if there == magic:
            return found
    if size_bytes >= _LAST_BYTES:
        tail = read(size_bytes - _LAST_BYTES, _LAST_BYTES)
        for magic, found in _AT_THE_END:
            if tail.startswith(magic):
                return found
    return None


def format_of_name(path: str) -> str:
    """The format that a file's name promises; empty: none."""
    _, dot, extension = os.path.basename(path).rpartition(".")
    return _EXTENSIONS.get(extension.lower(), "") if dot else ""


# QEMU's own bounds: a name has 1023 bytes at most in qcow2, and a descriptor of vmdk 20 sectors.
_MAX_NAME_BYTES = 1023
_VMDK_DESCRIPTOR_BYTES = 20 * 512
_SECTOR_BYTES = 512
# Header extensions of qcow2 lie in its first cluster, which has 2 MiB at most.
_MAX_EXTENSIONS = 256
_QCOW_HEAD = struct.Struct(">4sIQI")
_QCOW_FEATURES = struct.Struct(">Q")
_QCOW_EXTENSION = struct.Struct(">II")
_QCOW_DATA_FILE_FEATURE = 0x04
_QCOW_DATA_FILE_NAME = 0x44415441
_QED_HEAD = struct.Struct("<4sIIIQQQQQII")
_QED_BACKING_FEATURE = 0x01
_VMDK4_HEAD = struct.Struct("<4sIIQQQQ")
# `parentFileNameHint="base.vmdk"`, and an extent: `RW 4192256 SPARSE "disk-s001.vmdk"`.
_VMDK_PARENT = rb'parentFileNameHint\s*=\s*"?([^"\n\0]*)'
_VMDK_EXTENT = rb'(?m)^(?:RW|RDONLY|NOACCESS)[^\n"]*"([^"\n]*)"'


class Reference(NamedTuple):
    """`what` it is for, and the name as the image has it."""

    what: str
    name: str

    def __str__(self) -> str:
        return f"{name_text(self.name)} as its {self.what}"


def references(image_format: str, read: Read) -> list[Reference]:
    """Return the files that an image of this format refers to."""
    look = {"qcow2": _qcow, "qcow": _qcow, "qed": _qed, "vmdk": _vmdk}.get(image_format)
    return look(read) if look else []


def is_encrypted(image_format: str, read: Read) -> bool:
    """Return whether the image's disk cannot be read without a passphrase or key."""
    if image_format == "luks":
        return True
    # The method, 0 is none (docs/interop/qcow2.rst); version 1 has it elsewhere.
    head = read(0, 40)
    version = head[4:8]
    at = {b"\0\0\0\1": 36, b"\0\0\0\2": 32, b"\0\0\0\3": 32}.get(version, len(head))
    is_qcow = image_format in ("qcow2", "qcow") and head.startswith(b"QFI\xfb")
    return is_qcow and any(head[at : at + 4])


def _qcow(read: Read) -> list[Reference]:
    """Versions 1 to 3 begin alike."""
    head = read(0, 112)
    if len(head) < _QCOW_HEAD.size:
        return []
    magic, version, offset, length = _QCOW_HEAD.unpack_from(head)
    found = []
    if magic == b"QFI\xfb" and offset:
        name = read(offset, min(length, _MAX_NAME_BYTES))
        found.append(Reference("backing file", _text(name)))
    if magic == b"QFI\xfb" and version >= 3 and len(head) >= 104:
        features, header_bytes = _QCOW_FEATURES.unpack_from(head, 72)[0], head[100:104]
        if features & _QCOW_DATA_FILE_FEATURE:
            name = _data_file_name(read, int.from_bytes(header_bytes, "big"))
            found.append(Reference("data file", _text(name)))
    return found


def _data_file_name(read: Read, at: int) -> bytes:
    for _ in range(_MAX_EXTENSIONS):
        head = read(at, _QCOW_EXTENSION.size)
        if len(head) < _QCOW_EXTENSION.size:
            break
        kind, length = _QCOW_EXTENSION.unpack(head)
        if kind == _QCOW_DATA_FILE_NAME:
            return read(at + len(head), min(length, _MAX_NAME_BYTES))
        if not kind:
            break
        at += len(head) + -(-length // 8) * 8
    return b""


def _qed(read: Read) -> list[Reference]:
    head = read(0, _QED_HEAD.size)
    if len(head) < _QED_HEAD.size:
        return []
    magic, _, _, _, features, *_, offset, length = _QED_HEAD.unpack(head)
    if magic != b"QED\0" or not features & _QED_BACKING_FEATURE:
        return []
    return [Reference("backing file", _text(read(offset, min(length, _MAX_NAME_BYTES))))]


def _vmdk(read: Read) -> list[Reference]:
    """One file, with the descriptor inside; or a descriptor, whose extents are other files."""
    head = read(0, _VMDK4_HEAD.size)
    has_own_data = head[:4] in (b"KDMV", b"COWD")
    at = _SECTOR_BYTES if has_own_data else 0
    descriptor = read(at, _VMDK_DESCRIPTOR_BYTES)
    if head[:4] == b"KDMV" and len(head) == _VMDK4_HEAD.size:
        _, _, _, capacity, _, descriptor_sector, _ = _VMDK4_HEAD.unpack(head)
        if descriptor_sector < 1 << 54:
            descriptor += read(descriptor_sector * _SECTOR_BYTES, _VMDK_DESCRIPTOR_BYTES)
        # Then QEMU goes by the descriptor alone.
        has_own_data = capacity != 0
    found = [
        Reference("parent", _text(name)) for name in re.findall(_VMDK_PARENT, descriptor) if name
    ]
    if not has_own_data:
        found += [Reference("extent", _text(name)) for name in re.findall(_VMDK_EXTENT, descriptor)]
    return list(dict.fromkeys(found))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
