# SPDX-License-Identifier: Apache-2.0
"""Walks along an open archive: its header, then extent after extent.

From a file only the extents' headers are read; the data stays where it is for
whoever wants it. From a pipe the data comes along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.source import PlainFile, Source, open_source
from vmapipe.restore.checks.manifest import Manifest
from vmapipe.restore.crew.slots import Slots
from vmapipe.restore.errors import DigestError
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.errors import ArchiveError, ExtentError, NotAnArchiveError
from vmapipe.vma.extent import Extent, parse_extent_header
from vmapipe.vma.foreign import START_BYTES, foreign_kind
from vmapipe.vma.header import Header
from vmapipe.vma.layout import EXTENT_HEADER_BYTES
from vmapipe.vma.manifest import ExtentDigest, Totals
from vmapipe.vma.scanner import HeaderRead, Scanner


class Piece(NamedTuple):
    """One extent. `digest` is empty where none is known.

    `data` is None where it stays in the file or went into a slot; `slot` is
    the slot's position, -1 where there is none.
    """

    extent: Extent
    raw_header: bytes
    data: bytes | None
    digest: bytes = b""
    slot: int = -1


class Archive:
    """An open archive whose header was read. A context manager."""

    def __init__(self, source: Source, header: Header, raw_header: bytes) -> None:
        self.source = source
        self.header = header
        self.raw_header = raw_header

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()

    def read(self, length: int, offset: int) -> bytes:
        """The archive's bytes at `offset`, where the last read must have ended if it is a stream.

        Fewer than `length` only at the end.
        """
        if isinstance(self.source, PlainFile):
            return self.source.pread(length, offset)
        return self.source.read(length)


def open_archive(name: str, cancel: Cancel, options: ReadOptions | None = None) -> Archive:
    """Open an archive (see `open_source`) and read its header.

    Raises SourceError, UsageError, Cancelled, and ArchiveError where the
    header is damaged or the file is no archive.
    """
    source = open_source(name, cancel, options)
    try:
        archive = Archive(source, *_read_header(source))
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


def pieces(archive: Archive, slots: Slots | None) -> Iterator[Piece]:
    """Every extent in order. A stream's data goes into `slots`, which it needs.

    Raises ArchiveError at the first that is damaged or cut off.
    """
    source = archive.source
    at = archive.header.header_bytes
    while raw_header := archive.read(EXTENT_HEADER_BYTES, at):
        extent = parse_extent_header(raw_header, archive.header.uuid, at)
        slot = -1
        got = extent.data_bytes
        if isinstance(source, PlainFile):
            got = min(got, source.size_bytes - at - EXTENT_HEADER_BYTES)
        elif got:
            if slots is None:
                raise RuntimeError("a stream's data needs slots")
            slot = slots.take()
            got = source.readinto(slots.view(slot, got))
        if got < extent.data_bytes:
            raise cut_off(extent, got)
        yield Piece(extent, raw_header, None, slot=slot)
        at += extent.total_bytes
    if isinstance(source, PlainFile) and at < source.size_bytes:
        raise ArchiveError("the archive was cut while it was read", offset=at)


def cut_off(extent: Extent, got: int) -> ExtentError:
    """The archive ends `got` bytes into this extent's data."""
    return ExtentError(
        f"the archive ends inside an extent's data ({got} of {extent.data_bytes} bytes)",
        offset=extent.offset,
        reference_text=(f"short vma extent ({EXTENT_HEADER_BYTES + got} < {extent.total_bytes})"),
    )


def checked_pieces(
    archive: Archive,
    coverage: Coverage,
    manifest: Manifest | None = None,
    slots: Slots | None = None,
) -> Iterator[Piece]:
    """The `pieces`, each with its digest, each checked against the archive's header.

    Raises ArchiveError, also at the end when clusters are missing or the
    manifest lists more.
    """
    if manifest is not None:
        check_opening(archive, manifest)
    archive_bytes = archive.header.header_bytes
    for piece in pieces(archive, slots):
        coverage.add(piece.extent)
        archive_bytes += piece.extent.total_bytes
        if manifest is None:
            yield piece
        else:
            yield piece._replace(digest=_expected(manifest, piece.extent).digest)
    coverage.finish()
    if manifest is not None and not isinstance(manifest.next(), Totals):
        raise ArchiveError(
            "the archive ends here, and the manifest lists more extents", offset=archive_bytes
        )


def check_opening(archive: Archive, manifest: Manifest) -> None:
    """Raises ArchiveError when the manifest belongs to another archive, DigestError for damage."""
    from vmapipe.restore.checks.digest import extent_digest  # here: only where there is a manifest

    opening = manifest.opening
    if opening.uuid != archive.header.uuid:
        raise ArchiveError(
            f"the manifest {manifest.path} belongs to another archive (its uuid differs)"
        )
    if opening.header != ExtentDigest(len(archive.raw_header), extent_digest(archive.raw_header)):
        raise DigestError("the header is not the one that was stored: its digest differs", offset=0)


def _expected(manifest: Manifest, extent: Extent) -> ExtentDigest:
    line = manifest.next()
    if isinstance(line, Totals) or line.total_bytes != extent.total_bytes:
        raise DigestError(
            "an extent that the manifest does not list: the archive was changed",
            offset=extent.offset,
        )
    return line
