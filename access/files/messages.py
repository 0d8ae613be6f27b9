# SPDX-License-Identifier: Apache-2.0
"""What the parser of file systems and the command that asks it say to each other.

One packet of a sequenced socket is one message. The parser's words are a stranger's: it
may have been taken over by a file system that somebody made for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from vmapipe.protocol import limits
from vmapipe.protocol.schema import Dialogue, Part, Uint, between, lengths

# A packet has to fit into the kernel's default send buffer, 208 KiB.
MAX_READ_BYTES = 128 << 10
MAX_DATA_BYTES = 128 << 10
MAX_MESSAGE_BYTES = MAX_DATA_BYTES + 4096
# Linux has 4096 bytes for a path and 255 for a name; folders in file systems may lie deeper.
MAX_PATH_BYTES = 65536
MAX_WORD_BYTES = 4096
MAX_XATTRS = 256
# Of an archive (vma/header.py has 255), and of one parser.
MAX_DISKS = 256
# cryptsetup takes up to 8 MiB of a key file; what it makes for itself has 64 bytes.
MAX_KEY_BYTES = 64 << 10

Path = Annotated[bytes, lengths(0, MAX_PATH_BYTES)]
Word = Annotated[bytes, lengths(0, MAX_WORD_BYTES)]
_Number = Annotated[int, between(-(1 << 63), (1 << 63) - 1)]
_Small = Annotated[int, between(0, (1 << 32) - 1)]

#: How the remark on an encrypted volume begins that none of the given keys opens.
WRONG_KEY = b"wrong key: "
#: The kinds of an entry.
FILE, FOLDER, LINK, CHARACTER_DEVICE, BLOCK_DEVICE, FIFO, SOCKET = range(7)


# --- asking side ---


class Key(NamedTuple):
    """A key for encrypted volumes, sent before the first command.

    `disk` and `name` say which: -1 for any that has no key of its own, an empty name for all of
    the disk. `label`: the file that it came from.
    """

    disk: Annotated[int, between(-1, MAX_DISKS - 1)]
    name: Word
    label: Word
    secret: Annotated[bytes, lengths(0, MAX_KEY_BYTES)]


class Ask(NamedTuple):
    """One command. `disk`: -1 for any; `where`: a volume's name, or empty; `path` begins at its root.

    `action`: "volumes" (all of the disk), "find" (the volumes that have the path, and those
    that cannot be read), "list" (a folder's entries, or the one file), "walk" (a folder and
    all below it), "read" (a walk, with the content of files), "entry" (of this path only),
    "range" (what is not a hole of `length` bytes of a file from `offset` on).
    """

    action: Annotated[str, lengths(1, 16)]
    disk: Annotated[int, between(-1, MAX_DISKS - 1)]
    where: Word
    path: Path
    offset: Uint
    length: Uint


class Bytes(NamedTuple):
    """The answer to a read: fewer bytes than were asked for at the end of the disk."""

    data: Annotated[bytes, lengths(0, MAX_READ_BYTES)]


class DiskUnreadable(NamedTuple):
    """The archive is damaged there."""

    reason: Word


# --- parser ---


class ParserReady(NamedTuple):
    """The parser has given up its rights. `is_confined`: the kernel holds it to that, too."""

    is_confined: bool


class Read(NamedTuple):
    """Bytes of a disk are needed."""

    disk: Annotated[int, between(0, MAX_DISKS - 1)]
    offset: Uint
    length: Annotated[int, between(1, MAX_READ_BYTES)]


class Volume(NamedTuple):
    """A part of a disk, or a logical volume. `kind`: its file system, or what else it is.

    `name`: "2" for a partition, "/vg/root" for a logical volume (which the disk holds the first byte
    of), empty for a whole disk. `layers`: what it lies in ("luks1", "lvm"), the outermost first. An empty
    `kind`: not known. `can_read`: the parser knows this file system; `remark`: why it does not, or
    if it does, that its log is not replayed.
    `is_container`: what is in it comes as volumes of their own.
    """

    disk: Annotated[int, between(0, MAX_DISKS - 1)]
    name: Word
    offset: Uint
    size_bytes: Uint
    kind: Word
    can_read: bool
    layers: Annotated[tuple[bytes, ...], lengths(0, 16)]
    remark: Word
    is_container: bool


class Entry(NamedTuple):
    """A file, folder or whatever else has a name. Times in ns since 1970; `device`: its number.

    `inode` tells of two names whether they are one file, if `links` is more than 1.
    """

    path: Path
    kind: Annotated[int, between(0, SOCKET)]
    mode: Annotated[int, between(0, 0o7777)]
    uid: _Small
    gid: _Small
    size_bytes: Uint
    mtime_ns: _Number
    inode: Uint
    links: _Small
    device: _Small
    target: Word
    #: Name, value, name, value …
    xattrs: Annotated[tuple[bytes, ...], lengths(0, 2 * MAX_XATTRS)]


class Stretch(NamedTuple):
    """Where the file whose entry came last has data; all of them, in order, before the first Data."""

    offset: Uint
    length: Uint


class FileData(NamedTuple):
    """The content of such a stretch, in order; what lies in none is zero."""

    offset: Uint
    data: Annotated[bytes, lengths(1, MAX_DATA_BYTES)]


class ParserNotice(NamedTuple):
    """Something that the user has to know, and that is not the end."""

    text: Word


class EntryFailed(NamedTuple):
    """This entry, or with an empty path the whole command, could not be read."""

    path: Path
    reason: Word


class AnswerEnd(NamedTuple):
    """All of the answer has been sent."""


FromAsker = Key | Ask | Bytes | DiskUnreadable
FromParser = (
    ParserReady
    | Read
    | Volume
    | Entry
    | Stretch
    | FileData
    | ParserNotice
    | EntryFailed
    | AnswerEnd
)

_TO_PARSER = Dialogue(Key, Ask, Bytes, DiskUnreadable, keyed=False, max_bytes=MAX_MESSAGE_BYTES)
_TO_ASKER = Dialogue(
    *(ParserReady, Read, Volume, Entry, Stretch, FileData, ParserNotice, EntryFailed, AnswerEnd),
    keyed=False,
    max_bytes=MAX_MESSAGE_BYTES,
    max_items=2 * MAX_XATTRS + limits.MAX_ARRAY_ITEMS,
)


def encode(message: FromAsker | FromParser) -> Part:
    """One packet. Raises LocalProtocolError for what the other side would refuse."""
    dialogue = _TO_PARSER if isinstance(message, FromAsker) else _TO_ASKER
    return dialogue.encode(message)[0]


def decode_for_parser(parts: Sequence[Part]) -> FromAsker:
    """Raises RemoteProtocolError."""
    message: FromAsker = _TO_PARSER.decode(parts)
    return message


def decode_for_asker(parts: Sequence[Part]) -> FromParser:
    """Raises RemoteProtocolError."""
    message: FromParser = _TO_ASKER.decode(parts)
    return message
