# SPDX-License-Identifier: Apache-2.0
"""Reads an archive from bytes in any pieces; holds at most one extent or the header."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES
from vmapipe.vma.errors import ExtentError, HeaderError, NotAnArchiveError
from vmapipe.vma.extent import Extent, parse_extent_header
from vmapipe.vma.header import PEEK_BYTES, Header, parse_header, peek_header_bytes


class HeaderRead(NamedTuple):
    """The archive's header is complete; `raw` is its bytes as stored."""

    header: Header
    raw: bytes


class ExtentRead(NamedTuple):
    """One extent is complete. `data` holds its stored blocks."""

    extent: Extent
    raw_header: bytes
    data: memoryview


class Scanner:
    """Feed bytes as they come; the events do not depend on how the bytes were cut.

    `wanted_bytes` is what is missing of the structure being read: whoever
    reads just that much spares a copy.
    """

    def __init__(self) -> None:
        self.header: Header | None = None
        self.offset = 0
        self._held = bytearray()
        self._need = PEEK_BYTES
        self._extent: Extent | None = None
        self._raw_header = b""

    @property
    def wanted_bytes(self) -> int:
        return self._need - len(self._held)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[HeaderRead | ExtentRead]:
        """Yields what became complete; exhaust it.

        Raises ArchiveError; the scanner is then of no more use.
        """
        view = memoryview(data)
        at = 0
        while True:
            if not self._held and len(view) - at >= self._need:
                whole = bytes(view[at : at + self._need])
                at += self._need
            else:
                take = min(self.wanted_bytes, len(view) - at)
                self._held += view[at : at + take]
                at += take
                if len(self._held) < self._need:
                    return
                whole = bytes(self._held)
                self._held = bytearray()
            yield from self._complete(whole)
            if at == len(view):
                return

    def _complete(self, whole: bytes) -> Iterator[HeaderRead | ExtentRead]:
        if self.header is None:
            if len(whole) == PEEK_BYTES:
                self._need = peek_header_bytes(whole)
                self._held = bytearray(whole)
                return
            self.header = parse_header(whole)
            self.offset = len(whole)
            self._need = EXTENT_HEADER_BYTES
            yield HeaderRead(self.header, whole)
        elif self._extent is None:
            self._extent = parse_extent_header(whole, self.header.uuid, self.offset)
            self._raw_header = whole
            self._need = self._extent.data_bytes
            if not self._need:
                yield self._end_of_extent(b"")
        else:
            yield self._end_of_extent(whole)

    def _end_of_extent(self, data: bytes) -> ExtentRead:
        extent = self._extent
        if extent is None:
            raise RuntimeError("the end of an extent without its beginning")
        self.offset += extent.total_bytes
        self._extent = None
        self._need = EXTENT_HEADER_BYTES
        return ExtentRead(extent, self._raw_header, memoryview(data))

    def close(self) -> None:
        """The input has ended. Raises ArchiveError when it ended inside a structure."""
        got = len(self._held)
        if self.header is None:
            if not got:
                raise NotAnArchiveError("the archive is empty", offset=0)
            if got < PEEK_BYTES and not b"VMA\0".startswith(bytes(self._held[:4])):
                raise NotAnArchiveError("not a vma file - wrong magic number", offset=0)
            raise HeaderError(f"the archive ends inside its header, after {got} bytes", offset=got)
        if self._extent is not None:
            raise ExtentError(
                f"the archive ends inside an extent's data ({got} of "
                f"{self._extent.data_bytes} bytes)",
                offset=self._extent.offset,
                reference_text=(
                    f"short vma extent ({EXTENT_HEADER_BYTES + got} < {self._extent.total_bytes})"
                ),
            )
        if got:
            raise ExtentError(
                f"the archive ends inside an extent header ({got} of 512 bytes)",
                offset=self.offset,
                reference_text=f"read short extent ({got} bytes)",
            )
