# SPDX-License-Identifier: Apache-2.0
"""Compares an archive's extents with its manifest, and tells what differs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from vmapipe.restore.archive.reading import Archive, Piece
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.checks.digest import extent_digest, read_digest
from vmapipe.restore.checks.hashers import Hashers
from vmapipe.restore.checks.manifest import Manifest
from vmapipe.restore.checks.mapped import MappedHashers
from vmapipe.restore.checks.report import Damage
from vmapipe.restore.errors import CompressionError, DigestError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.forking import can_fork
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import Extent
from vmapipe.vma.header import Header
from vmapipe.vma.layout import CLUSTER_BYTES
from vmapipe.vma.manifest import ExtentDigest, Totals


def damage_of(error: ArchiveError) -> Damage:
    """What ended the reading, as a find."""
    if isinstance(error, CompressionError):
        return Damage(f"{error}; what follows could not be checked")
    return Damage(error.text, archive_offset=error.offset, reference_text=error.reference_text)


class Digests:
    """Compares extents with a manifest, some extents ahead; without one, does nothing.

    In processes where that can be (`MappedHashers`), else in threads.

    A context manager. `complete`: all that the manifest lists was compared.
    """

    def __init__(
        self, archive: Archive, manifest: Manifest | None, count: int, cancel: Cancel
    ) -> None:
        self.complete = False
        self.totals: Totals | None = None
        self._archive = archive
        self._manifest = manifest
        self._hashers: Hashers | MappedHashers = Hashers(count)
        if manifest is not None and isinstance(archive.source, PlainFile) and can_fork():
            self._hashers = MappedHashers(archive.source.fd, count, self._read_digest, cancel)
        # Each holds an extent of up to 3.7 MiB, if not in a process that maps the file: who
        # has many to compare at a time wakes up less often for it, a tenth of all the work.
        self._limit, self._rest = 2 * count, 2 * count - 1
        if isinstance(self._hashers, MappedHashers):
            self._limit, self._rest = 16 * count, 8 * count
        self._ahead: deque[tuple[Extent, bytes, Callable[[], bytes]]] = deque()
        self._at = archive.header.header_bytes
        self._in_step = manifest is not None

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hashers.close()
        if self._manifest is not None:
            self._manifest.close()

    def check(self, piece: Piece) -> Iterator[Damage]:
        """Exhaust it. What it tells may be about an earlier extent."""
        if not self._in_step:
            return
        try:
            expected = self._expected(piece.extent)
        except ArchiveError as error:
            self._in_step = False
            yield damage_of(error)
            return
        self._ahead.append((piece.extent, expected.digest, self._begin(piece)))
        if len(self._ahead) >= self._limit:
            while len(self._ahead) > self._rest:
                yield from self._take_oldest()

    def _expected(self, extent: Extent) -> ExtentDigest:
        """The line of the extent at this place; lines of extents that are lost are passed over."""
        while True:
            line = self._next_line()
            if isinstance(line, ExtentDigest):
                start, self._at = self._at, self._at + line.total_bytes
                if start < extent.offset:
                    continue
                if start == extent.offset and line.total_bytes == extent.total_bytes:
                    return line
            raise DigestError(
                "the manifest lists no extent of this length here: bytes were removed or added, "
                "and the data from here on could not be checked",
                offset=extent.offset,
            )

    def _next_line(self) -> ExtentDigest | Totals:
        if self._manifest is None:
            raise RuntimeError("no manifest, no lines")
        line = self._manifest.next()
        if isinstance(line, Totals):
            self.totals = line
        return line

    def _begin(self, piece: Piece) -> Callable[[], bytes]:
        extent = piece.extent
        if isinstance(self._hashers, MappedHashers):
            return self._hashers.submit(extent.offset, extent.total_bytes)
        return self._hashers.submit(lambda: self._digest(piece)).result

    def _digest(self, piece: Piece) -> bytes:
        if piece.data is not None:
            return extent_digest(piece.raw_header, piece.data)
        return self._read_digest(piece.extent.offset, piece.extent.total_bytes)

    def _read_digest(self, offset: int, length: int) -> bytes:
        source = self._archive.source
        if not isinstance(source, PlainFile):
            raise RuntimeError("a stream's extent without its data")
        return read_digest(source.read_into, offset, length)

    def _take_oldest(self) -> Iterator[Damage]:
        extent, expected, result = self._ahead.popleft()
        if result() != expected:
            yield from damaged_runs(extent, self._archive.header)

    def give_up(self) -> None:
        """The archive cannot be read on: compare what was read, and no more."""
        self._in_step = False

    def finish(self, archive_bytes: int) -> Iterator[Damage]:
        """The archive has ended. Exhaust it."""
        while self._ahead:
            yield from self._take_oldest()
        if not self._in_step:
            return
        left = 0
        try:
            while isinstance(self._next_line(), ExtentDigest):
                left += 1
        except ArchiveError as error:
            yield damage_of(error)
            return
        if left:
            yield Damage(f"the manifest lists {left} more extents", archive_offset=archive_bytes)
        self.complete = True
        if self.totals is not None:
            yield from _compare_devices(self.totals, self._archive.header)


def damaged_runs(extent: Extent, header: Header) -> Iterator[Damage]:
    """An extent whose digest is wrong: somewhere in these bytes of these devices."""
    text = "the data is damaged, somewhere in this range: the digest is not the manifest's"
    stored = [run for run in extent.runs if not run.is_zero]
    for run in stored:
        device = header.device(run.dev_id)
        start = run.first_cluster * CLUSTER_BYTES
        length = run.count * CLUSTER_BYTES
        name = f"{run.dev_id}" if device is None else device.name
        if device is not None and not device.is_vmstate:
            length = max(0, min(length, device.size_bytes - start))
        yield Damage(text, name, start, length, extent.offset)
    if not stored:
        yield Damage("an extent without data is not the stored one", archive_offset=extent.offset)


def _compare_devices(totals: Totals, header: Header) -> Iterator[Damage]:
    listed = [(d.dev_id, d.name, d.size_bytes) for d in totals.devices]
    found = [(d.dev_id, d.name, d.size_bytes) for d in header.devices]
    if sorted(listed) != sorted(found):
        yield Damage("the manifest's list of devices is not the archive's")
