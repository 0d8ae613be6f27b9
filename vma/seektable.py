# SPDX-License-Identifier: Apache-2.0
"""The seek table of a zstd file made of independent frames (zstd's "seekable format" 0.1).

A skippable frame at the end lists every frame's compressed and plain size, so
that a reader can jump; `zstd -d` skips it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmapipe.vma.errors import ArchiveError, LimitError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = 0x184D2A5E
# All magic numbers of frames that decoders skip.
_SKIPPABLE_LOW, _SKIPPABLE_HIGH = 0x184D2A50, 0x184D2A5F
_SEEKABLE_MAGIC = 0x8F92EAB1
_HEAD = struct.Struct("<II")
_ENTRY = struct.Struct("<II")
_ENTRY_WITH_CHECKSUM = struct.Struct("<II4x")
_FOOT = struct.Struct("<IBI")
FOOTER_BYTES = _FOOT.size
_CHECKSUM_FLAG = 0x80
_RESERVED_BITS = 0x7C
# One of the two bits that the format leaves unused and has every reader pass over.
_CUT_FLAG = 0x01
# The format's own limit.
MAX_FRAMES = 0x8000000


class Frame(NamedTuple):
    """One independent frame: sizes in bytes."""

    compressed_bytes: int
    plain_bytes: int


class SeekTable:
    """Frames in their order, in as much memory as the table in the file takes: an archive may have a million."""

    def __init__(self, entries: bytes, entry: struct.Struct) -> None:
        self._entries = entries
        self._entry = entry

    def __len__(self) -> int:
        return len(self._entries) // self._entry.size

    def __iter__(self) -> Iterator[Frame]:
        return map(Frame._make, self._entry.iter_unpack(self._entries))


def usual_frame_bytes(plain_bytes: Iterable[int]) -> int:
    """Plain bytes of the frame that a byte of the archive, chosen at random, lies in on average; 0: there are none.

    `plain_bytes`: of each frame. A plain mean would count the headers between two extents' data as much as the data.
    """
    total = squares = 0
    for length in plain_bytes:
        total += length
        squares += length * length
    return squares // total if total else 0


def is_zstd(start: bytes) -> bool:
    """Return whether a file that begins with these 4 bytes is zstd, skippable frames included."""
    return start[:4] == ZSTD_MAGIC or is_skippable(start)


def is_skippable(start: bytes) -> bool:
    """Return whether these bytes begin a frame that decoders skip."""
    return len(start) >= 4 and (
        _SKIPPABLE_LOW <= int.from_bytes(start[:4], "little") <= _SKIPPABLE_HIGH
    )


def seek_table_ends(frame_count: int, *, is_cut: bool = False) -> tuple[bytes, bytes]:
    """Return the bytes before and after the entries, for writers of very long tables.

    An entry is two little-endian 32-bit numbers, compressed bytes and plain
    bytes. `is_cut`: see there. Raises LimitError.
    """
    if frame_count > MAX_FRAMES:
        raise LimitError(f"{frame_count} zstd frames; the limit is {MAX_FRAMES}")
    foot = _FOOT.pack(frame_count, _CUT_FLAG if is_cut else 0, _SEEKABLE_MAGIC)
    return _HEAD.pack(_SKIPPABLE_MAGIC, frame_count * _ENTRY.size + len(foot)), foot


def seek_table_bytes(footer: bytes) -> int | None:
    """Length of the whole skippable frame, from the file's last 9 bytes; None if it has none."""
    if len(footer) != FOOTER_BYTES:
        return None
    count, descriptor, magic = _FOOT.unpack(footer)
    if magic != _SEEKABLE_MAGIC or descriptor & _RESERVED_BITS or count > MAX_FRAMES:
        return None
    entry = _ENTRY.size + (4 if descriptor & _CHECKSUM_FLAG else 0)
    return int(_HEAD.size + count * entry + FOOTER_BYTES)


def is_cut(footer: bytes) -> bool:
    """Return whether the data of large extents are frames of their own, by the file's last 9 bytes."""
    return seek_table_bytes(footer) is not None and bool(_FOOT.unpack(footer)[1] & _CUT_FLAG)


def seek_table_entries(raw: bytes) -> bytes:
    """Return the entries alone, 8 bytes a frame, of a table without checksums. Raises ArchiveError."""
    if _parse_ends(raw)[1] & _CHECKSUM_FLAG:
        raise ArchiveError("the zstd seek table has checksums")
    return raw[_HEAD.size : -FOOTER_BYTES]


def parse_seek_table(raw: bytes) -> SeekTable:
    """Read the skippable frame (`seek_table_bytes` long). Raises ArchiveError if it lies."""
    has_checksums = _parse_ends(raw)[1] & _CHECKSUM_FLAG
    entry = _ENTRY_WITH_CHECKSUM if has_checksums else _ENTRY
    return SeekTable(raw[_HEAD.size : -FOOTER_BYTES], entry)


def _parse_ends(raw: bytes) -> tuple[int, int]:
    """Return how many frames a table lists, and its descriptor. Raises ArchiveError if it lies."""
    if len(raw) < _HEAD.size + FOOTER_BYTES or seek_table_bytes(raw[-FOOTER_BYTES:]) != len(raw):
        raise ArchiveError("the zstd seek table is damaged")
    magic, body_bytes = _HEAD.unpack_from(raw)
    if magic != _SKIPPABLE_MAGIC or body_bytes != len(raw) - _HEAD.size:
        raise ArchiveError("the zstd seek table is damaged")
    count, descriptor, _ = _FOOT.unpack(raw[-FOOTER_BYTES:])
    return count, descriptor
