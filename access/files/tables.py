# SPDX-License-Identifier: Apache-2.0
"""Partition tables: MBR with logical partitions, and GPT, numbered as Linux numbers them. Pure.

The table may lie: what it says is cut to the disk, a chain that turns back ends, and a GPT
whose checksums are wrong is not believed; its second copy at the end of the disk may be good.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vmapipe.access.files.sources import ByteSource

_SECTOR_BYTES = 512
#: Sizes of a sector that disks have; tables count in them.
SECTOR_SIZES = (512, 4096)
_GPT_TYPE = 0xEE
_EXTENDED_TYPES = (0x05, 0x0F, 0x85)
# Linux stops here, too (block/partitions/msdos.c); fdisk makes 60 at most.
_MAX_LOGICAL = 100
# The entries of a GPT: 128 in practice; the largest table that is believed.
_MAX_GPT_BYTES = 1 << 20
_GPT_HEADER = struct.Struct("<8s4sIIIQQQQ16sQIII")


class Partition(NamedTuple):
    """A stretch of the disk, cut off at its end: 0 bytes are left of one that lies behind it."""

    number: int
    offset: int
    size_bytes: int


def partitions(source: ByteSource, sector_bytes: int) -> list[Partition]:
    """What the table says, by number; none where there is no table. Raises OSError."""
    first = source.read(0, _SECTOR_BYTES)
    if len(first) < _SECTOR_BYTES or first[510:] != b"\x55\xaa":
        return []
    entries = list(_entries(first))
    # What is neither of both is the code of a boot sector, and no table.
    if any(flag & 0x7F for flag, _, _, _ in entries):
        return []
    if any(kind == _GPT_TYPE for _, kind, _, _ in entries):
        found = _gpt(source, sector_bytes, sector_bytes)
        if found is None:
            found = _gpt(source, source.size_bytes - sector_bytes, sector_bytes)
        if found is not None:
            return found
    return sorted(_mbr(source, entries, sector_bytes))


_Entry = tuple[int, int, int, int]  # flag, type, first sector, sectors


def _entries(sector: bytes) -> Iterator[_Entry]:
    for at in range(446, 510, 16):
        flag, kind, start, count = struct.unpack_from("<B3xB3xII", sector, at)
        yield flag, kind, start, count


def _cut(source: ByteSource, number: int, offset: int, size_bytes: int) -> Partition:
    inside = max(0, min(size_bytes, source.size_bytes - offset))
    return Partition(number, offset, inside)


def _mbr(source: ByteSource, entries: list[_Entry], unit: int) -> Iterator[Partition]:
    logical = 5
    for number, (_, kind, start, count) in enumerate(entries, 1):
        if kind in (0, _GPT_TYPE) or not count:
            continue
        if kind not in _EXTENDED_TYPES:
            yield _cut(source, number, start * unit, count * unit)
            continue
        for part in _logical(source, start, start + count, unit):
            yield part._replace(number=logical)
            logical += 1


def _logical(source: ByteSource, first: int, end: int, unit: int) -> Iterator[Partition]:
    """The partitions in an extended one: each has a table, which says where the next table is."""
    at, seen, count_all = first, set[int](), 0
    while at not in seen and len(seen) < _MAX_LOGICAL and count_all < _MAX_LOGICAL:
        seen.add(at)
        sector = source.read(at * unit, _SECTOR_BYTES)
        if len(sector) < _SECTOR_BYTES or sector[510:] != b"\x55\xaa":
            return
        following = None
        for _, kind, start, count in _entries(sector):
            if kind in _EXTENDED_TYPES:
                following = first + start if count and following is None else following
            elif kind and count and at + start < end:
                count_all += 1
                yield _cut(source, 0, (at + start) * unit, count * unit)
        if following is None:
            return
        at = following


def _gpt(source: ByteSource, at: int, unit: int) -> list[Partition] | None:
    """None: there is no GPT with right checksums at this place."""
    raw = source.read(at, unit) if at > 0 else b""
    if len(raw) < unit:
        return None
    fields = _GPT_HEADER.unpack_from(raw)
    magic, _, header_bytes, checksum, _, here, _, _, _, _, table, count, entry_bytes, table_sum = (
        fields
    )
    if magic != b"EFI PART" or not _GPT_HEADER.size <= header_bytes <= unit or here * unit != at:
        return None
    plain = raw[:16] + bytes(4) + raw[20:header_bytes]
    size = count * entry_bytes
    if zlib.crc32(plain) != checksum or entry_bytes < 128 or size > _MAX_GPT_BYTES:
        return None
    rows = source.read(table * unit, size)
    if len(rows) < size or zlib.crc32(rows) != table_sum:
        return None
    found = []
    for number in range(count):
        kind, first, last = struct.unpack_from("<16s16xQQ", rows, number * entry_bytes)
        if any(kind) and first <= last:
            found.append(_cut(source, number + 1, first * unit, (last - first + 1) * unit))
    return found
