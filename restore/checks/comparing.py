# SPDX-License-Identifier: Apache-2.0
"""Compares extents with the digests that they must have, some extents ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from vmapipe.restore.archive.reading import Archive, Piece
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.checks.digest import extent_digest, read_digest
from vmapipe.restore.checks.hashers import Hashers
from vmapipe.restore.checks.mapped import MappedHashers
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import can_fork
from vmapipe.vma.extent import Extent


class Comparer:
    """In processes where that can be (`MappedHashers`), else in threads. A context manager."""

    def __init__(self, archive: Archive, count: int, cancel: Cancel, *, needed: bool) -> None:
        """`needed`: there is something to compare with."""
        self._archive = archive
        self._hashers: Hashers | MappedHashers = Hashers(count)
        if needed and isinstance(archive.source, PlainFile) and can_fork():
            self._hashers = MappedHashers(archive.source.fd, count, self._read_digest, cancel)
        # Each holds an extent of up to 3.7 MiB, if not in a process that maps the file: who
        # has many to compare at a time wakes up less often for it, a tenth of all the work.
        self._limit, self._rest = 2 * count, 2 * count - 1
        if isinstance(self._hashers, MappedHashers):
            self._limit, self._rest = 16 * count, 8 * count
        self._ahead: deque[tuple[Extent, bytes, Callable[[], bytes]]] = deque()

    def __enter__(self) -> Comparer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hashers.close()

    def compare(self, piece: Piece) -> Iterator[Extent]:
        """Begin with a piece that has a digest; exhaust it: extents whose digest is wrong.

        They may be earlier ones.
        """
        self._ahead.append((piece.extent, piece.digest, self._begin(piece)))
        if len(self._ahead) >= self._limit:
            while len(self._ahead) > self._rest:
                yield from self._take_oldest()

    def finish(self) -> Iterator[Extent]:
        """The rest. Exhaust it."""
        while self._ahead:
            yield from self._take_oldest()

    def _begin(self, piece: Piece) -> Callable[[], bytes]:
        extent = piece.extent
        if isinstance(self._hashers, MappedHashers):
            return self._hashers.submit(extent.offset, extent.total_bytes)
        return self._hashers.submit(lambda: digest_of(self._archive, piece, piece.data)).result

    def _read_digest(self, offset: int, length: int) -> bytes:
        source = self._archive.source
        if not isinstance(source, PlainFile):
            raise RuntimeError("a stream's extent without its data")
        return read_digest(source.read_into, offset, length)

    def _take_oldest(self) -> Iterator[Extent]:
        extent, expected, result = self._ahead.popleft()
        if result() != expected:
            yield extent


def digest_of(archive: Archive, piece: Piece, data: bytes | memoryview | None) -> bytes:
    """The digest of an extent as it is in the archive; `data`: a stream's."""
    source = archive.source
    if isinstance(source, PlainFile):
        return read_digest(source.read_into, piece.extent.offset, piece.extent.total_bytes)
    return extent_digest(piece.raw_header, data or b"")
