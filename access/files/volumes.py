# SPDX-License-Identifier: Apache-2.0
"""What lies in what on an archive's disks: partitions, encrypted volumes, logical volumes.

Each layer is looked into in turn, whatever the order: a partition may hold a LUKS volume which
holds a physical volume of LVM, whose logical volumes may be encrypted again. Partitions are numbered
as Linux numbers them. A table may lie: what it says is cut to the disk, a chain that turns back ends,
and a GPT whose checksums are wrong is not believed; its second copy at the disk's end may be good.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vmapipe.access.files import luks, lvm
from vmapipe.access.files.messages import WRONG_KEY, Key
from vmapipe.access.files.sources import ByteSource, Piece, mapped, part_of

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


# More than any machine has; who made more wants to keep this program busy.
_MAX_NODES = 4096
# Layers around a file system: a partition, LUKS, LVM, LUKS are three.
_MAX_LAYERS = 6
# How what is known begins: where, with what. Some of it no parser here reads.
_SIGNATURES = (
    (0, b"XFSB", b"xfs"),
    (0x10040, b"_BHRfS_M", b"btrfs"),
    (0, luks.MAGIC, b"luks1"),
    (0, b"LUKS\xba\xbe\0\2", b"luks2"),
    (0x18, b"LVM2 001", b"lvm"),
    (0x218, b"LVM2 001", b"lvm"),
    (3, b"-FVE-FS-", b"bitlocker"),
    (3, b"NTFS    ", b"ntfs"),
    (3, b"EXFAT   ", b"exfat"),
    (0x36, b"FAT12", b"fat12"),
    (0x36, b"FAT16", b"fat16"),
    (0x52, b"FAT32", b"fat32"),
    (0x438, b"\x53\xef", b"ext4"),
    (0x8001, b"CD001", b"iso9660"),
    (0x400, b"H+\0\4", b"hfs+"),
    (0x400, b"HX\0\5", b"hfs+"),
    (8192 + 1372, b"\x54\x19\x01\0", b"ufs1"),
    (65536 + 1372, b"\x19\x01\x54\x19", b"ufs2"),
    (0xFF6, b"SWAPSPACE2", b"swap"),
)

#: Tables of partitions that are neither MBR nor GPT: of a library, in C.
OtherTables = Callable[[ByteSource], list[Partition]]


class Node(NamedTuple):
    """A stretch of the disks that may hold a file system, or is known to hold none.

    `name` tells it from others of the disk: "2" for a partition, "/vg/root" for a logical
    volume, "/vg/root:1" for a partition in it. `kind`: what it is, where it is not looked into as a
    file system; `remark`: why not. `is_container`: what is in it has nodes of its own.
    """

    disk: int
    name: str
    offset: int
    source: ByteSource
    layers: tuple[str, ...] = ()
    disks: frozenset[int] = frozenset()
    kind: bytes = b""
    remark: str = ""
    is_container: bool = False

    def known(self, kind: str, remark: str = "", *, is_container: bool = False) -> Node:
        """The same as something that is not looked into as a file system."""
        return self._replace(kind=kind.encode(), remark=remark, is_container=is_container)


def signature(source: ByteSource) -> bytes:
    """What its first bytes say that it is; empty: not known. Raises OSError."""
    for offset, magic, kind in _SIGNATURES:
        if offset + len(magic) <= source.size_bytes and source.read(offset, len(magic)) == magic:
            return kind
    return b""


def scan(disks: Sequence[ByteSource], keys: Sequence[Key], other_tables: OtherTables) -> list[Node]:
    """All that there is, by disk. What cannot be read is there, too, and says so."""
    found: list[Node] = []
    waiting = deque(
        Node(index, "", 0, source, disks=frozenset([index])) for index, source in enumerate(disks)
    )
    pool = _Pool()
    while waiting:
        node = waiting.popleft()
        if len(found) + len(waiting) > _MAX_NODES:
            found.append(node.known("", "there are too many volumes: this one is not looked into"))
            break
        try:
            inner = list(_look_into(node, keys, pool, other_tables))
        except OSError:
            inner = [node.known("damaged")]
        except (luks.LuksError, lvm.LvmError) as error:
            kind = "luks1" if isinstance(error, luks.LuksError) else "lvm"
            inner = [node.known(kind, str(error))]
        for item in inner:
            is_done = item is node or item.kind or len(item.layers) > _MAX_LAYERS
            (found if is_done else waiting).append(item)
        if not waiting:
            found += pool.holders()
            for node in pool.volumes():
                (found if node.kind else waiting).append(node)
    # Stable: a disk's partitions, then what is in them.
    return sorted(found, key=lambda node: node.disk)


def _look_into(
    node: Node, keys: Sequence[Key], pool: _Pool, other_tables: OtherTables
) -> Iterator[Node]:
    """The node itself where it has no further layer. Raises OSError, LuksError, LvmError."""
    kind = signature(node.source)
    if kind == b"luks1":
        yield _unlocked(node, keys)
        return
    if kind == b"lvm" or node.source.read(0, 8) == b"LABELONE":
        label = lvm.read_label(node.source)
        if label is not None:
            pool.add(node, label)
            return
    parts = _parts(node, kind, other_tables)
    if not parts:
        yield node
        return
    prefix = f"{node.name}:" if node.name else ""
    for part in parts:
        inner = node._replace(
            name=f"{prefix}{part.number}",
            offset=node.offset + part.offset,
            source=part_of(node.source, part.offset, part.size_bytes),
        )
        if not part.size_bytes:
            yield inner.known("", "it begins behind the end of the disk")
        else:
            yield inner


def _parts(node: Node, kind: bytes, other_tables: OtherTables) -> list[Partition]:
    """The partitions in it, if it is a disk or a logical volume: nobody divides a partition."""
    if node.name and not (node.name.startswith("/") and ":" not in node.name):
        return []
    best: list[Partition] = []
    for size in SECTOR_SIZES:
        parts = partitions(node.source, size)
        if any(_is_known(node.source, part) for part in parts):
            return parts
        best = best or parts
    # The boot sector of a file system without partitions can pass for a table of them.
    if kind:
        return []
    return best or other_tables(node.source)


def _is_known(source: ByteSource, part: Partition) -> bool:
    try:
        return bool(signature(part_of(source, part.offset, part.size_bytes)))
    except OSError:
        return False


# --- LUKS ---


def _unlocked(node: Node, keys: Sequence[Key]) -> Node:
    """With what is encrypted for its source, if a key opens it. Raises OSError, LuksError."""
    header = luks.parse_header(node.source.read(0, luks.HEADER_BYTES))
    own = [key for key in keys if key.disk in node.disks and key.name in (node.name.encode(), b"")]
    candidates = own or [key for key in keys if key.disk < 0]
    for key in candidates:
        volume_key = luks.unlock(header, node.source, key.secret)
        if volume_key is not None:
            inner = luks.opened(header, node.source, volume_key)
            return node._replace(source=inner, layers=(*node.layers, "luks1"))
    if not candidates:
        return node.known("luks1", "encrypted: give its key with --key-file")
    names = ", ".join(key.label.decode("utf-8", "replace") for key in candidates)
    return node.known("luks1", f"{WRONG_KEY.decode()}{names} opens none of its key slots")


# --- LVM ---


class _Pool:
    """Physical volumes by their id, and the groups that they describe."""

    def __init__(self) -> None:
        self._members: dict[str, list[Node]] = {}
        self._labels: list[tuple[Node, lvm.Label]] = []
        self._latest: dict[str, lvm.VolumeGroup] = {}
        self._done: set[str] = set()
        self._names: set[tuple[int, str]] = set()

    def add(self, node: Node, label: lvm.Label) -> None:
        self._members.setdefault(label.uuid, []).append(node)
        self._labels.append((node, label))
        for group in label.groups:
            known = self._latest.get(group.uuid)
            if group.uuid not in self._done and (known is None or known.number < group.number):
                self._latest[group.uuid] = group

    def holders(self) -> list[Node]:
        """The physical volumes that were added since the last call, with what they are part of."""
        labels, self._labels = self._labels, []
        return [self._holder(node, label) for node, label in labels]

    def _holder(self, node: Node, label: lvm.Label) -> Node:
        for group in self._latest.values():
            if label.uuid in group.pv_uuids:
                return node.known("lvm", f"holds /{group.name}", is_container=True)
        if label.problem:
            return node.known("lvm", label.problem)
        return node.known("lvm", "no disk of this archive says what is in it")

    def volumes(self) -> Iterator[Node]:
        """The logical volumes of groups that were not yet asked for."""
        for group in list(self._latest.values()):
            if group.uuid in self._done:
                continue
            self._done.add(group.uuid)
            members = [node for uuid in group.pv_uuids for node in self._members.get(uuid, ())]
            # None: the text names no physical volume that there is, not even the one it was on.
            for volume in group.volumes if members else ():
                yield self._node(group, volume, members)

    def _node(self, group: lvm.VolumeGroup, volume: lvm.LogicalVolume, members: list[Node]) -> Node:
        disks = frozenset(disk for node in members for disk in node.disks)
        stripes = [stripe for segment in volume.segments for stripe in segment.stripes]
        homes = [self._members.get(stripe.pv_uuid, []) for stripe in stripes]
        first = homes[0][0].disk if homes and homes[0] else min(disks)
        name = f"/{group.name}/{volume.name}"
        if (first, name) in self._names:  # two groups of one name, of two machines perhaps
            name = f"/{group.name}@{group.uuid[:6]}/{volume.name}"
        self._names.add((first, name))
        layers = max((node.layers for node in members), key=len)
        node = Node(
            first, name, 0, ByteSource(_nothing, volume.size_bytes), (*layers, "lvm"), disks
        )
        if volume.kind:
            return node.known(f"lvm {volume.kind}")
        for stripe, home in zip(stripes, homes, strict=True):
            if len(home) != 1:
                text = f"its physical volume {stripe.pv_uuid} is not in this archive"
                if home:
                    text = f"its physical volume {stripe.pv_uuid} is there more than once"
                return node.known("lvm", text)
        pieces = [
            Piece(
                segment.start,
                segment.length,
                tuple(
                    (self._members[stripe.pv_uuid][0].source, stripe.offset)
                    for stripe in segment.stripes
                ),
                segment.stripe_bytes,
            )
            for segment in volume.segments
        ]
        return node._replace(source=mapped(pieces))


def _nothing(offset: int, length: int) -> bytes:
    raise OSError("it is not mapped")
