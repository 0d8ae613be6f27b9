# SPDX-License-Identifier: Apache-2.0
"""An archive read once, in its own order; the first thing that is wrong with it ends the reading."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.digest import extent_digest
from vmapipe.restore.archive.errors import DigestError, InputError
from vmapipe.restore.archive.manifest import Manifest, ManifestWalk, manifest_beside
from vmapipe.restore.archive.reader import Archive, FoundExtent, check_opening, open_archive
from vmapipe.restore.archive.source import PlainFile, Source
from vmapipe.restore.archive.survey import Gap, survey
from vmapipe.runtime.arguments import check_readable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.objectstore import StoredObject, StoreError
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.errors import ArchiveError

_WAY_OUT = "; what is whole of it: vmapipe restore --salvage"


class SoundArchive:
    """An open archive whose extents come with their data, each held against its manifest if it has one.

    A context manager. `source_state` of the file or object is compared at the end: an archive that
    is replaced or changed while it is read is refused.
    """

    def __init__(self, name: str, cancel: Cancel, options: ReadOptions | None = None) -> None:
        """Raises InputError, UsageError, ArchiveError, Cancelled."""
        check_readable(name)
        self.name = name
        self._cancel = cancel
        self._state = source_state(name)
        self.archive: Archive = open_archive(name, cancel, options)
        self.manifest: Manifest | None = None
        try:
            path = manifest_beside(self.source.place, cancel)
            if path is not None:
                self.manifest = Manifest(path, cancel, self.source.identities)
                check_opening(self.archive.header, self.archive.raw_header, self.manifest)
        except BaseException:
            self.close()
            raise
        #: How many archives in a row were made with a base, as the manifest says; known at the end.
        self.incrementals = 0

    @property
    def source(self) -> Source:
        return self.archive.source

    def __enter__(self) -> SoundArchive:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self.manifest is not None:
            self.manifest.close()
        self.source.close()

    def extents(self) -> Iterator[FoundExtent]:
        """Yield all extents in the order in which they are stored, with their data.

        Raises ArchiveError for the first thing that is wrong, clusters that are missing
        at the end included; InputError, Cancelled.
        """
        try:
            yield from self._extents()
        except ArchiveError as error:
            error.advice = error.advice or _WAY_OUT
            raise
        self.check_unchanged()

    def _extents(self) -> Iterator[FoundExtent]:
        coverage = Coverage(self.archive.header)
        walk = ManifestWalk(self.manifest) if self.manifest is not None else None
        for found in survey(self.archive, self._cancel.check):
            if isinstance(found, Gap):
                raise found.error
            whole = self._with_data(found)
            if walk is not None:
                _check_digest(walk, whole)
            coverage.add(found.extent)
            yield whole
        coverage.finish()
        if walk is not None:
            if walk.finish():
                raise ArchiveError("extents that the manifest lists are missing at the end")
            self.incrementals = walk.totals.incrementals if walk.totals is not None else 0

    def _with_data(self, found: FoundExtent) -> FoundExtent:
        extent = found.extent
        if found.data is not None or not isinstance(self.source, PlainFile):
            return found
        length = extent.data_bytes
        data = self.source.pread(length, extent.offset + EXTENT_HEADER_BYTES) if length else b""
        if len(data) != length:
            raise InputError(
                f"{self.name} is shorter than it was a moment ago, at offset {extent.offset}"
            )
        return found._replace(data=data)

    def check_unchanged(self) -> None:
        """Raises InputError when the file or object is not the one any more that was opened."""
        if source_state(self.name) != self._state:
            raise InputError(
                f"{self.name} was changed or replaced while it was read: nothing is stored; "
                "do it again when its writer is through"
            )


def _check_digest(walk: ManifestWalk, found: FoundExtent) -> None:
    digest = extent_digest(found.raw_header, found.data or b"")
    if walk.digest_of(found.extent, lambda: digest) != digest:
        raise DigestError(
            "it is not what was stored: its digest differs from the manifest's",
            offset=found.extent.offset,
        )


def source_state(name: str) -> tuple[object, ...]:
    """What of a file or object changes when its content does; empty for what is read only once.

    Raises InputError where a store does not answer.
    """
    if is_object(name):
        with contextlib.closing(StoredObject(name)) as store:
            try:
                found = store.head()
            except StoreError as error:
                raise InputError(str(error)) from error
        return () if found is None else (found.etag, found.size_bytes)
    if name == "-" or name.startswith(("fd:", "exec:", "/dev/fdset/", "/dev/fd/")):
        return ()
    try:
        status = os.stat(name)
    except OSError as error:
        raise InputError(f"cannot open the archive {name}: {os_error_text(error)}") from error
    if not os.path.isfile(name):
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
