# SPDX-License-Identifier: Apache-2.0
"""What the tables of an image place behind its file's end: it is lost, and QEMU reads zeroes there.

A file that was cut short (a full disk, a copy that broke off) still opens, and what QEMU asks for behind its
end reads as zeroes. vhdx and vpc images are refused by QEMU itself; a raw disk and a LUKS container have no tables
that could tell. The formats are those of QEMU's docs/interop/ (qcow2, qed, parallels) and block/ (vdi, vmdk). Pure.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmapipe.runtime.image_format import Read

#: Formats that say where in the file each block lies; each is known by its first bytes.
WITH_TABLES = ("qcow2", "qed", "vdi", "vmdk", "parallels")

# QEMU's own bounds: the bits of a cluster's size in qcow2, and the bytes of a table of tables.
_QCOW_CLUSTER_BITS = range(9, 22)
_MAX_TABLE_BYTES = 32 << 20
# So much of a long table is looked at in one go.
_SLICE_BYTES = 1 << 16
_SECTOR_BYTES = 512


class Truncated(NamedTuple):
    """`length` bytes of the disk, the first of them at `offset`, are not in the file.

    `is_cut`: no block lacks all of its bytes; some programs leave out zeroes at the end of the last one.
    """

    offset: int
    length: int
    is_cut: bool


# Of a block whose length in the file is not told.
_UNKNOWN_BYTES = 1
#: Where in the file an entry's block begins and ends; None: it has none there.
_Place = tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class _Map:
    """One table of blocks (`second_bytes` 0), or a table of such tables, at `first_at` of the file.

    `place` makes of an entry where its block is; `table_at` of an entry of the first table where the second is,
    0: nowhere. Entries of 16 bytes are two words. No entry, without its `flag_bytes` leading bytes and in units
    of `unit` bytes behind `base`, is less than the place of its block.
    """

    disk_bytes: int
    block_bytes: int
    first_at: int
    first_entries: int
    second_bytes: int
    entry_bytes: int
    order: str
    place: Callable[[int, int], _Place]
    table_at: Callable[[int], int] = int
    flag_bytes: int = 0
    unit: int = 1
    base: int = 0

    def words(self, raw: bytes | bytearray, word_bytes: int) -> array[int]:
        words = array("Q" if word_bytes == 8 else "I")
        words.frombytes(raw[: len(raw) - len(raw) % word_bytes])
        if self.order != sys.byteorder:
            words.byteswap()
        return words

    def furthest(self, raw: bytes) -> int:
        """Return what no block of this table ends behind; more than that may be said, never less."""
        size = self.entry_bytes
        data = bytearray(raw[: len(raw) - len(raw) % size])
        for byte in range(self.flag_bytes):
            data[byte::size] = bytes(len(data) // size)
        highest = max(self.words(data, min(size, 8))[:: 2 if size == 16 else 1], default=0)
        return self.base + highest * self.unit + self.block_bytes

    def places(self, raw: bytes) -> Iterator[_Place]:
        words = self.words(raw, min(self.entry_bytes, 8))
        if self.entry_bytes == 16:
            return map(self.place, words[::2], words[1::2])
        return map(self.place, words, words)


def lost(
    image_format: str,
    read: Read,
    size_bytes: int | Callable[[], int],
    *,
    snapshot: str = "",
    check: Callable[[], None] = lambda: None,
) -> Truncated | None:
    """Return what the tables of the image place behind the end of its file of `size_bytes`.

    None: nothing, or it cannot be told; what cannot be understood is QEMU's to refuse. `snapshot`: look at
    this internal one. `check` is called again and again, and may raise to give up.

    Of a file that somebody writes to `size_bytes` returns the size: it is asked after each table was read, and
    QEMU enters a block in a table when the block is in the file.
    """
    size_now = size_bytes if callable(size_bytes) else lambda: size_bytes
    parse = {"qed": _qed, "vdi": _vdi, "parallels": _parallels, "vmdk": _vmdk}.get(image_format)
    try:
        if image_format == "qcow2":
            found = _qcow2(read, snapshot)
        else:
            found = parse(read) if parse is not None else None
    except struct.error:
        return None  # it ends in its header
    return _behind(found, read, size_now, check) if found is not None else None


def _behind(
    found: _Map, read: Read, size_now: Callable[[], int], check: Callable[[], None]
) -> Truncated | None:
    first, length, is_cut = found.disk_bytes, 0, True
    for start, end, is_whole in _missing(found, read, size_now, check):
        first = min(first, start)
        length += max(0, min(end, found.disk_bytes) - start)
        is_cut = is_cut and not is_whole
    return Truncated(first, length, is_cut) if length else None


def _missing(
    found: _Map, read: Read, size_now: Callable[[], int], check: Callable[[], None]
) -> Iterator[tuple[int, int, bool]]:
    """Yield offsets [start, end) of the disk that the file does not have, and whether that is a whole block."""
    step = found.block_bytes
    for block, entries, raw in _tables(found, read, size_now):
        check()
        size_bytes = size_now()
        there = len(raw) // found.entry_bytes
        if there < entries:
            yield (block + there) * step, (block + entries) * step, True
        if found.furthest(raw) <= size_bytes:
            continue  # the usual case, and much faster than a look at each entry
        for number, place in enumerate(found.places(raw), block):
            if place is not None and place[1] > size_bytes and number * step < found.disk_bytes:
                start, end = place
                is_whole = start >= size_bytes
                lacks = step if end == start + _UNKNOWN_BYTES else min(step, end - size_bytes)
                yield (number + 1) * step - lacks, (number + 1) * step, is_whole


def _tables(
    found: _Map, read: Read, size_now: Callable[[], int]
) -> Iterator[tuple[int, int, bytes]]:
    """Yield each table of blocks: its first block, how many it has, and as much of it as there is."""
    width = min(found.entry_bytes, 8) if found.second_bytes else found.entry_bytes
    blocks = found.second_bytes // found.entry_bytes
    at_once = _SLICE_BYTES // width
    for first in range(0, found.first_entries, at_once):
        entries = min(at_once, found.first_entries - first)
        raw = _read(read, found.first_at + first * width, entries * width, size_now())
        if not found.second_bytes:
            yield first, entries, raw
            continue
        for number, entry in enumerate(found.words(raw, width), first):
            if at := found.table_at(entry):
                yield number * blocks, blocks, _read(read, at, found.second_bytes, size_now())
        there = len(raw) // width
        if there < entries:
            yield (first + there) * blocks, (entries - there) * blocks, b""


def _read(read: Read, at: int, length: int, size_bytes: int) -> bytes:
    return read(at, min(length, size_bytes - at)) if at < size_bytes else b""


# --- qcow2 ---

_QCOW_HEAD = struct.Struct(">4sI12xIQ4xIQ12xIQ")
_QCOW_FEATURES_AT = 72
_QCOW_DATA_FILE, _QCOW_EXTENDED = 0x04, 0x10
_QCOW_OFFSET = 0x00FF_FFFF_FFFF_FE00
_QCOW_COMPRESSED, _QCOW_ZERO = 1 << 62, 1
_QCOW_SUBCLUSTERS = 32
_QCOW_SNAPSHOT = struct.Struct(">QIHH20xI")
_MAX_SNAPSHOTS = 65536


def _qcow2(read: Read, snapshot: str) -> _Map | None:
    head = read(0, _QCOW_FEATURES_AT + 8).ljust(_QCOW_FEATURES_AT + 8, b"\0")
    magic, version, bits, disk, tables, first_at, snapshots, at = _QCOW_HEAD.unpack_from(head)
    if magic != b"QFI\xfb" or version not in (2, 3) or bits not in _QCOW_CLUSTER_BITS:
        return None
    features = struct.unpack_from(">Q", head, _QCOW_FEATURES_AT)[0] if version > 2 else 0
    if snapshot:
        there = _qcow2_snapshot(read, at, min(snapshots, _MAX_SNAPSHOTS), snapshot)
        if there is None:
            return None
        first_at, tables, disk = there[0], there[1], there[2] or disk
    cluster, entry_bytes = 1 << bits, 16 if features & _QCOW_EXTENDED else 8
    # Behind the disk's there may be those of a machine's memory.
    needed = -(-disk // (cluster // entry_bytes * cluster))
    compressed_bits = 62 - (bits - 8)

    def place(entry: int, subclusters: int) -> _Place:
        if entry & _QCOW_COMPRESSED:
            # Of one whose end is missing QEMU says so.
            start = entry & ((1 << compressed_bits) - 1)
            return start, start + _UNKNOWN_BYTES
        start = entry & _QCOW_OFFSET
        if not start or features & _QCOW_DATA_FILE:
            return None
        if entry_bytes == 16:
            # The last one that has data; the file may end behind it.
            last = (subclusters & 0xFFFF_FFFF).bit_length()
            size = cluster // _QCOW_SUBCLUSTERS
            return (start + (last - 1) * size, start + last * size) if last else None
        # In version 3 the first bit is set for zeroes, for which there may be room.
        return None if version > 2 and entry & _QCOW_ZERO else (start, start + cluster)

    return _Map(
        disk_bytes=disk,
        block_bytes=cluster,
        first_at=first_at,
        first_entries=min(tables, needed, _MAX_TABLE_BYTES // 8),
        second_bytes=cluster,
        entry_bytes=entry_bytes,
        order="big",
        place=place,
        table_at=lambda entry: entry & _QCOW_OFFSET,
        flag_bytes=1,
    )


def _qcow2_snapshot(read: Read, at: int, count: int, name: str) -> tuple[int, int, int] | None:
    """Return where its table of tables lies, how many entries that has, and the disk's size; 0: not told."""
    for _ in range(count):
        head = read(at, _QCOW_SNAPSHOT.size)
        first_at, tables, id_length, name_length, extra_length = _QCOW_SNAPSHOT.unpack(head)
        extra = read(at + len(head), 16) if extra_length >= 16 else bytes(16)
        names_at = at + len(head) + extra_length
        if read(names_at + id_length, name_length) == os.fsencode(name):
            return first_at, tables, struct.unpack_from(">Q", extra, 8)[0]
        at = names_at + id_length + name_length
        at += -at % 8
    return None


# --- the others ---

_QED_HEAD = struct.Struct("<4sII28xQQ")


def _qed(read: Read) -> _Map | None:
    magic, cluster, clusters, first_at, disk = _QED_HEAD.unpack(read(0, _QED_HEAD.size))
    table = cluster * clusters
    if magic != b"QED\0" or not 8 <= table <= _MAX_TABLE_BYTES:
        return None
    return _Map(
        disk_bytes=disk,
        block_bytes=cluster,
        first_at=first_at,
        first_entries=min(table // 8, -(-disk // (table // 8 * cluster))),
        second_bytes=table,
        entry_bytes=8,
        order="little",
        # 1 is a cluster of zeroes.
        place=lambda entry, _: (entry, entry + cluster) if entry > 1 else None,
    )


_VDI_HEAD = struct.Struct("<64xI272xII20xQI4xI")
_VDI_SIGNATURE = 0xBEDA107F
# This, and one more: no block, and a block of zeroes.
_VDI_DISCARDED = 0xFFFF_FFFE


def _vdi(read: Read) -> _Map | None:
    signature, first_at, base, disk, block, blocks = _VDI_HEAD.unpack(read(0, _VDI_HEAD.size))
    if signature != _VDI_SIGNATURE or not block:
        return None

    def place(entry: int, _: int) -> _Place:
        start = base + entry * block
        return (start, start + block) if entry < _VDI_DISCARDED else None

    return _Map(
        disk_bytes=disk,
        block_bytes=block,
        first_at=first_at,
        first_entries=min(blocks, -(-disk // block)),
        second_bytes=0,
        entry_bytes=4,
        order="little",
        place=place,
        unit=block,
        base=base,
    )


_PARALLELS_HEAD = struct.Struct("<16s12xIIQ")
# What an entry counts: sectors, or blocks.
_PARALLELS_UNITS = {b"WithoutFreeSpace": False, b"WithouFreSpacExt": True}


def _parallels(read: Read) -> _Map | None:
    magic, tracks, entries, sectors = _PARALLELS_HEAD.unpack(read(0, _PARALLELS_HEAD.size))
    if magic not in _PARALLELS_UNITS or not tracks:
        return None
    block = tracks * _SECTOR_BYTES
    unit = block if _PARALLELS_UNITS[magic] else _SECTOR_BYTES
    disk = (sectors if _PARALLELS_UNITS[magic] else sectors & 0xFFFF_FFFF) * _SECTOR_BYTES
    return _Map(
        disk_bytes=disk,
        block_bytes=block,
        first_at=64,
        first_entries=min(entries, -(-disk // block)),
        second_bytes=0,
        entry_bytes=4,
        order="little",
        place=lambda entry, _: (entry * unit, entry * unit + block) if entry else None,
        unit=unit,
    )


_VMDK_HEAD = struct.Struct("<4s4xIQQ16xI8xQ")
_VMDK_COMPRESSED = 1 << 16
# The directory is at the end, with a copy of the header, without which QEMU does not open it.
_VMDK_AT_END = (1 << 64) - 1


def _vmdk(read: Read) -> _Map | None:
    """One file with its own data. What is missing of compressed grains QEMU says itself."""
    magic, flags, sectors, grain, grains, first_at = _VMDK_HEAD.unpack(read(0, _VMDK_HEAD.size))
    is_plain = not flags & _VMDK_COMPRESSED and first_at != _VMDK_AT_END
    if magic != b"KDMV" or not is_plain or not grain or not 0 < grains * 4 <= _MAX_TABLE_BYTES:
        return None
    block = grain * _SECTOR_BYTES

    def place(entry: int, _: int) -> _Place:
        # 1 is a grain of zeroes.
        start = entry * _SECTOR_BYTES
        return (start, start + block) if entry > 1 else None

    return _Map(
        disk_bytes=sectors * _SECTOR_BYTES,
        block_bytes=block,
        first_at=first_at * _SECTOR_BYTES,
        first_entries=min(-(-sectors // (grain * grains)), _MAX_TABLE_BYTES // 4),
        second_bytes=grains * 4,
        entry_bytes=4,
        order="little",
        place=place,
        table_at=lambda entry: entry * _SECTOR_BYTES,
        unit=_SECTOR_BYTES,
    )
