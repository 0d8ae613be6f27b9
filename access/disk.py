# SPDX-License-Identifier: Apache-2.0
"""A device of an archive as what stands behind an NBD export. Read-only."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence

from vmapipe.access.archive import OpenArchive, Report
from vmapipe.access.index import StoredRun
from vmapipe.access.storage import PlainStorage, read_error
from vmapipe.clusters.masks import mask_runs
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_HEADER_BYTES, FULL_MASK
from vmapipe.producer.nbd.backend import Write
from vmapipe.protocol.nbd.constants import NBD_STATE_HOLE, NBD_STATE_ZERO
from vmapipe.runtime.text import name_text
from vmapipe.vma.header import Device

_ZEROES = memoryview(bytes(1 << 20))
# Beyond that, copying the pieces costs less than one of them each.
_MAX_VIEWS = 64


def named_disks(
    archive: OpenArchive, is_possible: Callable[[str], bool], report: Report
) -> list[tuple[str, ArchiveDisk]]:
    """Each disk under a name that no other one has; a machine's memory is none.

    An archive that a stranger made may have two of a name, or one that `is_possible` denies: they are
    called by their number, which `report` is told. No disk is out of reach for what another one is called.
    """
    devices = [device for device in archive.header.devices if not device.is_vmstate]
    taken = {device.name for device in devices}
    found: list[tuple[str, ArchiveDisk]] = []
    done = set[str]()
    for device in devices:
        name = device.name
        if name in done or not is_possible(name):
            name = f"device-{device.dev_id}"
            while name in taken:
                name += "-"
            why = "a name that another one has" if device.name in done else "no name for it here"
            report(
                f"{archive.name}: device {device.dev_id} is called {name_text(device.name)}, {why}: "
                f"it is shown as {name}"
            )
        taken.add(name)
        done.update((name, device.name))
        found.append((name, ArchiveDisk(archive, device)))
    return found


class ArchiveDisk:
    """One device. Reads are checked; every write is refused. See `nbd.backend.Backend`."""

    def __init__(self, archive: OpenArchive, device: Device) -> None:
        self.device = device
        self.size_bytes = device.size_bytes
        self._name = device.name
        self._archive = archive
        self._dev_id = device.dev_id
        self._stored_bytes: int | None = None
        self._try_stored = archive.storage.try_read_into
        self._mapped = archive.storage if isinstance(archive.storage, PlainStorage) else None

    # --- reads ---

    def try_read(self, target: memoryview, offset: int) -> bool:
        """Zeroes, and data that was checked before and is in memory."""
        archive = self._archive
        index = archive.index.disks.get(self._dev_id)
        if index is None:
            return False  # it is still being made: what is not there yet is waited for
        found = index.data_at(offset, len(target))
        if found is not None:
            extent, byte = found
            if extent < 0:
                return _clear(target)
            if not archive.is_checked(extent):
                return False
            start = archive.index.offsets[extent] + EXTENT_HEADER_BYTES
            return self._try_stored(target, start + byte)
        at = 0
        while at < len(target):
            place = self._find(offset + at)
            piece = target[at : at + place.end * CLUSTER_BYTES - offset - at]
            if place.is_zero:
                _clear(piece)
            elif (
                place.is_missing
                or not self._archive.is_checked(place.extent)
                or not self._try_data(piece, offset + at, place)
            ):
                return False
            at += len(piece)
        return True

    def views(self, offset: int, length: int) -> Sequence[memoryview] | None:
        """See `nbd.backend.Mapped`: zeroes, and data that was checked before, of a plain file."""
        archive = self._archive
        index = archive.index.disks.get(self._dev_id)
        if index is None or self._mapped is None:
            return None
        found = index.data_at(offset, length)
        if found is None:
            return self._many_views(self._mapped, offset, length)
        extent, byte = found
        if extent < 0:
            return list(_zeroes(length))
        if not archive.is_checked(extent):
            return None
        start = archive.index.offsets[extent] + EXTENT_HEADER_BYTES
        view = self._mapped.view(start + byte, length)
        return None if view is None else (view,)

    def _many_views(
        self, mapped: PlainStorage, offset: int, length: int
    ) -> Sequence[memoryview] | None:
        views: list[memoryview] = []
        end = offset + length
        while offset < end:
            place = self._find(offset)
            size = min(end, place.end * CLUSTER_BYTES) - offset
            if place.is_zero:
                views += _zeroes(size)
            elif place.is_missing or not self._archive.is_checked(place.extent):
                return None
            else:
                for piece, position in self._pieces(size, offset, place):
                    if position is None:
                        views += _zeroes(piece)
                        continue
                    view = mapped.view(position, piece)
                    if view is None or len(views) >= _MAX_VIEWS:
                        return None
                    views.append(view)
            offset += size
        return views

    def distrust_views(self) -> None:
        if self._mapped is not None:
            self._mapped.distrust_views()

    def _find(self, offset: int) -> StoredRun:
        return self._archive.find(self._dev_id, offset // CLUSTER_BYTES)

    def _try_data(self, target: memoryview, offset: int, place: StoredRun) -> bool:
        at = 0
        for length, position in self._pieces(len(target), offset, place):
            piece = target[at : at + length]
            if position is None:
                _clear(piece)
            elif not self._try_stored(piece, position):
                return False
            at += length
        return True

    def read(self, target: memoryview, offset: int) -> None:
        """Raises OSError (EIO) where the data is damaged, missing or cannot be read."""
        at = 0
        while at < len(target):
            place = self._find(offset + at)
            piece = target[at : at + place.end * CLUSTER_BYTES - offset - at]
            if place.is_zero:
                _clear(piece)
            else:
                self._read_data(piece, offset + at, place)
            at += len(piece)

    def _read_data(self, target: memoryview, offset: int, place: StoredRun) -> None:
        if place.is_missing:
            raise self._fault(offset, "the archive does not hold these bytes, or holds them twice")
        try:
            self._archive.ensure(place.extent, f"device {self._name!r}, byte {offset}")
        except OSError as error:
            raise self._fault(offset, error.strerror or str(error)) from error
        at = 0
        for length, position in self._pieces(len(target), offset, place):
            piece = target[at : at + length]
            if position is None:
                _clear(piece)
            else:
                self._read_stored(piece, position, offset + at)
            at += length

    def _read_stored(self, target: memoryview, position: int, offset: int) -> None:
        try:
            count = self._archive.storage.read_into(target, position)
        except OSError as error:
            raise self._fault(offset, error.strerror or str(error)) from error
        if count < len(target):
            raise self._fault(offset, "the archive is shorter than it was")

    def _fault(self, offset: int, why: str) -> OSError:
        return read_error(f"device {self._name!r}", offset, why)

    def _pieces(
        self, total: int, offset: int, place: StoredRun
    ) -> Iterator[tuple[int, int | None]]:
        """Lengths of parts of `total` bytes, and where each is in the plain archive; None: it is zero."""
        start = self._archive.index.offsets[place.extent] + EXTENT_HEADER_BYTES
        if place.mask == FULL_MASK:
            into = offset - place.first * CLUSTER_BYTES
            yield total, start + place.block * BLOCK_BYTES + into
            return
        blocks = [None if not place.mask >> bit & 1 else bit for bit in range(16)]
        at = 0
        while at < total:
            cluster, within = divmod(offset + at, CLUSTER_BYTES)
            bit = within // BLOCK_BYTES
            # As many blocks as are all stored, or all zero.
            last = bit
            while last < 15 and (blocks[last + 1] is None) == (blocks[bit] is None):
                last += 1
            length = min(total - at, (last + 1) * BLOCK_BYTES - within)
            position = None
            if blocks[bit] is not None:
                before = (place.mask & ((1 << bit) - 1)).bit_count()
                block = place.block_of(cluster) + before
                position = start + block * BLOCK_BYTES + within % BLOCK_BYTES
            yield length, position
            at += length

    def stored_bytes(self) -> int:
        """Return the disk's size without its zero blocks; all of it while that is not known."""
        if self._stored_bytes is None:
            index = self._archive.index.disks.get(self._dev_id)
            if index is None:
                return self.size_bytes
            self._stored_bytes = index.stored_bytes()
        return min(self._stored_bytes, self.size_bytes)

    def cache(self, offset: int, length: int) -> None:
        """Nothing is gained by it."""

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Zero blocks are holes. What is missing is data: reading it tells that it is not there."""
        end = offset + length
        hole = NBD_STATE_HOLE | NBD_STATE_ZERO
        while offset < end:
            try:
                place = self._find(offset)
            except OSError:  # what is compressed ends before it: as if it were missing
                yield end - offset, 0
                return
            stop = min(end, place.end * CLUSTER_BYTES)
            if place.is_zero:
                yield stop - offset, hole
            elif place.is_missing or place.mask == FULL_MASK:
                yield stop - offset, 0
            else:
                yield from self._block_extents(offset, stop, place.mask)
            offset = stop

    def _block_extents(self, offset: int, stop: int, mask: int) -> Iterator[tuple[int, int]]:
        hole = NBD_STATE_HOLE | NBD_STATE_ZERO
        while offset < stop:
            base = offset - offset % CLUSTER_BYTES
            for first, count in mask_runs(mask):
                data, after = base + first * BLOCK_BYTES, base + (first + count) * BLOCK_BYTES
                if offset < min(data, stop):
                    yield min(data, stop) - offset, hole
                    offset = min(data, stop)
                if offset < min(after, stop):
                    yield min(after, stop) - offset, 0
                    offset = min(after, stop)
            rest = min(base + CLUSTER_BYTES, stop) - offset
            if rest > 0:
                yield rest, hole
                offset += rest

    # --- writes ---

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        return [_read_only() for _ in writes]

    def try_zeroes(self, offset: int, length: int) -> bool:
        raise _read_only()

    def settle(self, *, idle: bool) -> None:
        """Nothing is ever put off."""

    def write(self, data: memoryview, offset: int) -> None:
        raise _read_only()

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        raise _read_only()

    def trim(self, offset: int, length: int) -> None:
        raise _read_only()

    def flush(self) -> None:
        """There is nothing to flush."""


def _clear(target: memoryview) -> bool:
    at = 0
    while at < len(target):
        length = min(len(target) - at, len(_ZEROES))
        target[at : at + length] = _ZEROES[:length]
        at += length
    return True


def _zeroes(length: int) -> Iterator[memoryview]:
    for at in range(0, length, len(_ZEROES)):
        yield _ZEROES[: length - at]


def _read_only() -> OSError:
    return OSError(errno.EPERM, os.strerror(errno.EPERM))
