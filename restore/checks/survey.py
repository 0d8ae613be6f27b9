# SPDX-License-Identifier: Apache-2.0
"""Walks along a damaged archive: where an extent is not, looks for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmapipe.restore.archive.reading import Archive, Piece, cut_off
from vmapipe.restore.archive.source import PlainFile
from vmapipe.vma.errors import ArchiveError, ExtentError
from vmapipe.vma.extent import Extent, parse_extent_header
from vmapipe.vma.layout import EXTENT_HEADER_BYTES, EXTENT_MAGIC

# Searched in one go.
_SEARCH_BYTES = 1 << 20
# Where an extent's header has the archive's uuid.
_UUID_AT = 8


class Gap(NamedTuple):
    """Archive bytes [offset, offset + length) that hold no extent, and why not."""

    offset: int
    length: int
    error: ArchiveError


class _Cursor:
    """A place in the archive; looks ahead, also in a stream, by a bounded number of bytes."""

    def __init__(self, archive: Archive, at: int) -> None:
        self.at = at
        self._archive = archive
        self._seekable = isinstance(archive.source, PlainFile)
        self._held = b""

    def peek(self, length: int) -> bytes:
        """The next bytes, fewer only at the end."""
        if self._seekable:
            return self._archive.read(length, self.at)
        if len(self._held) < length:
            self._held += self._archive.read(length - len(self._held), 0)
        return self._held[:length]

    def pass_over(self, length: int) -> None:
        """Go behind what `peek` has shown."""
        self._held = self._held[length:]
        self.at += length

    def take(self, length: int) -> bytes:
        """The next bytes, and go behind them."""
        if self._held or self._seekable:
            taken = self.peek(length)
            self._held = self._held[length:]
        else:
            taken = self._archive.read(length, 0)
        self.at += len(taken)
        return taken


def survey(archive: Archive, check: Callable[[], None]) -> Iterator[Piece | Gap]:
    """All extents that can be found, and the gaps between them, in order.

    `check` is called now and then in a long search. Raises SourceError, and
    ArchiveError for compressed data that is damaged.
    """
    source = archive.source
    cursor = _Cursor(archive, archive.header.header_bytes)
    while raw_header := cursor.peek(EXTENT_HEADER_BYTES):
        start = cursor.at
        try:
            extent = parse_extent_header(raw_header, archive.header.uuid, start)
        except ExtentError as error:
            _search(cursor, archive.header.uuid, check)
            yield Gap(start, cursor.at - start, error)
            continue
        cursor.pass_over(EXTENT_HEADER_BYTES)
        data: bytes | None = None
        if isinstance(source, PlainFile):
            got = min(extent.data_bytes, source.size_bytes - cursor.at)
            cursor.at += got
        else:
            data = cursor.take(extent.data_bytes) if extent.data_bytes else b""
            got = len(data)
        if got < extent.data_bytes:
            yield Gap(start, EXTENT_HEADER_BYTES + got, cut_off(extent, got))
        else:
            yield Piece(extent, raw_header, data)


def _search(cursor: _Cursor, uuid: bytes, check: Callable[[], None]) -> None:
    """Put the cursor to the next sound extent header, or to the end.

    Whoever cut bytes out need not have kept to any alignment. Uuid and
    checksum keep the guest's data from being taken for a header.
    """
    cursor.take(1)
    while window := cursor.peek(_SEARCH_BYTES):
        check()
        at = window.find(EXTENT_MAGIC)
        while 0 <= at <= len(window) - EXTENT_HEADER_BYTES:
            # The uuid first: it is the quickest to tell, and guests have such bytes too.
            if window.startswith(uuid, at + _UUID_AT) and _is_header(
                window[at : at + EXTENT_HEADER_BYTES], uuid
            ):
                cursor.take(at)
                return
            at = window.find(EXTENT_MAGIC, at + 1)
        # The last bytes may be the beginning of a header.
        whole = len(window) < _SEARCH_BYTES
        cursor.take(len(window) if whole else len(window) - EXTENT_HEADER_BYTES + 1)


def _is_header(raw: bytes, uuid: bytes) -> Extent | None:
    try:
        return parse_extent_header(raw, uuid)
    except ExtentError:
        return None
