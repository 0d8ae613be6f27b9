# SPDX-License-Identifier: Apache-2.0
"""Archives as another program might write them: everything that a reader must take.

An encoder of its own, which shares no code with `vmapipe.vma`: what both got
wrong in the same way would not be noticed otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

BLOCK = 4096
CLUSTER = 65536
UUID = bytes(range(100, 116))
#: dev_id, name, contents. `vmstate` is whole clusters.
Disk = tuple[int, str, bytes]
#: The same; large contents are made when they are asked for.
LazyDisk = tuple[int, str, bytes | Callable[[], bytes]]
#: dev_id, cluster number; or None: an empty slot.
Slot = tuple[int, int] | None


@dataclass
class Shape:
    """How a stranger writes: by default as the reference tool does."""

    extents: Callable[[list[Slot]], Iterable[Sequence[Slot]]] = lambda slots: pieces(slots, 58)
    order: Callable[[list[Slot]], list[Slot]] = lambda slots: slots
    #: Sizes in the header that are not the contents' own (memory: an estimate).
    estimates: dict[str, int] = field(default_factory=dict)
    header_bytes: int = 0
    table_at: int = 12288
    #: What stands where nothing has a meaning.
    junk: bool = False
    #: The last cluster of a disk has all its blocks, those beyond its end as well.
    full_end: bool = False
    #: Zero blocks are stored like others.
    stores_zeroes: bool = False
    #: The configs' slots in the header.
    config_slots: Sequence[int] = range(256)
    names_first: bool = False
    no_extent: bool = False


def pieces(slots: list[Slot], count: int) -> Iterable[Sequence[Slot]]:
    return [slots[at : at + count] for at in range(0, len(slots), count)] or [[]]


def write(shape: Shape, disks: Sequence[Disk], configs: Sequence[tuple[str, bytes]] = ()) -> bytes:
    slots: list[Slot] = [
        (dev_id, num) for dev_id, _, data in disks for num in range(-(-len(data) // CLUSTER))
    ]
    out = [_header(shape, disks, configs)]
    contents = {dev_id: (name, data) for dev_id, name, data in disks}
    if not shape.no_extent:
        extents = shape.extents(shape.order(slots))
        out += [_extent(shape, contents, extent) for extent in extents]
    return b"".join(out)


def _header(shape: Shape, disks: Sequence[Disk], configs: Sequence[tuple[str, bytes]]) -> bytes:
    chance = random.Random(7)
    table = bytearray(1)
    if shape.junk:
        table[0] = 0xAA

    def add(blob: bytes) -> int:
        table.extend(struct.pack("<H", len(blob)) + blob)
        return len(table) - 2 - len(blob)

    head = bytearray(chance.randbytes(12288) if shape.junk else 12288)
    head[2044:4092] = bytes(2048)
    head[4096:12288] = bytes(8192)

    def put_disks() -> None:
        for dev_id, name, data in disks:
            size = shape.estimates.get(name, len(data))
            at, junk = add(name.encode() + b"\0"), 0xDEADBEEF if shape.junk else 0
            entry = struct.pack(">IIQQQ", at, junk, size, junk, junk)
            head[4096 + 32 * dev_id : 4128 + 32 * dev_id] = entry

    if shape.names_first:
        put_disks()
    for slot, (name, data) in zip(shape.config_slots, configs, strict=False):
        struct.pack_into(">I", head, 2044 + 4 * slot, add(name.encode() + b"\0"))
        struct.pack_into(">I", head, 3068 + 4 * slot, add(data))
    if not shape.names_first:
        put_disks()
    if shape.junk:
        # dev_id 0 and 255 are nobody's; a name without a size, a size without a name.
        name_at = add(b"nobody\0")
        for dev_id, entry in ((0, (name_at, 0, 99)), (255, (name_at, 0, 99))):
            struct.pack_into(">IIQ", head, 4096 + 32 * dev_id, *entry)
        struct.pack_into(">IIQ", head, 4096 + 32 * 200, name_at, 0, 0)
        struct.pack_into(">IIQ", head, 4096 + 32 * 201, 0, 0, 99)
        struct.pack_into(">I", head, 2044 + 4 * 250, name_at)
        struct.pack_into(">I", head, 3068 + 4 * 251, name_at)
    least = shape.table_at + len(table)
    size = shape.header_bytes or -(-least // 512) * 512
    raw = bytearray(chance.randbytes(size) if shape.junk else size)
    raw[:12288] = head
    raw[shape.table_at : least] = table
    fixed = (b"VMA\0", 1, UUID, 1353949200, bytes(16), shape.table_at, len(table), size)
    struct.pack_into(">4sI16sq16sIII", raw, 0, *fixed)
    raw[32:48] = hashlib.md5(raw, usedforsecurity=False).digest()
    return bytes(raw)


def _extent(shape: Shape, contents: dict[int, tuple[str, bytes]], slots: Sequence[Slot]) -> bytes:
    words, stored = [], []
    for slot in slots:
        if slot is None:
            words.append(0xFFFF_FF00_0000_0007 if shape.junk else 0)
            continue
        dev_id, num = slot
        _, data = contents[dev_id]
        mask = 0
        ends_here = (num + 1) * CLUSTER > len(data)
        for bit in range(16):
            at = num * CLUSTER + bit * BLOCK
            block = data[at : at + BLOCK]
            full = shape.full_end and ends_here
            if full or (block and (shape.stores_zeroes or block.strip(b"\0"))):
                mask |= 1 << bit
                stored.append(block.ljust(BLOCK, b"\xee" if shape.junk else b"\0"))
        words.append(mask << 48 | (0x5A << 40 if shape.junk else 0) | dev_id << 32 | num)
    words += [0xFFFF_0000_0000_0000 if shape.junk else 0] * (59 - len(words))
    raw = bytearray(struct.pack(">4sHH16s16s59Q", b"VMAE", 0, len(stored), UUID, bytes(16), *words))
    raw[24:40] = hashlib.md5(raw, usedforsecurity=False).digest()
    return bytes(raw) + b"".join(stored)


def _disk(seed: int, size: int) -> Callable[[], bytes]:
    return functools.partial(_contents, seed, size)


@functools.cache
def _contents(seed: int, size: int) -> bytes:
    """Random clusters, zero ones, and mixed ones."""
    chance = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        kind = chance.randrange(4)
        if kind == 0:
            out += bytes(CLUSTER)
        elif kind == 1:
            out += chance.randbytes(CLUSTER)
        else:
            out += b"".join(
                chance.choice((bytes(BLOCK), chance.randbytes(BLOCK))) for _ in range(16)
            )
    return bytes(out[:size])


def _shuffled(slots: list[Slot]) -> list[Slot]:
    """Any order, but memory in its own; with empty slots in between."""
    chance = random.Random(3)
    memory = [slot for slot in slots if slot and slot[0] == MEMORY_ID]
    others: list[Slot] = [slot for slot in slots if slot and slot[0] != MEMORY_ID]
    chance.shuffle(others)
    places = sorted(chance.sample(range(len(slots)), len(memory)))
    for place, slot in zip(places, memory, strict=True):
        others.insert(place, slot)
    return others


def _with_gaps(slots: list[Slot]) -> Iterable[Sequence[Slot]]:
    for at in range(0, len(slots), 20):
        yield [None, *(item for slot in slots[at : at + 20] for item in (slot, None)), None]


def _with_empty_extents(slots: list[Slot]) -> Iterable[Sequence[Slot]]:
    yield []
    for piece in pieces(slots, 7):
        yield piece
        yield []
        yield [None] * 59


MEMORY_ID = 99
SCSI: LazyDisk = (1, "drive-scsi0", _disk(1, 70 * CLUSTER))
ODD: LazyDisk = (2, "drive-ide0", _disk(2, 3 * CLUSTER + 70_001))
TINY: LazyDisk = (3, "drive-tpmstate0-backup", b"\x01")
TAIL: LazyDisk = (4, "drive-efidisk0", _disk(4, 2 * CLUSTER + 512))
ZERO: LazyDisk = (5, "drive-virtio0", functools.partial(bytes, 61 * CLUSTER + 1))
MEMORY: LazyDisk = (MEMORY_ID, "vmstate", lambda: _contents(6, 5 * CLUSTER) + bytes(CLUSTER))
USUAL = [SCSI, ODD, TINY, TAIL, ZERO]
CONFIGS = [("qemu-server.conf", b"memory: 512\n"), ("qemu-server.fw", b""), ("x", bytes(65535))]


def _renumbered(*ids: int) -> list[LazyDisk]:
    return [(dev_id, name, data) for dev_id, (_, name, data) in zip(ids, USUAL, strict=True)]


def _many() -> list[LazyDisk]:
    return [(n, f"drive-scsi{n}", _disk(n, n * 30_011)) for n in range(1, 41)]


#: What it is: how it is written, and what is in it.
ARCHIVES: dict[str, tuple[Shape, list[LazyDisk], list[tuple[str, bytes]]]] = {
    "as the reference": (Shape(), USUAL, CONFIGS),
    "59 clusters an extent": (Shape(extents=lambda s: pieces(s, 59)), USUAL, CONFIGS),
    "one cluster an extent": (Shape(extents=lambda s: pieces(s, 1)), USUAL, CONFIGS),
    "empty slots between used ones": (Shape(extents=_with_gaps), USUAL, CONFIGS),
    "empty slots with junk": (Shape(extents=_with_gaps, junk=True), USUAL, CONFIGS),
    "empty extents": (Shape(extents=_with_empty_extents), USUAL, CONFIGS),
    "backwards": (Shape(order=lambda s: s[::-1]), USUAL, CONFIGS),
    "any order": (Shape(order=_shuffled), [*USUAL, MEMORY], CONFIGS),
    "junk wherever nothing counts": (Shape(junk=True), [*USUAL, MEMORY], CONFIGS),
    "full masks at the end": (Shape(full_end=True, junk=True), USUAL, CONFIGS),
    "zero blocks stored": (Shape(stores_zeroes=True), USUAL, CONFIGS),
    "a header larger than needed": (Shape(header_bytes=262_144), USUAL, CONFIGS),
    "the largest header": (Shape(header_bytes=524_288, junk=True), USUAL, CONFIGS),
    "a header of no multiple of 512": (Shape(header_bytes=78_901), USUAL, CONFIGS),
    "a table behind a gap": (Shape(table_at=13_333, header_bytes=131_071), USUAL, CONFIGS),
    "names before configs": (Shape(names_first=True), USUAL, CONFIGS),
    "configs in odd slots": (Shape(config_slots=(3, 100, 255)), USUAL, CONFIGS),
    "any dev_id": (Shape(order=_shuffled), _renumbered(254, 17, 1, 128, 127), CONFIGS),
    "memory longer than said": (Shape(estimates={"vmstate": 1}), [SCSI, MEMORY], CONFIGS),
    "memory shorter than said": (Shape(estimates={"vmstate": 1 << 40}), [MEMORY, ODD], []),
    "memory before, between and behind": (Shape(order=_shuffled), [MEMORY, TAIL, ODD], []),
    "memory only": (Shape(), [MEMORY], []),
    "a memory of nothing": (Shape(estimates={"vmstate": 1 << 30}), [(1, "vmstate", b""), ODD], []),
    "40 disks, interleaved": (Shape(order=_shuffled), _many(), []),
    "254 disks": (Shape(), [(n, f"d{n}", bytes([n]) * n) for n in range(1, 255)], []),
    "256 configs": (Shape(), [TINY], [(f"c{n}", b"c" * n) for n in range(256)]),
    "configs only": (Shape(), [], CONFIGS),
    "configs only, and no extent": (Shape(no_extent=True), [], CONFIGS),
    "nothing but zeroes": (Shape(), [ZERO], []),
    "one byte": (Shape(), [TINY], []),
}


def archive_of(name: str) -> tuple[bytes, dict[str, bytes]]:
    """The archive, and the files that a restore of it makes."""
    shape, lazy, configs = ARCHIVES[name]
    disks: list[Disk] = [
        (dev_id, disk, data if isinstance(data, bytes) else data()) for dev_id, disk, data in lazy
    ]
    files = dict(configs)
    for _, disk, data in disks:
        files["vmstate.bin" if disk == "vmstate" else f"disk-{disk}.raw"] = data
    return write(shape, disks, configs), files
