# SPDX-License-Identifier: Apache-2.0
"""What a parser of ext2, ext3 and ext4 leaves out: the journal, an inode's further fields, large folders. Pure.

A file system that was in use when it was copied holds its last changes in its journal
only. `replayed_blocks` says which of the journal's blocks belong where, as recovery would
put them: committed transactions in order, less what was revoked later. Layout:
fs/jbd2 and fs/ext4 in Documentation/filesystems of the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES = 1024, 1024
_EXT_MAGIC = 0xEF53
_JOURNAL_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _REVOKE = 1, 2, 5
_NEEDS_RECOVERY, _META_BG, _64BIT = 0x4, 0x10, 0x80
_BIGALLOC = 0x200
# Of the journal's own features: revoked blocks, 64-bit numbers, checksums in the tags.
_JOURNAL_64BIT, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 0x2, 0x8, 0x10, 0x20
_ESCAPED, _SAME_UUID, _LAST_TAG = 1, 2, 8
_XATTR_MAGIC = 0xEA020000
# ext4.h: EXT4_XATTR_INDEX_…
_XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
    7: b"system.",
    8: b"system.richacl",
}
# A value in a place of its own is 64 KiB at most; more than these are not of use to anybody.
_MAX_XATTRS = 256

Read = Callable[[int, int], bytes]  # offset, length


class ExtError(Exception):
    """Not what these file systems hold there: damaged, or made to deceive."""


class Superblock(NamedTuple):
    """What is needed of it. Sizes in bytes."""

    block_bytes: int
    inodes_per_group: int
    inode_bytes: int
    group_bytes: int
    first_block: int
    needs_recovery: bool
    journal_inode: int
    has_outer_journal: bool
    has_meta_groups: bool


def parse_superblock(raw: bytes) -> Superblock:
    """Raises ExtError for anything else than a superblock of ext2, ext3 or ext4."""
    if len(raw) < SUPERBLOCK_BYTES or struct.unpack_from("<H", raw, 56)[0] != _EXT_MAGIC:
        raise ExtError("not a superblock of ext4")
    first, shift = struct.unpack_from("<2I", raw, 20)
    inodes_per_group = struct.unpack_from("<I", raw, 40)[0]
    revision = struct.unpack_from("<I", raw, 76)[0]
    inode_bytes = struct.unpack_from("<H", raw, 88)[0] if revision else 128
    incompat = struct.unpack_from("<I", raw, 96)[0] if revision else 0
    group_bytes = struct.unpack_from("<H", raw, 254)[0] if incompat & _64BIT else 32
    if shift > 6 or not inodes_per_group or inode_bytes < 128 or group_bytes < 32:
        raise ExtError("a superblock of ext4 with impossible sizes")
    return Superblock(
        1024 << shift,
        inodes_per_group,
        inode_bytes,
        group_bytes,
        first,
        bool(incompat & _NEEDS_RECOVERY),
        struct.unpack_from("<I", raw, 224)[0],
        bool(struct.unpack_from("<I", raw, 92)[0] & 0x4 and struct.unpack_from("<I", raw, 228)[0]),
        bool(incompat & _META_BG),
    )


def has_clusters(raw: bytes) -> bool:
    """Whether a superblock says that space is given out in clusters of blocks (bigalloc)."""
    return len(raw) >= SUPERBLOCK_BYTES and bool(struct.unpack_from("<I", raw, 100)[0] & _BIGALLOC)


# --- The journal ---


class Replayed(NamedTuple):
    """By number of a block of the file system: the journal's block with its new content.

    `escaped`: blocks whose first four bytes are the journal's magic number again.
    """

    blocks: dict[int, int]
    escaped: frozenset[int]
    transactions: int

    def content(self, block: int, raw: bytes) -> bytes:
        """What belongs into `block`, of which `raw` is the journal's copy."""
        return struct.pack(">I", _JOURNAL_MAGIC) + raw[4:] if block in self.escaped else raw


class _Journal(NamedTuple):
    """Its superblock. Blocks are counted in the journal."""

    block_bytes: int
    blocks: int
    first: int
    sequence: int
    start: int
    features: int

    @property
    def tail_bytes(self) -> int:
        """A checksum at the end of a descriptor."""
        return 4 if self.features & (_CSUM_V2 | _CSUM_V3) else 0

    def next(self, block: int) -> int:
        return self.first if block + 1 >= self.blocks else block + 1


def replayed_blocks(read_block: Callable[[int], bytes]) -> Replayed:
    """Read the journal by its own block numbers. Raises ExtError where it is not a journal."""
    journal = _parse_journal(read_block(0))
    if not journal.start:
        return Replayed({}, frozenset(), 0)
    if journal.features & _FAST_COMMIT:
        raise ExtError("its journal has fast commits, which only the kernel replays")
    revoked: dict[int, int] = {}
    for sequence, tags, gone in _transactions(journal, read_block):
        del tags
        for block in gone:
            revoked[block] = sequence
    blocks: dict[int, int] = {}
    escaped: set[int] = set()
    count = 0
    for sequence, tags, _ in _transactions(journal, read_block):
        count += 1
        for block, place, is_escaped in tags:
            if revoked.get(block, sequence - 1) >= sequence:
                continue
            blocks[block] = place
            (escaped.add if is_escaped else escaped.discard)(block)
    return Replayed(blocks, frozenset(escaped), count)


def _parse_journal(raw: bytes) -> _Journal:
    if len(raw) < 1024:
        raise ExtError("its journal is cut off")
    magic, kind = struct.unpack_from(">2I", raw)
    if magic != _JOURNAL_MAGIC or kind not in (3, 4):
        raise ExtError("it has no journal where one should be")
    block_bytes, blocks, first, sequence, start = struct.unpack_from(">5I", raw, 12)
    features = struct.unpack_from(">I", raw, 40)[0] if kind == 4 else 0
    if not 1024 <= block_bytes <= 65536 or not 0 < first < blocks or start >= blocks:
        raise ExtError("its journal has impossible sizes")
    return _Journal(block_bytes, blocks, first, sequence, start, features)


_Tag = tuple[int, int, bool]  # the file system's block, the journal's, whether it is escaped


def _transactions(
    journal: _Journal, read_block: Callable[[int], bytes]
) -> Iterator[tuple[int, list[_Tag], list[int]]]:
    """Those that were committed, oldest first: number, blocks, revoked blocks."""
    place, sequence = journal.start, journal.sequence
    tags: list[_Tag] = []
    gone: list[int] = []
    # Each step passes at least one block, and the journal cannot be longer than itself.
    for _ in range(journal.blocks):
        raw = read_block(place)
        if len(raw) < journal.block_bytes:
            return
        magic, kind, number = struct.unpack_from(">3I", raw)
        if magic != _JOURNAL_MAGIC or number != sequence:
            return
        place = journal.next(place)
        if kind == _DESCRIPTOR:
            for block, is_escaped in _tags(journal, raw):
                tags.append((block, place, is_escaped))
                place = journal.next(place)
                if len(tags) > journal.blocks:
                    raise ExtError("a transaction of its journal is larger than the journal")
        elif kind == _REVOKE:
            gone += _revoked(journal, raw)
        elif kind == _COMMIT:
            yield sequence, tags, gone
            tags, gone = [], []
            sequence = (sequence + 1) & 0xFFFFFFFF
        else:
            return


def _tags(journal: _Journal, raw: bytes) -> Iterator[tuple[int, bool]]:
    wide = bool(journal.features & _JOURNAL_64BIT)
    at, end = 12, len(raw) - journal.tail_bytes
    size = 16 if journal.features & _CSUM_V3 else 12 if wide else 8
    while at + size <= end:
        if journal.features & _CSUM_V3:
            low, flags, high = struct.unpack_from(">3I", raw, at)
        else:
            low, _, flags = struct.unpack_from(">I2H", raw, at)
            high = struct.unpack_from(">I", raw, at + 8)[0] if wide else 0
        at += size + (0 if flags & _SAME_UUID else 16)
        yield (high if wide else 0) << 32 | low, bool(flags & _ESCAPED)
        if flags & _LAST_TAG:
            return


def _revoked(journal: _Journal, raw: bytes) -> list[int]:
    used = min(struct.unpack_from(">I", raw, 12)[0], len(raw) - journal.tail_bytes)
    size = 8 if journal.features & _JOURNAL_64BIT else 4
    return [int.from_bytes(raw[at : at + size], "big") for at in range(16, used - size + 1, size)]


# --- Folders ---

# An entry's inode, length and name's length; the shortest one (a name has padding, and an end of checksums).
_ENTRY = struct.Struct("<IHB")
_ENTRY_BYTES = 12
# The length in 16 bits that stands for a block of 64 KiB.
_WHOLE_64K = (0, 0xFFFF)


def folder_entries(block: bytes) -> Iterator[tuple[bytes, int]]:
    """Names and inodes in a block of a folder. Raises ExtError behind those in front of damage.

    A block of a folder's index is one entry without an inode: what is inside of it is no name.
    """
    at = 0
    while at < len(block):
        if at + _ENTRY_BYTES > len(block):
            raise ExtError("the folder's last entry is cut off")
        inode, length, name_bytes = _ENTRY.unpack_from(block, at)
        if length in _WHOLE_64K and len(block) == 1 << 16:
            length = 1 << 16
        if length < _ENTRY_BYTES or length % 4 or length > len(block) - at:
            raise ExtError("an entry of the folder is damaged")
        if inode and name_bytes:
            if 8 + name_bytes > length:
                raise ExtError("an entry of the folder is damaged")
            yield block[at + 8 : at + 8 + name_bytes], inode
        at += length


# --- Inodes ---


class Inode(NamedTuple):
    """What a parser does not tell of it. `device`: of a device node, as in stat(2)."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]


def read_inode(read: Read, superblock: Superblock, number: int) -> Inode:
    """`read` has the journal replayed. Raises ExtError."""
    if superblock.has_meta_groups:
        raise ExtError("its groups are described in places of their own (meta_bg)")
    group, index = divmod(number - 1, superblock.inodes_per_group)
    table = (superblock.first_block + 1) * superblock.block_bytes
    raw_group = read(table + group * superblock.group_bytes, superblock.group_bytes)
    if number < 1 or len(raw_group) < superblock.group_bytes:
        raise ExtError(f"there is no inode {number}")
    block = struct.unpack_from("<I", raw_group, 8)[0]
    if superblock.group_bytes >= 64:
        block |= struct.unpack_from("<I", raw_group, 40)[0] << 32
    at = block * superblock.block_bytes + index * superblock.inode_bytes
    raw = read(at, superblock.inode_bytes)
    if len(raw) < superblock.inode_bytes:
        raise ExtError(f"inode {number} lies behind the end")
    return _parse_inode(read, superblock, raw)


def _parse_inode(read: Read, superblock: Superblock, raw: bytes) -> Inode:
    mode, uid = struct.unpack_from("<2H", raw)
    seconds = struct.unpack_from("<i", raw, 16)[0]
    gid = struct.unpack_from("<H", raw, 24)[0]
    uid |= struct.unpack_from("<H", raw, 120)[0] << 16
    gid |= struct.unpack_from("<H", raw, 122)[0] << 16
    extra_bytes = struct.unpack_from("<H", raw, 128)[0] if len(raw) >= 130 else 0
    nanoseconds = 0
    if extra_bytes >= 12 and len(raw) >= 140:
        extra = struct.unpack_from("<I", raw, 136)[0]
        seconds += (extra & 3) << 32
        nanoseconds = min(extra >> 2, 999_999_999)
    old, new = struct.unpack_from("<2I", raw, 40)
    device = (old >> 8 & 0xFF, old & 0xFF)
    if not old:
        device = (new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00)
    xattrs = _inline_xattrs(raw, 128 + extra_bytes)
    block = struct.unpack_from("<I", raw, 104)[0] | struct.unpack_from("<H", raw, 118)[0] << 32
    if block:
        page = read(block * superblock.block_bytes, superblock.block_bytes)
        if len(page) >= 32 and struct.unpack_from("<I", page)[0] == _XATTR_MAGIC:
            xattrs.update(_xattrs(page, 32, 0))
    return Inode(mode, uid, gid, seconds * 10**9 + nanoseconds, device, xattrs)


def _inline_xattrs(raw: bytes, at: int) -> dict[bytes, bytes]:
    if at + 4 > len(raw) or struct.unpack_from("<I", raw, at)[0] != _XATTR_MAGIC:
        return {}
    return _xattrs(raw, at + 4, at + 4)


def _xattrs(raw: bytes, at: int, base: int) -> dict[bytes, bytes]:
    """Entries one behind the other; their values lie at offsets from `base`.

    One that lies in an inode of its own (ea_inode) is left out.
    """
    found: dict[bytes, bytes] = {}
    while at + 16 <= len(raw) and len(found) < _MAX_XATTRS:
        length, kind, offset, inode, size = struct.unpack_from("<2BHII", raw, at)
        if not (length or kind or offset or inode):
            break
        name = raw[at + 16 : at + 16 + length]
        prefix = _XATTR_PREFIXES.get(kind)
        if prefix is not None and not inode and base + offset + size <= len(raw):
            value = raw[base + offset : base + offset + size]
            found[prefix + name] = _acl(value) if kind in (2, 3) else value
        at += (16 + length + 3) & ~3
    found.pop(b"system.data", None)  # the content of a tiny file
    return found


def _acl(raw: bytes) -> bytes:
    """An access control list as getxattr(2) gives it: version 2, an id in each entry."""
    if raw[:4] != struct.pack("<I", 1):
        return raw
    rows = [struct.pack("<I", 2)]
    at = 4
    while at + 4 <= len(raw):
        tag, rights = struct.unpack_from("<2H", raw, at)
        at += 4
        number = 0xFFFFFFFF
        if tag in (0x02, 0x08) and at + 4 <= len(raw):  # of one user, of one group
            number = struct.unpack_from("<I", raw, at)[0]
            at += 4
        rows.append(struct.pack("<2HI", tag, rights, number))
    return b"".join(rows)
