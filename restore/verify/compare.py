# SPDX-License-Identifier: Apache-2.0
"""Compares data with the manifest: extents with their digests, and whole devices with theirs.

A device's digest vouches for one disk when an extent that holds several is damaged
(docs/vma-format.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from vmapipe.clusters.sizes import BLOCK_BYTES, EXTENT_HEADER_BYTES
from vmapipe.restore.archive.digest import Hasher, extent_digest, read_digest
from vmapipe.restore.archive.reader import Archive, FoundExtent
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.archive.survey import survey
from vmapipe.restore.verify.mapped import MappedHashers
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import can_fork
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import ClusterRun, Extent

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


class Comparer:
    """In processes where that can be (`MappedHashers`), else in threads. A context manager."""

    def __init__(self, archive: Archive, count: int, cancel: Cancel, *, needed: bool) -> None:
        """`needed`: there is something to compare with."""
        self._archive = archive
        self._processes: MappedHashers | None = None
        if needed and isinstance(archive.source, PlainFile) and can_fork():
            self._processes = MappedHashers(archive.source.fd, count, self._read_digest, cancel)
        self._threads: ThreadPoolExecutor | None = None
        if needed and self._processes is None:
            # Late: it brings `logging` along, and most archives are hashed in processes.
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(count, "digest")
        # Each holds an extent of up to 3.7 MiB, except in processes that map the file: there,
        # many at a time mean fewer wake-ups, a tenth of all the work.
        self._limit, self._rest = 2 * count, 2 * count - 1
        if self._processes is not None:
            self._limit, self._rest = 16 * count, 8 * count
        self._ahead: deque[tuple[Extent, bytes, Callable[[], bytes]]] = deque()

    def __enter__(self) -> Comparer:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._processes is not None:
            self._processes.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def compare(self, piece: FoundExtent) -> Iterator[Extent]:
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

    def _begin(self, piece: FoundExtent) -> Callable[[], bytes]:
        extent = piece.extent
        if self._processes is not None:
            return self._processes.submit(extent.offset, extent.total_bytes)
        if self._threads is None:
            raise RuntimeError("a digest where none was needed")
        return self._threads.submit(digest_of, self._archive, piece, piece.data).result

    def _read_digest(self, offset: int, length: int) -> bytes:
        source = self._archive.source
        if not isinstance(source, PlainFile):
            raise RuntimeError("a stream's extent without its data")
        return read_digest(source.read_into, offset, length)

    def _take_oldest(self) -> Iterator[Extent]:
        extent, expected, result = self._ahead.popleft()
        if result() != expected:
            yield extent


def digest_of(archive: Archive, piece: FoundExtent, data: bytes | memoryview | None) -> bytes:
    """The digest of an extent as it is in the archive; `data`: a stream's."""
    source = archive.source
    if isinstance(source, PlainFile):
        return read_digest(source.read_into, piece.extent.offset, piece.extent.total_bytes)
    return extent_digest(piece.raw_header, data or b"")


class DeviceDigests:
    """Feed it extents in the archive's order, with their data."""

    def __init__(self, dev_ids: Collection[int]) -> None:
        self._devices = {dev_id: _OrderedDigest() for dev_id in dev_ids}

    def add(self, extent: Extent, data: bytes | memoryview) -> None:
        """`data`: the extent's stored blocks."""
        view = memoryview(data)
        for run in extent.runs:
            device = self._devices.get(run.dev_id)
            if device is not None:
                device.add(run, view[run.data_at : run.data_at + run.data_bytes])

    def digest(self, dev_id: int) -> bytes | None:
        """None where the clusters did not come in order."""
        device = self._devices.get(dev_id)
        return device.hasher.digest() if device is not None and device.in_order else None


class _OrderedDigest:
    def __init__(self) -> None:
        self.in_order = True
        self.hasher = Hasher()
        self._next = 0

    def add(self, run: ClusterRun, data: memoryview) -> None:
        self.in_order = self.in_order and run.first_cluster == self._next
        if not self.in_order:
            return
        self._next += run.count
        if run.is_zero:
            self.hasher.update(bytes(2 * run.count))
            return
        at = 0
        for mask in run.masks:
            stop = at + mask.bit_count() * BLOCK_BYTES
            self.hasher.update(mask.to_bytes(2, "big"))
            self.hasher.update(data[at:stop])
            at = stop


def digests_of_file(
    archive: Archive, dev_ids: Collection[int], check: Callable[[], None]
) -> DeviceDigests:
    """The digests of some devices of an archive that is a plain file, read once more."""
    source = archive.source
    digests = DeviceDigests(dev_ids)
    if not isinstance(source, PlainFile):
        raise RuntimeError("a stream cannot be read once more")
    for piece in survey(archive, check):
        if isinstance(piece, FoundExtent) and any(
            run.dev_id in dev_ids for run in piece.extent.runs
        ):
            extent = piece.extent
            data = source.pread(extent.data_bytes, extent.offset + EXTENT_HEADER_BYTES)
            if len(data) < extent.data_bytes:
                raise ArchiveError("the archive was cut while it was read", offset=extent.offset)
            digests.add(extent, data)
    return digests
