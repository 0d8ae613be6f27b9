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

Path = Annotated[bytes, lengths(0, MAX_PATH_BYTES)]
Word = Annotated[bytes, lengths(0, MAX_WORD_BYTES)]
_Number = Annotated[int, between(-(1 << 63), (1 << 63) - 1)]
_Small = Annotated[int, between(0, (1 << 32) - 1)]

#: The kinds of an entry.
FILE, FOLDER, LINK, CHARACTER_DEVICE, BLOCK_DEVICE, FIFO, SOCKET = range(7)


# --- asking side ---


class Ask(NamedTuple):
    """One command. `where`: a volume's name; `path` begins at its root.

    `action`: "volumes" (all of the disk), "find" (the volumes that have the path, and those
    that cannot be read), "list" (a folder's entries, or the one file), "walk" (a folder and
    all below it), "read" (a walk, with the content of files), "entry" (of this path only),
    "range" (what is not a hole of `length` bytes of a file from `offset` on).
    """

    action: Annotated[str, lengths(1, 16)]
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
    """Bytes of the disk are needed."""

    offset: Uint
    length: Annotated[int, between(1, MAX_READ_BYTES)]


class Volume(NamedTuple):
    """A part of the disk. `kind`: its file system, or what else it is; empty: not known.

    `can_read`: the parser knows this file system.
    """

    name: Word
    offset: Uint
    size_bytes: Uint
    kind: Word
    can_read: bool


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


FromAsker = Ask | Bytes | DiskUnreadable
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

_TO_PARSER = Dialogue(Ask, Bytes, DiskUnreadable, keyed=False, max_bytes=MAX_MESSAGE_BYTES)
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
