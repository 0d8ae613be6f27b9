# SPDX-License-Identifier: Apache-2.0
"""What a file is by its content, where its bytes are not a raw disk's; and by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

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
    """What is there; None: a raw disk, or nothing that is known here."""
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
