# SPDX-License-Identifier: Apache-2.0
"""Walks along an open archive: its header, then extent after extent.

From a file only the extents' headers are read; the data stays where it is until
it is needed. From a pipe the data comes along.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.digest import extent_digest
from vmapipe.restore.archive.errors import DigestError
from vmapipe.restore.archive.manifest import Manifest
from vmapipe.restore.archive.source import PlainFile, Source, open_source
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.errors import ArchiveError, HeaderError, NotAnArchiveError
from vmapipe.vma.extent import Extent
from vmapipe.vma.foreign import START_BYTES, foreign_kind
from vmapipe.vma.header import Header
from vmapipe.vma.manifest import ExtentDigest
from vmapipe.vma.scanner import HeaderRead, Scanner


class FoundExtent(NamedTuple):
    """An extent that was found. `digest` is empty where none is known.

    `data` is None where it stays in the file or went into a slot; `slot` is
    the slot's position, -1 where there is none. `left_out`: which of its clusters, counted
    from 0, are not to be restored.
    """

    extent: Extent
    raw_header: bytes
    data: bytes | memoryview | None
    digest: bytes = b""
    slot: int = -1
    left_out: frozenset[int] = frozenset()


class Archive:
    """An open archive whose header was read. A context manager."""

    def __init__(
        self, source: Source, header: Header, raw_header: bytes, held: bytes = b""
    ) -> None:
        """`held`: what a stream has given already of what comes behind the header."""
        self.source = source
        self.header = header
        self.raw_header = raw_header
        self.held = held
        #: Texts for the user: what of the header is lost or only guessed.
        self.notes: list[str] = []
        self.header_error: ArchiveError | None = None

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()


def open_archive(name: str, cancel: Cancel, options: ReadOptions | None = None) -> Archive:
    """Open an archive (see `open_source`) and read its header.

    Raises InputError, UsageError, Cancelled, and ArchiveError where the
    header is damaged or the file is not an archive.
    """
    source = open_source(name, cancel, options)
    try:
        archive = Archive(source, *_read_header(source))
    except HeaderError as error:
        if options is None or not options.salvage:
            error.advice = "; what its extents hold: vmapipe restore --salvage"
        source.close()
        raise
    except BaseException:
        source.close()
        raise
    return archive


def _read_header(source: Source) -> tuple[Header, bytes]:
    scanner = Scanner()
    read = b""
    try:
        while True:
            data = _read_on(source, scanner.wanted_bytes, len(read))
            if not data:
                scanner.close()
            read += data
            for event in scanner.feed(data):
                if isinstance(event, HeaderRead):
                    return event
    except NotAnArchiveError as error:
        if not read:
            raise
        raise _named(error, source, read) from error


def _read_on(source: Source, length: int, at: int) -> bytes:
    return source.pread(length, at) if isinstance(source, PlainFile) else source.read(length)


def _named(error: NotAnArchiveError, source: Source, read: bytes) -> NotAnArchiveError:
    """The error, with what the file is instead, where that can be seen."""
    with contextlib.suppress(ArchiveError):  # compressed data that is damaged, too
        read += _read_on(source, START_BYTES - len(read), len(read))
    kind = foreign_kind(read)
    if kind is None:
        return error
    return NotAnArchiveError(f"{error.text}: it is {kind}", reference_text=error.reference_text)


def check_opening(header: Header, raw_header: bytes, manifest: Manifest) -> None:
    """Raises ArchiveError when the manifest belongs to another archive, DigestError for damage."""
    opening = manifest.opening
    if opening.uuid != header.uuid:
        raise ArchiveError(
            f"the manifest {manifest.path} belongs to another archive (its uuid differs)"
        )
    if opening.header != ExtentDigest(len(raw_header), extent_digest(raw_header)):
        raise DigestError("the header is not the one that was stored: its digest differs", offset=0)


class ArchiveTotals:
    """Sums over the extents so far, in bytes; clusters in full, also a device's last one.

    `clusters` of all devices; `zero_cluster_bytes`: of clusters that are all
    zero; `zero_block_bytes`: of zero blocks inside the others; `data_bytes`:
    what is stored. `archive_bytes`: of the plain archive, header included.
    """

    def __init__(self) -> None:
        self.archive_bytes = self.extents = self.clusters = 0
        self.data_bytes = self.zero_cluster_bytes = 0

    @property
    def cluster_bytes(self) -> int:
        return self.clusters * CLUSTER_BYTES

    @property
    def zero_block_bytes(self) -> int:
        return self.cluster_bytes - self.zero_cluster_bytes - self.data_bytes

    def add(self, extent: Extent) -> None:
        self.archive_bytes = extent.offset + extent.total_bytes
        self.extents += 1
        self.data_bytes += extent.data_bytes
        for run in extent.runs:
            self.clusters += run.count
            self.zero_cluster_bytes += run.masks.count(0) * CLUSTER_BYTES
