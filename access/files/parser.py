# SPDX-License-Identifier: Apache-2.0
"""File systems, read with The Sleuth Kit (pytsk3).

What it reads may be made by a stranger: run it only in a process without rights (child.py).
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from typing import Any

import pytsk3

from vmapipe.access.files import ext
from vmapipe.access.files.image import ParserImage
from vmapipe.access.files.lookup import find_file
from vmapipe.access.files.messages import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    FIFO,
    FILE,
    FOLDER,
    LINK,
    MAX_DATA_BYTES,
    MAX_PATH_BYTES,
    MAX_WORD_BYTES,
    MAX_XATTRS,
    SOCKET,
    Entry,
    EntryFailed,
    FileData,
    Stretch,
    Volume,
)
from vmapipe.access.files.sources import ByteSource, joined
from vmapipe.access.files.volumes import Node, Partition, signature

#: What the library raises: RuntimeError for what our own `read` raised below it.
PARSER_ERRORS = (OSError, RuntimeError)

_KINDS = {
    int(pytsk3.TSK_FS_META_TYPE_REG): FILE,
    int(pytsk3.TSK_FS_META_TYPE_DIR): FOLDER,
    int(pytsk3.TSK_FS_META_TYPE_LNK): LINK,
    int(pytsk3.TSK_FS_META_TYPE_CHR): CHARACTER_DEVICE,
    int(pytsk3.TSK_FS_META_TYPE_BLK): BLOCK_DEVICE,
    int(pytsk3.TSK_FS_META_TYPE_FIFO): FIFO,
    int(pytsk3.TSK_FS_META_TYPE_SOCK): SOCKET,
}
_EXT = {
    int(pytsk3.TSK_FS_TYPE_EXT2): b"ext2",
    int(pytsk3.TSK_FS_TYPE_EXT3): b"ext3",
    int(pytsk3.TSK_FS_TYPE_EXT4): b"ext4",
}
_NTFS = int(pytsk3.TSK_FS_TYPE_NTFS)
_NAMES = {
    **_EXT,
    _NTFS: b"ntfs",
    int(pytsk3.TSK_FS_TYPE_FAT12): b"fat12",
    int(pytsk3.TSK_FS_TYPE_FAT16): b"fat16",
    int(pytsk3.TSK_FS_TYPE_FAT32): b"fat32",
    int(pytsk3.TSK_FS_TYPE_EXFAT): b"exfat",
    int(pytsk3.TSK_FS_TYPE_ISO9660): b"iso9660",
    int(pytsk3.TSK_FS_TYPE_HFS): b"hfs+",
    int(pytsk3.TSK_FS_TYPE_FFS1): b"ufs1",
    int(pytsk3.TSK_FS_TYPE_FFS2): b"ufs2",
}
_OTHER_TABLES = [
    int(kind) for kind in (pytsk3.TSK_VS_TYPE_BSD, pytsk3.TSK_VS_TYPE_SUN, pytsk3.TSK_VS_TYPE_MAC)
]
# Where large and small letters make no other name.
_FOLDING = (b"ntfs", b"fat12", b"fat16", b"fat32", b"exfat", b"hfs+")
# As the library's errors show one of ours, and where in the library they are from.
_OWN_ERROR = re.compile(r"""OSError\((['"])(.*?)\1\)""")
_CALLERS = re.compile(r"^\w+: \(\w+\.cpp:\d+\) ")
_PARTITION = int(pytsk3.TSK_VS_PART_FLAG_ALLOC)
_UNALLOCATED_NAME = int(pytsk3.TSK_FS_NAME_FLAG_UNALLOC)
# No content on the disk: TSK_FS_ATTR_RUN_FLAG_FILLER and _SPARSE.
_NO_CONTENT = 1 | 2
_RESIDENT = int(pytsk3.TSK_FS_ATTR_RES)
_NTFS_DATA = int(pytsk3.TSK_FS_ATTR_TYPE_NTFS_DATA)
# Of tables of inodes, kept: as much as the library reads at a time, of several groups.
_PIECE_BYTES = 64 << 10
_KEPT_PIECES = 16
# Names of a folder that are put in order at a time.
_SORTED_ENTRIES = 64 << 10
# Deeper than any real one; a folder that holds itself would go on for ever.
_MAX_DEPTH = 256
_MAX_NS = (1 << 63) - 1
# NTFS packs 64 KiB into 4 KiB at the best; 16 times that, for units without any data.
_MOST_COMPRESSED = 256
# ext4 has room for a block of them, and an inode's rest; with a path it has to fit into a message.
_MAX_XATTR_BYTES = 56 << 10
# Folders that are known again: numbers of 4 million take some 200 MiB. With more, one that has
# two names is still noticed when it is inside itself.
_MAX_KNOWN_FOLDERS = 4 << 20


class FileSystem:
    """One that could be opened, its log replayed in memory where that can be done."""

    def __init__(self, source: ByteSource) -> None:
        """Raises OSError where there is none that the parser knows."""
        self.notices: list[str] = []
        self._source = source
        self._image = ParserImage(source)
        self._fs = pytsk3.FS_Info(self._image)
        kind = int(self._fs.info.ftype)
        self.kind = _NAMES.get(kind, b"other")
        self._superblock: ext.Superblock | None = None
        self._kept_piece = functools.lru_cache(_KEPT_PIECES)(self._read_piece)
        if kind in _EXT:
            self._replay()
        elif kind == _NTFS:
            self._look_at_ntfs()

    def _replay(self) -> None:
        raw = self._image.read(ext.SUPERBLOCK_OFFSET, ext.SUPERBLOCK_BYTES)
        try:
            superblock = ext.parse_superblock(raw)
            if superblock.needs_recovery:
                self._replay_journal(superblock)
            self._superblock = superblock
        except (ext.ExtError, struct.error) as error:
            self.notices.append(f"{error}: {_UNTRUE}")

    def _replay_journal(self, superblock: ext.Superblock) -> None:
        if superblock.has_outer_journal:
            raise ext.ExtError("its journal is on another disk")
        size = superblock.block_bytes
        journal = self._blocks_of(superblock.journal_inode)

        def read_block(number: int) -> bytes:
            if number >= len(journal):
                return b""
            return self._image.read(journal[number] * size, size)

        replayed = ext.replayed_blocks(read_block)
        # The parser keeps what it has read: with a new image it reads anew.
        self._image = ParserImage(self._source)
        self._image.use(replayed, journal, size)
        self._fs = pytsk3.FS_Info(self._image)

    def _blocks_of(self, inode: int) -> list[int]:
        blocks: list[int] = []
        limit = self._source.size_bytes // 1024
        for attribute in self._fs.open_meta(inode=inode):
            for run in attribute:
                if int(run.flags) & _NO_CONTENT or len(blocks) + run.len > limit:
                    raise ext.ExtError("its journal has holes")
                blocks += range(run.addr, run.addr + run.len)
            break
        return blocks

    def _look_at_ntfs(self) -> None:
        """A log that was not played back: bit 0 of $Volume's flags says that it has to be."""
        try:
            for attribute in self._fs.open_meta(inode=3):
                if int(attribute.info.type) == 0x70:
                    raw = self._fs.open_meta(inode=3).read_random(0, 12, 0x70, attribute.info.id)
                    if len(raw) >= 12 and raw[10] & 1:
                        self.notices.append(_UNTRUE)
        except PARSER_ERRORS:
            self.notices.append(_UNTRUE)

    # --- entries ---

    def find(self, path: bytes) -> tuple[bytes, Any] | None:
        """The file or folder of this path, and the path made plain; None: there is none."""
        root = self._fs.open_meta(inode=self._fs.info.root_inum)
        folds_case = self.kind in _FOLDING
        found = find_file(root, path, self._named, self._target, folds_case=folds_case)
        return None if found is None else (b"/" + b"/".join(filter(None, path.split(b"/"))), found)

    def _named(self, folder: Any) -> Iterator[tuple[bytes, Any]]:
        if _KINDS.get(int(folder.info.meta.type)) == FOLDER:
            found = self._children(folder)
            yield from (item for item in found if not isinstance(item, EntryFailed))

    def _target(self, file: Any) -> bytes | None:
        meta = file.info.meta
        return self._link_target(file, meta) if _KINDS.get(int(meta.type)) == LINK else None

    def _children(self, folder: Any) -> Iterator[tuple[bytes, Any] | EntryFailed]:
        """Raises OSError where it is not a folder or cannot be read."""
        if self.kind in _EXT.values() and not _is_resident(folder):
            yield from self._ext_children(folder)
            return
        for child in folder.as_directory():
            name, meta = child.info.name, child.info.meta
            if name is None or meta is None or name.name in (b".", b"..", b""):
                continue
            if int(name.flags) & _UNALLOCATED_NAME or int(meta.type) not in _KINDS:
                continue
            # NTFS keeps its own tables as files, 0 to 23; 5 is the root.
            if self.kind == b"ntfs" and int(meta.addr) < 24:
                continue
            yield name.name, child

    def _ext_children(self, folder: Any) -> Iterator[tuple[bytes, Any] | EntryFailed]:
        """The library takes the hashes in a large folder's index for names of files."""
        block = int(self._fs.info.block_size)
        places = (at for part in self.stretches(folder) for at in range(*part, block))
        found: list[tuple[int, bytes]] = []
        for at in places:
            try:
                for name, inode in ext.folder_entries(bytes(folder.read_random(at, block))):
                    found.append((inode, name))
            except (ext.ExtError, *PARSER_ERRORS) as error:
                text = f"names in its block at byte {at} are missing: "
                yield EntryFailed(b"", text.encode() + reason_of(error))
            if len(found) >= _SORTED_ENTRIES:
                yield from self._opened(found)
                found = []
        yield from self._opened(found)

    def _opened(self, found: list[tuple[int, bytes]]) -> Iterator[tuple[bytes, Any] | EntryFailed]:
        """In the order of their inodes: in that of their names, by hash, each would be a read of its own."""
        for inode, name in sorted(found):
            if name in (b".", b".."):
                continue
            try:
                yield name, self._fs.open_meta(inode=inode)
            except PARSER_ERRORS as error:
                yield EntryFailed(name, reason_of(error))

    def entry(self, path: bytes, file: Any) -> Entry:
        """Raises OSError."""
        meta = file.info.meta
        kind = _KINDS.get(int(meta.type))
        if kind is None or len(path) > MAX_PATH_BYTES:
            raise OSError("it is of no kind that a file can be, or lies too deep")
        mode, uid, gid = int(meta.mode) & 0o7777, int(meta.uid), int(meta.gid)
        mtime_ns = int(meta.mtime) * 10**9 + int(meta.mtime_nano)
        device, xattrs = 0, {}
        if self._superblock is not None:
            try:
                inode = ext.read_inode(self._read_inodes, self._superblock, int(meta.addr))
            except (ext.ExtError, struct.error):
                self._tell_once("extended attributes and numbers of device nodes are missing")
                self._superblock = None
            else:
                mode, uid, gid, mtime_ns = inode.mode & 0o7777, inode.uid, inode.gid, inode.mtime_ns
                if kind in (CHARACTER_DEVICE, BLOCK_DEVICE):
                    major, minor = inode.device
                    device = (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12
                xattrs = inode.xattrs
        if not mode and kind == FOLDER and b"fat" in self.kind:
            mode = 0o777  # The root of a FAT has no entry of its own: as its other folders.
        target = self._link_target(file, meta) if kind == LINK else b""
        flat = self._flat(xattrs)
        return Entry(
            path,
            kind,
            mode,
            uid & 0xFFFFFFFF,
            gid & 0xFFFFFFFF,
            max(0, int(meta.size)) if kind in (FILE, LINK) else 0,
            # Beyond the year 2262: a made-up time, which goes into no number of 64 bits.
            max(-_MAX_NS, min(mtime_ns, _MAX_NS)),
            int(meta.addr),
            max(0, int(meta.nlink)) & 0xFFFFFFFF,
            device,
            target,
            tuple(flat),
        )

    def _read_inodes(self, offset: int, length: int) -> bytes:
        """Inodes of one folder lie side by side: each would cost a question to the other process."""
        number, at = divmod(offset, _PIECE_BYTES)
        if at + length <= _PIECE_BYTES:
            piece = self._kept_piece(number)[at : at + length]
            if len(piece) == length:
                return piece
        return self._image.read(offset, length)

    def _read_piece(self, number: int) -> bytes:
        return self._image.read(number * _PIECE_BYTES, _PIECE_BYTES)

    def _flat(self, xattrs: dict[bytes, bytes]) -> list[bytes]:
        """Names and values one after the other, as many as fit into a message."""
        words: list[bytes] = []
        size = 0
        for pair in list(xattrs.items())[:MAX_XATTRS]:
            size += sum(map(len, pair))
            if size > _MAX_XATTR_BYTES:
                self._tell_once("extended attributes are missing where a file has too many")
                break
            words += pair
        return words

    def _tell_once(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)

    def _link_target(self, file: Any, meta: Any) -> bytes:
        if meta.link is not None:
            return bytes(meta.link)[:MAX_WORD_BYTES]
        size = min(int(meta.size), MAX_WORD_BYTES)
        return bytes(file.read_random(0, size)) if size else b""

    def children(self, path: bytes, folder: Any) -> Iterator[tuple[bytes, Any] | EntryFailed]:
        """Its entries, by name. Raises OSError."""
        seen: set[bytes] = set()
        prefix = path.rstrip(b"/") + b"/"
        for item in self._children(folder):
            name = item[0]
            if b"/" in name or b"\0" in name:  # it would lead elsewhere
                yield EntryFailed(prefix + re.sub(rb"[/\0]", b"?", name), _NO_NAME.encode())
            elif isinstance(item, EntryFailed):
                yield item._replace(path=prefix + name if name else path)
            # The parser's own folder is not the disk's.
            elif name not in seen and name != b"$OrphanFiles":
                seen.add(name)
                yield prefix + name, item[1]

    def walk(self, path: bytes, file: Any) -> Iterator[tuple[bytes, Any] | EntryFailed]:
        """The entry and all below it, a folder before what is in it."""
        stack: list[Iterator[tuple[bytes, Any] | EntryFailed]] = [iter([(path, file)])]
        above: list[int] = []
        known: set[int] = set()
        while stack:
            try:
                item = next(stack[-1], None)
            except PARSER_ERRORS as error:
                item = EntryFailed(path, reason_of(error))
                stack[-1] = iter(())
            if item is None:
                stack.pop()
                if above:
                    above.pop()
                continue
            yield item
            if isinstance(item, EntryFailed):
                continue
            path, file = item
            meta = file.info.meta
            if _KINDS.get(int(meta.type)) != FOLDER:
                continue
            number = int(meta.addr)
            # No file system here has two names for a folder: a made-up one would have no end.
            if number in known or number in above or len(stack) > _MAX_DEPTH:
                yield EntryFailed(path, _TWICE.encode())
                continue
            if len(known) < _MAX_KNOWN_FOLDERS:
                known.add(number)
            stack.append(self.children(path, file))
            above.append(number)

    # --- content ---

    def content(self, file: Any) -> Iterator[Stretch | FileData]:
        """What of the file is not a hole by its extents. Raises OSError."""
        stretches = self.stretches(file)
        yield from (Stretch(start, end - start) for start, end in stretches)
        for start, end in stretches:
            yield from self.data(file, start, end)

    def stretches(self, file: Any) -> list[tuple[int, int]]:
        """Where the file has data, in order, as (start, end). Raises OSError."""
        size = max(0, int(file.info.meta.size))
        found = list(joined(self._stretches(file, size)))
        # A compressed file may hold more than there is room; and none has to be followed for ever.
        most = self._source.size_bytes * (_MOST_COMPRESSED if self.kind == b"ntfs" else 1)
        if sum(end - start for start, end in found) > most:
            raise OSError(_TOO_MUCH)
        return found

    def data(self, file: Any, start: int, end: int) -> Iterator[FileData]:
        """The bytes of a stretch, or of a part of it. Raises OSError."""
        while start < end:
            raw = file.read_random(start, min(MAX_DATA_BYTES, end - start))
            if not raw:
                size = int(file.info.meta.size)
                raise OSError(f"its content ends at byte {start} of {size}")
            yield FileData(start, bytes(raw))
            start += len(raw)

    def _stretches(self, file: Any, size: int) -> Iterator[tuple[int, int]]:
        """Where there is data, by the runs of its content; all of it where there are none."""
        block = int(self._fs.info.block_size)
        runs, is_ext = None, self.kind in _EXT.values()
        for attribute in file:
            kind = int(attribute.info.type)
            if kind == 1 or (kind == _NTFS_DATA and attribute.info.name is None):
                flags = int(attribute.info.flags)
                runs = None if flags & int(pytsk3.TSK_FS_ATTR_COMP) else list(attribute)
                if is_ext and not runs and flags & int(pytsk3.TSK_FS_ATTR_NONRES):
                    return  # a hole, however large the file says that it is
                break
        if not runs:
            yield 0, size
            return
        covered = 0
        for run in runs:
            covered = max(covered, (run.offset + run.len) * block)
            if not int(run.flags) & _NO_CONTENT:
                yield min(run.offset * block, size), min((run.offset + run.len) * block, size)
        if covered < size and not is_ext:
            yield covered, size


def _is_resident(file: Any) -> bool:
    """Whether its content lies in its inode."""
    attribute = next(iter(file), None)
    return attribute is not None and bool(int(attribute.info.flags) & _RESIDENT)


_NO_NAME = "its name has a slash or a zero byte in it, which none can have here: it is left out"
_TWICE = "the folder is there twice, inside itself, or too deep"
_TOO_MUCH = "it says that it has more content than its file system has room for"
_UNTRUE = (
    "the log of this file system is not replayed: what was written in the last seconds before "
    "the backup may be missing or old"
)


def reason_of(error: Exception) -> bytes:
    """What our own read has said, if that failed, and not who called it."""
    text = str(error)
    own = _OWN_ERROR.search(text)
    text = own[2] if own else _CALLERS.sub("", text)
    return text.partition("\n")[0].encode("utf-8", "replace")[:400]


# --- volumes ---


def other_tables(source: ByteSource) -> list[Partition]:
    """The partitions of disks of BSD, Sun and Macintosh machines, by their place."""
    try:
        table = pytsk3.Volume_Info(ParserImage(source))
        if int(table.info.vstype) not in _OTHER_TABLES:
            return []
        block = int(table.info.block_size)
        found = sorted(
            (int(part.start) * block, int(part.len) * block)
            for part in table
            if int(part.flags) == _PARTITION
        )
    except PARSER_ERRORS:
        return []
    return [
        Partition(number, start, min(size, source.size_bytes - start))
        for number, (start, size) in enumerate(found, 1)
        if start < source.size_bytes
    ]


def open_node(node: Node) -> tuple[Volume, FileSystem | None]:
    """What there is in it, and its file system if the parser knows it.

    The kind is `damaged` where the archive is, and that would have to be read. A remark on what can be
    read: its log is not replayed.
    """
    kind, remark, file_system = node.kind, node.remark, None
    if not kind and not node.remark:
        try:
            file_system = FileSystem(node.source)
            kind = file_system.kind
            remark = "; ".join(file_system.notices)
        except PARSER_ERRORS:
            kind = _other_kind(node.source)
    volume = Volume(
        node.disk,
        node.name.encode(),
        node.offset,
        node.source.size_bytes,
        kind,
        file_system is not None,
        tuple(layer.encode() for layer in node.layers),
        remark.encode()[:MAX_WORD_BYTES],
        node.is_container,
    )
    return volume, file_system


def _other_kind(source: ByteSource) -> bytes:
    try:
        kind = signature(source)
    except OSError:
        return b"damaged"
    if kind == b"ext4" and ext.has_clusters(
        source.read(ext.SUPERBLOCK_OFFSET, ext.SUPERBLOCK_BYTES)
    ):
        return kind  # whole, and read by kernels only
    # The parser would have opened it.
    return kind + b", damaged" if kind in _NAMES.values() else kind
