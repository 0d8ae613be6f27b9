# SPDX-License-Identifier: Apache-2.0
"""`vmapipe verify`: checks all of an archive that can be checked without writing, and goes on after
damage. `--whole-file` also compares the stored file, byte for byte."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO, RawIOBase
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.digest import file_digest
from vmapipe.restore.archive.errors import InputError, NoKeyError
from vmapipe.restore.archive.manifest import Manifest, manifest_beside, read_stored
from vmapipe.restore.archive.object import ObjectInput, RemoteObject
from vmapipe.restore.archive.reader import Archive, FoundExtent, open_archive
from vmapipe.restore.archive.source import Source
from vmapipe.restore.archive.survey import Gap, survey
from vmapipe.restore.verify.compare import Comparer
from vmapipe.restore.verify.ledger import Ledger, damage_of, open_manifest
from vmapipe.restore.verify.report import Damage, Report
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.object_names import is_object
from vmapipe.vma.manifest import Totals

# Hashing is quicker than any disk; beyond four threads nothing was gained.
_MAX_THREADS = 4
# Often enough for a bar that moves, seldom enough to cost nothing.
_PROGRESS_S = 0.25
# Of a stored file at a time: more at once is not quicker.
_PIECE_BYTES = 1 << 20


class VerifyOptions(NamedTuple):
    """`manifest`: where it is not beside the archive; `check_digests`: use one at all.

    `file_digest`: also compare the stored file as a whole, which reads it once
    more; it finds damage only in a compressed file's padding.
    """

    manifest: str | None = None
    check_digests: bool = True
    file_digest: bool = False
    threads: int = 0
    read: ReadOptions = ReadOptions()


def verify(name: str, emit: Emit, cancel: Cancel, options: VerifyOptions | None = None) -> Report:
    """Check the archive `name` (as for `open_source`).

    What is wrong with it is in the report. Raises ArchiveError where there is
    no beginning (it is not an archive, or its header is damaged), InputError where
    it cannot be read, Cancelled.
    """
    options = options or VerifyOptions()
    report = Report(name)
    started = time.monotonic()
    try:
        with open_archive(name, cancel, options.read._replace(past_errors=True)) as archive:
            report.compression = archive.source.compression
            report.is_encrypted = archive.source.is_encrypted
            if options.file_digest:
                must_be_there_twice(archive.source)
            _Verification(archive, report, options, emit, cancel).run()
    except NoKeyError as error:
        if options.read.identities or not options.check_digests:
            raise
        _verify_stored(name, report, options.manifest, error, cancel)
    report.seconds = time.monotonic() - started
    return report


def _verify_stored(
    name: str, report: Report, manifest: str | None, no_key: NoKeyError, cancel: Cancel
) -> None:
    """Without a key: whether the stored file is the one that its manifest vouches for.

    Raises `no_key` where not even that can be told, and InputError, ArchiveError, Cancelled.
    """
    is_there_twice = is_object(name) or os.path.isfile(name)
    path = manifest or (manifest_beside(name, cancel) if is_there_twice else None)
    stored = read_stored(path, cancel) if path is not None else None
    if stored is None or not is_there_twice:
        raise NoKeyError(
            f"{no_key}; without one its stored file alone could be checked, and there is no manifest "
            "of an encrypted archive beside it"
        )
    report.manifest, report.is_encrypted, report.file_checked = path, True, True
    total_bytes, digest = _digest_of(name, None if is_object(name) else name, cancel)
    report.stored_bytes = total_bytes
    if (total_bytes, digest) != stored[:2]:
        size = f"{total_bytes} bytes long, and {stored.total_bytes} were stored"
        more = "" if total_bytes == stored.total_bytes else f": it is {size}"
        report.add(Damage(f"the file {name} is not, byte for byte, the one that was stored{more}"))


class _Verification:
    def __init__(
        self, archive: Archive, report: Report, options: VerifyOptions, emit: Emit, cancel: Cancel
    ) -> None:
        self._archive = archive
        self._report = report
        self._options = options
        self._emit = emit
        self._cancel = cancel
        self._next_progress = 0.0
        self._total_bytes = CLUSTER_BYTES * sum(d.clusters for d in archive.header.devices)

    def run(self) -> None:
        report = self._report
        report.totals.archive_bytes = self._archive.header.header_bytes
        with ExitStack() as stack:
            manifest = self._open_manifest()
            if manifest is not None:
                stack.enter_context(manifest)
            ledger = Ledger(self._archive, manifest, report.add, lambda piece: piece.data)
            threads = self._options.threads or min(len(os.sched_getaffinity(0)), _MAX_THREADS)
            needed = manifest is not None
            comparer = Comparer(self._archive, threads, self._cancel, needed=needed)
            stack.enter_context(comparer)
            for find in survey(self._archive, self._cancel.check):
                self._take(find, ledger, comparer)
                self._progress()
            for extent in comparer.finish():
                ledger.wrong_digest(extent)
            ledger.finish(report.totals.archive_bytes, self._cancel.check)
            report.data_checked = ledger.data_checked
            report.proved = ledger.proved
            report.disks = ledger.states()
            if self._options.file_digest and ledger.totals is not None:
                for damage in self._check_file(ledger.totals):
                    report.add(damage)
        self._next_progress = 0.0
        self._progress()

    def _take(self, find: FoundExtent | Gap, ledger: Ledger, comparer: Comparer) -> None:
        report = self._report
        if isinstance(find, Gap):
            ledger.gap(find)
            report.totals.archive_bytes = find.offset + find.length
            return
        report.totals.add(find.extent)
        piece = ledger.take(find)
        if piece is not None and piece.digest:
            for extent in comparer.compare(piece):
                ledger.wrong_digest(extent)

    def _open_manifest(self) -> Manifest | None:
        options = self._options
        path: str | None = None
        if options.check_digests:
            path = options.manifest or manifest_beside(self._archive.source.place, self._cancel)
        if path is None:
            return None
        self._report.manifest = path
        manifest, error = open_manifest(self._archive, path, self._cancel)
        if error is not None:
            self._report.add(damage_of(error))
        return manifest

    def _check_file(self, totals: Totals) -> Iterator[Damage]:
        source = self._archive.source
        found = stored_digest(source, self._cancel)
        self._report.file_checked = True
        if found != (totals.file_bytes, totals.file_digest):
            yield Damage(f"the file {source.name} is not, byte for byte, the one that was stored")

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


def must_be_there_twice(source: Source) -> None:
    """Raises UsageError for a source that can be read only once."""
    if source.place is None:
        raise UsageError(
            f"--whole-file: {source.name} can be read only once; verify the stored file"
        )


def stored_digest(source: Source, cancel: Cancel) -> tuple[int, bytes]:
    """Read the stored file once more; return (size in bytes, XXH3-128). Raises InputError, Cancelled."""
    return _digest_of(source.name, source.path, cancel)


def _digest_of(name: str, path: str | None, cancel: Cancel) -> tuple[int, bytes]:
    try:
        with _open(name, path, cancel) as file:
            return file_digest(file, cancel.check)
    except OSError as error:
        raise InputError(f"cannot read {name}: {os_error_text(error)}") from error


def stored_bytes_of(source: Source, cancel: Cancel) -> Iterator[memoryview]:
    """Read the stored file once more, in pieces that are of no use any more when the next one comes.

    Raises InputError, Cancelled.
    """
    view = memoryview(bytearray(_PIECE_BYTES))
    try:
        with _open(source.name, source.path, cancel) as file:
            while got := file.readinto(view):
                cancel.check()
                yield view[:got]
    except OSError as error:
        raise InputError(f"cannot read {source.name}: {os_error_text(error)}") from error


def _open(name: str, path: str | None, cancel: Cancel) -> RawIOBase:
    if path is not None:
        file = FileIO(path)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file
    return ObjectInput(RemoteObject(name, (cancel,)), (cancel,))
