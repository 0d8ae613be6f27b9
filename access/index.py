# SPDX-License-Identifier: Apache-2.0
"""An index of an archive: where each cluster of each device is stored. Pure.

An index is made of runs: consecutive clusters that are stored one behind the other
in one extent and have the same mask, or that are all zero. A disk that was read in
order has one run for each 3.6 MiB of data, and one for each hole whatever its size.
"""

from __future__ import annotations

import itertools
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, FULL_MASK, MAX_CLUSTERS
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import UUID_BYTES, Device, Header
from vmapipe.vma.manifest import DIGEST_BYTES

# A run's place, as one 64-bit number: the extent's number + 1, the first block in the
# extent's data, the mask of each cluster. 0: zeroes, which are stored nowhere.
_EXTENT_SHIFT = 32
_BLOCK_SHIFT = 16
_MASK_BITS = 0xFFFF
_ZERO = 0
#: The cluster is not in the archive.
_MISSING = (1 << 64) - 1
MAX_EXTENTS = (1 << 32) - 2


class StoredRun(NamedTuple):
    """A run of clusters `first` to `end` - 1 of one device.

    `extent` is the number of the extent that holds it, -1 for zeroes, -2 for clusters that
    are not in the archive. `block`: where the data of `first` begins in the extent's
    data, in blocks of 4 KiB; each cluster has the blocks of `mask` (bit 0: its first one).
    """

    first: int
    end: int
    extent: int
    block: int
    mask: int

    @property
    def is_zero(self) -> bool:
        return self.extent == -1

    @property
    def is_missing(self) -> bool:
        return self.extent == -2

    def block_of(self, cluster: int) -> int:
        """Where the data of one of its clusters begins in the extent's data, in blocks."""
        return self.block + (cluster - self.first) * self.mask.bit_count()


class DiskIndex:
    """The runs of one device, in the order of the disk. Made by `IndexBuilder`."""

    def __init__(self, clusters: int, firsts: array[int], places: array[int]) -> None:
        self.clusters = clusters
        self.firsts = firsts
        self.places = places

    def find(self, cluster: int) -> StoredRun:
        """The run that `cluster` (0 to `clusters` - 1) is in."""
        at = bisect_right(self.firsts, cluster) - 1
        end = self.firsts[at + 1] if at + 1 < len(self.firsts) else self.clusters
        return _place(self.firsts[at], end, self.places[at])

    def data_at(self, offset: int, length: int) -> tuple[int, int] | None:
        """Where these bytes of the device are, if they lie in one run, whole: (extent, byte).

        The byte counts from the start of the extent's data. (-1, 0): they are zero. None: it
        is not so simple. The quick way for small reads, which are most.
        """
        at = bisect_right(self.firsts, offset // CLUSTER_BYTES) - 1
        first, packed = self.firsts[at], self.places[at]
        end = self.firsts[at + 1] if at + 1 < len(self.firsts) else self.clusters
        if offset + length > end * CLUSTER_BYTES:
            return None
        if packed == _ZERO:
            return -1, 0
        if packed & _MASK_BITS != FULL_MASK or packed == _MISSING:
            return None
        block = packed >> _BLOCK_SHIFT & 0xFFFF
        byte = offset - first * CLUSTER_BYTES + block * BLOCK_BYTES
        return (packed >> _EXTENT_SHIFT) - 1, byte

    def stored_bytes(self) -> int:
        """What the disk takes without its zero blocks. Missing clusters count as a whole."""
        ends = [*self.firsts[1:], self.clusters]
        blocks = sum(
            (end - first) * (16 if place == _MISSING else (place & _MASK_BITS).bit_count())
            for first, end, place in zip(self.firsts, ends, self.places, strict=True)
        )
        return blocks * BLOCK_BYTES

    def missing(self) -> list[tuple[int, int]]:
        """Clusters that are not in the archive, as (first, count)."""
        ends = [*self.firsts[1:], self.clusters]
        return [
            (first, end - first)
            for first, end, place in zip(self.firsts, ends, self.places, strict=True)
            if place == _MISSING
        ]


def _place(first: int, end: int, packed: int) -> StoredRun:
    if packed == _MISSING:
        return StoredRun(first, end, -2, 0, 0)
    block = packed >> _BLOCK_SHIFT & 0xFFFF
    return StoredRun(first, end, (packed >> _EXTENT_SHIFT) - 1, block, packed & _MASK_BITS)


class ArchiveIndex:
    """The runs of all devices, and the extents that hold data: offset, length, digest.

    `offsets` and `sizes` are in bytes of the plain archive, headers included. `digests` has
    16 bytes for each extent, or nothing at all where there is no manifest.
    """

    def __init__(self, uuid: bytes) -> None:
        self.uuid = uuid
        self.disks: dict[int, DiskIndex] = {}
        self.offsets: array[int] = array("Q")
        self.sizes: array[int] = array("I")
        self.digests = bytearray()

    def digest_of(self, extent: int) -> bytes:
        """Empty where there is none."""
        return bytes(self.digests[extent * DIGEST_BYTES : (extent + 1) * DIGEST_BYTES])

    def agrees_with(self, number: int, extent: Extent) -> bool:
        """Whether everything that points to this extent is what its header says.

        So an index that was kept in a file is not trusted where data is read.
        """
        for run in extent.runs:
            disk = self.disks.get(run.dev_id)
            for part in _parts(run) if disk is not None else ():
                if disk is None or part.first + part.clusters > disk.clusters:
                    return False
                found = disk.find(part.first)
                if part.mask == 0:
                    if not found.is_zero:
                        return False
                elif (found.extent, found.mask, found.block_of(part.first)) != (
                    number,
                    part.mask,
                    part.block,
                ):
                    return False
        return True


class _Part(NamedTuple):
    """Clusters of a run that have the same mask."""

    first: int
    clusters: int
    mask: int
    block: int


def _parts(run: ClusterRun) -> Iterable[_Part]:
    block = run.data_at // BLOCK_BYTES
    if run.is_full or run.is_zero:
        return [_Part(run.first_cluster, run.count, run.masks[0], block)]
    parts: list[_Part] = []
    for number, mask in enumerate(run.masks, start=run.first_cluster):
        last = parts[-1] if parts else None
        if last is not None and last.mask == mask:
            parts[-1] = last._replace(clusters=last.clusters + 1)
        else:
            parts.append(_Part(number, 1, mask, block))
        block += mask.bit_count()
    return parts


def _clusters(device: Device) -> int:
    """Return how many clusters a device may have; of a machine's memory the header has an estimate."""
    return MAX_CLUSTERS if device.is_vmstate else device.clusters


class IndexBuilder:
    """Takes an archive's extents in any order; `finish` gives the index.

    Clusters that come twice are missing from it: which of them is right cannot be known. `double` has
    the first of each device.
    """

    def __init__(self, header: Header) -> None:
        self.index = ArchiveIndex(header.uuid)
        self.double: dict[int, int] = {}
        self._runs = {device.dev_id: _Runs(_clusters(device)) for device in header.devices}

    def add(self, extent: Extent, digest: bytes = b"") -> None:
        """`digest` of the whole extent: for all of them, or for none."""
        number = -1
        if extent.data_bytes:
            number = len(self.index.offsets)
            self.index.offsets.append(extent.offset)
            self.index.sizes.append(extent.total_bytes)
            self.index.digests += digest
        for run in extent.runs:
            runs = self._runs.get(run.dev_id)
            if runs is None:
                continue
            for part in _parts(run):
                packed = _ZERO
                if part.mask:
                    packed = (number + 1) << _EXTENT_SHIFT | part.block << _BLOCK_SHIFT | part.mask
                runs.add(part.first, part.clusters, packed)

    def find(self, dev_id: int, cluster: int) -> StoredRun | None:
        """Like `DiskIndex.find`, for the runs so far; None where the cluster has not come, or not in order."""
        return self._runs[dev_id].find(cluster)

    def finish(self) -> ArchiveIndex:
        for dev_id, runs in self._runs.items():
            disk, double = runs.finish()
            self.index.disks[dev_id] = disk
            if double is not None:
                self.double[dev_id] = double
        return self.index


class _Runs:
    """Runs of one device as they come; most archives have them in order."""

    def __init__(self, clusters: int) -> None:
        self._clusters = clusters
        self._firsts = array("Q")
        self._counts = array("Q")
        self._places = array("Q")
        self._in_order = True

    def add(self, first: int, count: int, place: int) -> None:
        count = min(count, self._clusters - first)
        if count <= 0:
            return  # beyond the device's end: damage that `verify` tells
        if self._firsts:
            end = self._firsts[-1] + self._counts[-1]
            if place == _ZERO == self._places[-1] and first == end:
                self._counts[-1] += count
                return
            self._in_order = self._in_order and first >= end
        self._firsts.append(first)
        self._counts.append(count)
        self._places.append(place)

    def find(self, cluster: int) -> StoredRun | None:
        at = bisect_right(self._firsts, cluster) - 1 if self._in_order else -1
        if at < 0 or cluster >= self._firsts[at] + self._counts[at]:
            return None
        first = self._firsts[at]
        return _place(first, first + self._counts[at], self._places[at])

    def finish(self) -> tuple[DiskIndex, int | None]:
        """The index, and the first cluster that came twice."""
        found = _Sorted()
        twice = _Sorted(between=_ZERO)
        order: Sequence[int] = range(len(self._firsts))
        if not self._in_order:
            order = sorted(order, key=self._firsts.__getitem__)
        for at in order:
            first, count, place = self._firsts[at], self._counts[at], self._places[at]
            known = min(max(0, found.end - first), count)
            if known:
                start = max(first, twice.end)
                twice.append(start, max(0, first + known - start), _MISSING)
            found.append(first + known, count - known, _moved(place, known))
        found.append(self._clusters, 0, _MISSING)
        disk = DiskIndex(self._clusters, found.firsts, found.places)
        doubles = [
            (first, end)
            for first, end, place in zip(twice.firsts, twice.ends(), twice.places, strict=True)
            if place == _MISSING
        ]
        return (_without(disk, doubles), doubles[0][0]) if doubles else (disk, None)


def _moved(place: int, clusters: int) -> int:
    """The place of a run's rest, without its first clusters."""
    if place in (_ZERO, _MISSING):
        return place
    return place + (clusters * (place & _MASK_BITS).bit_count() << _BLOCK_SHIFT)


class _Sorted:
    """Runs that are appended in the order of the disk; what lies between them is missing."""

    def __init__(self, between: int = _MISSING) -> None:
        self.firsts: array[int] = array("Q")
        self.places: array[int] = array("Q")
        self.end = 0
        self._between = between

    def append(self, first: int, count: int, place: int) -> None:
        if first > self.end:
            self._push(self.end, self._between)
            self.end = first
        if count:
            self._push(first, place)
            self.end = first + count

    def _push(self, first: int, place: int) -> None:
        if not (self.places and place == self.places[-1] and place in (_ZERO, _MISSING)):
            self.firsts.append(first)
            self.places.append(place)

    def ends(self) -> list[int]:
        return [*self.firsts[1:], self.end] if self.firsts else []


def _without(disk: DiskIndex, doubles: Sequence[tuple[int, int]]) -> DiskIndex:
    """Mark these clusters, which are in order and do not overlap, as missing."""
    kept = _Sorted()
    ends = [*disk.firsts[1:], disk.clusters]
    at = 0
    for first, end, place in zip(disk.firsts, ends, disk.places, strict=True):
        start = first
        while start < end:
            while at < len(doubles) and doubles[at][1] <= start:
                at += 1
            low, high = doubles[at] if at < len(doubles) else (end, end)
            stop = min(end, max(start, low))
            kept.append(start, stop - start, _moved(place, start - first))
            start = min(end, max(stop, high)) if stop < end else end
            kept.append(stop, start - stop, _MISSING)
    return DiskIndex(disk.clusters, kept.firsts, kept.places)


# --- As a file ---

_MAGIC = b"vmapipe-index-1\n"
_HEAD = struct.Struct("<16sIQI")
_DISK = struct.Struct("<IQQ")


def encode_index(index: ArchiveIndex) -> bytes:
    """Encode the index in this machine's byte order; a machine of the other order does not read it."""
    parts = [
        _MAGIC,
        sys.byteorder.encode()[:1],
        _HEAD.pack(index.uuid, len(index.disks), len(index.offsets), len(index.digests) and 1),
        index.offsets.tobytes(),
        index.sizes.tobytes(),
        bytes(index.digests),
    ]
    for dev_id, disk in index.disks.items():
        parts.append(_DISK.pack(dev_id, disk.clusters, len(disk.firsts)))
        parts += (disk.firsts.tobytes(), disk.places.tobytes())
    return b"".join(parts)


def decode_index(raw: bytes, header: Header) -> ArchiveIndex | None:
    """The index of this archive; None for anything that is not one."""
    start = len(_MAGIC) + 1
    if raw[:start] != _MAGIC + sys.byteorder.encode()[:1] or len(raw) < start + _HEAD.size:
        return None
    uuid, disks, extents, has_digests = _HEAD.unpack_from(raw, start)
    if uuid != header.uuid or len(uuid) != UUID_BYTES or extents > MAX_EXTENTS:
        return None
    index = ArchiveIndex(uuid)
    reader = _Reader(raw, start + _HEAD.size)
    try:
        index.offsets = reader.numbers("Q", extents)
        index.sizes = reader.numbers("I", extents)
        index.digests = bytearray(reader.take(extents * DIGEST_BYTES if has_digests else 0))
        for _ in range(disks):
            dev_id, clusters, runs = _DISK.unpack(reader.take(_DISK.size))
            firsts, places = reader.numbers("Q", runs), reader.numbers("Q", runs)
            index.disks[dev_id] = DiskIndex(clusters, firsts, places)
    except ValueError:
        return None
    return index if reader.is_at_end and _is_sound(index, header) else None


def _is_sound(index: ArchiveIndex, header: Header) -> bool:
    """Return whether all positions in the index lie inside the archive."""
    sizes = {device.dev_id: _clusters(device) for device in header.devices}
    if {dev_id: disk.clusters for dev_id, disk in index.disks.items()} != sizes:
        return False
    for disk in index.disks.values():
        firsts = disk.firsts
        if not firsts or firsts[0] or firsts[-1] >= disk.clusters:
            return False
        if any(a >= b for a, b in itertools.pairwise(firsts)):
            return False
        numbers = (p >> _EXTENT_SHIFT for p in disk.places if p != _MISSING)
        if any(number > len(index.offsets) for number in numbers):
            return False
    return True


class _Reader:
    def __init__(self, raw: bytes, at: int) -> None:
        self._raw = raw
        self._at = at

    def take(self, length: int) -> bytes:
        """Raises ValueError where there is less."""
        piece = self._raw[self._at : self._at + length]
        if len(piece) != length:
            raise ValueError("the index is cut off")
        self._at += length
        return piece

    def numbers(self, code: str, count: int) -> array[int]:
        numbers: array[int] = array(code)
        numbers.frombytes(self.take(count * numbers.itemsize))
        return numbers

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._raw)
