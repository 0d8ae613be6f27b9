# SPDX-License-Identifier: Apache-2.0
"""Checks all of an archive that can be checked without writing, and goes on after damage."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from vmapipe.restore.archive.reading import Archive, Piece, check_opening, open_archive
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.checks.census import Census
from vmapipe.restore.checks.digest import extent_digest, file_digest, read_digest
from vmapipe.restore.checks.hashers import Hashers, Pending
from vmapipe.restore.checks.manifest import Manifest, manifest_beside
from vmapipe.restore.checks.report import Damage, Report
from vmapipe.restore.checks.survey import Gap, survey
from vmapipe.restore.errors import CompressionError, DigestError, SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import Extent
from vmapipe.vma.header import Header
from vmapipe.vma.layout import CLUSTER_BYTES
from vmapipe.vma.manifest import ExtentDigest, Totals

# Hashing is quicker than any disk; beyond four threads nothing was gained.
_MAX_THREADS = 4
# Often enough for a bar that moves, seldom enough to cost nothing.
_PROGRESS_S = 0.25


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """`manifest`: where it is not beside the archive; `check_digests`: use one at all.

    `file_digest`: also compare the stored file as a whole, which reads it once
    more; it finds damage only in a compressed file's padding.
    """

    manifest: str | None = None
    check_digests: bool = True
    file_digest: bool = False
    threads: int = 0


def verify(name: str, emit: Emit, cancel: Cancel, options: VerifyOptions | None = None) -> Report:
    """Check the archive `name` (as for `open_source`).

    What is wrong with it is in the report. Raises ArchiveError where there is
    no beginning (it is no archive, or its header is damaged), SourceError where
    it cannot be read, Cancelled.
    """
    options = options or VerifyOptions()
    report = Report(name)
    started = time.monotonic()
    with open_archive(name, cancel) as archive:
        report.compression = archive.source.compression
        _Verification(archive, report, options, emit, cancel).run()
    report.seconds = time.monotonic() - started
    return report


def _damage_of(error: ArchiveError) -> Damage:
    if isinstance(error, CompressionError):
        return Damage(f"{error}; what follows could not be checked")
    return Damage(error.text, archive_offset=error.offset, reference_text=error.reference_text)


class _Verification:
    def __init__(
        self, archive: Archive, report: Report, options: VerifyOptions, emit: Emit, cancel: Cancel
    ) -> None:
        self._archive = archive
        self._report = report
        self._options = options
        self._emit = emit
        self._cancel = cancel
        self._census = Census(archive.header)
        self._next_progress = 0.0
        self._total_bytes = CLUSTER_BYTES * sum(d.clusters for d in archive.header.devices)

    def run(self) -> None:
        with ExitStack() as stack:
            digests = stack.enter_context(self._open_digests())
            report = self._report
            report.totals.archive_bytes = self._archive.header.header_bytes
            try:
                for find in survey(self._archive, self._cancel.check):
                    self._cancel.check()
                    self._take(find, digests)
                    self._progress()
            except CompressionError as error:
                # There is no way on: the rest counts as missing.
                report.add([_damage_of(error)])
                digests.give_up()
            report.add(digests.finish(report.totals.archive_bytes))
            report.add(self._census.finish())
            report.data_checked = digests.complete
            if self._options.file_digest and digests.totals is not None:
                report.add(self._check_file(digests.totals))
        self._next_progress = 0.0
        self._progress()

    def _take(self, find: Piece | Gap, digests: _Digests) -> None:
        report = self._report
        if isinstance(find, Gap):
            text = f"{find.error.text}; {find.length} bytes of the archive hold no extent"
            words = find.error.reference_text
            report.add([Damage(text, archive_offset=find.offset, reference_text=words)])
            report.totals.archive_bytes = find.offset + find.length
        else:
            report.totals.add(find.extent)
            report.add(self._census.add(find.extent))
            report.add(digests.check(find))

    def _open_digests(self) -> _Digests:
        options = self._options
        path: str | None = None
        if options.check_digests:
            path = options.manifest or manifest_beside(self._archive.source, self._cancel)
        manifest: Manifest | None = None
        if path is not None:
            self._report.manifest = path
            try:
                manifest = Manifest(path, self._cancel)
                check_opening(self._archive, manifest)
            except DigestError as error:
                self._report.add([_damage_of(error)])
            except ArchiveError as error:
                self._report.add([_damage_of(error)])
                if manifest is not None:
                    manifest.close()
                manifest = None
        threads = options.threads or min(len(os.sched_getaffinity(0)), _MAX_THREADS)
        return _Digests(self._archive, manifest, threads)

    def _check_file(self, totals: Totals) -> Iterator[Damage]:
        path = self._archive.source.path
        if path is None:
            return
        try:
            found = file_digest(path, self._cancel.check)
        except OSError as error:
            raise SourceError(f"cannot read {path}: {os_error_text(error)}") from error
        self._report.file_checked = True
        if found != (totals.file_bytes, totals.file_digest):
            yield Damage(f"the file {path} is not, byte for byte, the one that was stored")

    def _progress(self) -> None:
        now = time.monotonic()
        if now >= self._next_progress:
            self._next_progress = now + _PROGRESS_S
            totals = self._report.totals
            self._emit(
                {
                    "event": "progress",
                    "done_bytes": min(totals.cluster_bytes, self._total_bytes),
                    "total_bytes": self._total_bytes,
                    "archive_bytes": totals.archive_bytes,
                }
            )


class _Digests:
    """Compares extents with a manifest, in threads, some extents ahead; without one, does nothing.

    A context manager. `complete`: all that the manifest lists was compared.
    """

    def __init__(self, archive: Archive, manifest: Manifest | None, threads: int) -> None:
        self.complete = False
        self.totals: Totals | None = None
        self._archive = archive
        self._manifest = manifest
        self._hashers = Hashers(threads)
        # Each holds an extent of up to 3.7 MiB.
        self._limit = 2 * threads
        self._ahead: deque[tuple[Extent, bytes, Pending]] = deque()
        self._at = archive.header.header_bytes
        self._in_step = manifest is not None

    def __enter__(self) -> _Digests:
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
            yield _damage_of(error)
            return
        pending = self._hashers.submit(lambda: self._digest(piece))
        self._ahead.append((piece.extent, expected.digest, pending))
        if len(self._ahead) >= self._limit:
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

    def _digest(self, piece: Piece) -> bytes:
        if piece.data is not None:
            return extent_digest(piece.raw_header, piece.data)
        extent = piece.extent
        source = self._archive.source
        if not isinstance(source, PlainFile):
            raise RuntimeError("a stream's extent without its data")
        return read_digest(source.read_into, extent.offset, extent.total_bytes)

    def _take_oldest(self) -> Iterator[Damage]:
        extent, expected, pending = self._ahead.popleft()
        if pending.result() != expected:
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
            yield _damage_of(error)
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
