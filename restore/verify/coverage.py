# SPDX-License-Identifier: Apache-2.0
"""Counts an archive's clusters and goes on where `Coverage` stops at the first mistake. Pure.

It also keeps which clusters are damaged, so that at the end it can say of each device what
is missing, what is damaged, and that all else is there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import starmap
from typing import TYPE_CHECKING, Final

from vmapipe.clusters.cluster_set import PAGE_CLUSTERS, ClusterSet, joined
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, FULL_MASK, MAX_CLUSTERS
from vmapipe.restore.verify.report import BadRange, Damage
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.errors import CoverageError
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device, Header

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import RangeStateName

_UNKNOWN = "of a device that the header does not list"
_BEYOND = "beyond the device's end"
_DATA_BEYOND = "reaching beyond the device's end with data"
_TWICE = "there a second time"
_MISSING: Final = "missing"
_MISSING_VMSTATE = "missing: this stream must be in order"
_OUT_OF_ORDER = "out of order"
_REFERENCE_WORDS = {
    _UNKNOWN: "got wrong dev id {name}",
    _BEYOND: "got wrong block address - write beyond end",
    _DATA_BEYOND: "got wrong block address - write beyond end",
    _TWICE: "found duplicated cluster {cluster} for stream {name}",
    _MISSING: "detected missing cluster {cluster} for stream {name}",
    _MISSING_VMSTATE: "found out of order vmstate data",
    _OUT_OF_ORDER: "found out of order vmstate data",
}
UNREADABLE = "the disk that the archive is on cannot read it"
NOT_THERE = "no extent of the archive that can be read holds it"
TWICE = "it is in the archive more than once; the first one counts"


class CoverageReport:
    """Feed it every extent that was found, then `finish`; both tell what is wrong.

    `first_error`: the first of it, as an error. `left_out`: of the extent that was fed last,
    the clusters (counted from 0) that were there before.
    """

    def __init__(self, header: Header) -> None:
        self.first_error: CoverageError | None = None
        self.left_out: frozenset[int] = frozenset()
        self._devices = {device.dev_id: device for device in header.devices}
        self._coverage = Coverage(header)
        self._vmstate = {d.dev_id: _Stream() for d in header.devices if d.is_vmstate}
        self._damaged: dict[int, dict[str, ClusterSet]] = {}

    def add(self, extent: Extent) -> Iterator[Damage]:
        """Exhaust it."""
        self.left_out = frozenset()
        number = 0
        for whole in extent.runs:
            device, count = self._devices.get(whole.dev_id), whole.count
            if device is not None and whole.dev_id in self._vmstate:
                yield from self._add_vmstate(device, whole, extent.offset, number)
            else:
                for run in _within_pages(whole, count):
                    if not self._counted(run, extent.offset):
                        at = number + run.first_cluster - whole.first_cluster
                        yield from self._one_by_one(device, run, extent.offset, at)
            number += count

    def finish(self) -> Iterator[Damage]:
        """Everything was fed: what is missing."""
        for device in self._devices.values():
            if not device.is_vmstate:
                for first, count in self._missing(device):
                    yield from _wrong(device, device.dev_id, _MISSING, first, first + count, None)
        try:
            self._coverage.finish()
        except CoverageError as error:
            self._found(error)

    def mark(self, runs: Iterable[ClusterRun], reason: str) -> None:
        """Mark clusters as damaged; ignore those that no device has."""
        for run in runs:
            self.mark_clusters(run.dev_id, run.first_cluster, run.count, reason)

    def mark_clusters(self, dev_id: int, first: int, count: int, reason: str) -> None:
        """Like `mark`, for one run."""
        device = self._devices.get(dev_id)
        if device is None:
            return
        size = MAX_CLUSTERS if device.is_vmstate else device.clusters
        count = min(count, size - first)
        if count > 0:
            sets = self._damaged.setdefault(dev_id, {})
            if reason not in sets:
                sets[reason] = ClusterSet(size)
            sets[reason].add_all(first, count)

    def unmark(self, dev_id: int, reason: str) -> None:
        """Remove marks: what was marked so has proved to be right."""
        self._damaged.get(dev_id, {}).pop(reason, None)

    def reasons(self, dev_id: int) -> set[str]:
        """Why clusters of this device are marked."""
        return set(self._damaged.get(dev_id, {}))

    def ranges(self, device: Device) -> Iterator[BadRange]:
        """Yield all that is missing or damaged, in the device's order."""
        kinds = [_ranges(device, self._missing(device), "missing", NOT_THERE)]
        for reason, clusters in self._damaged.get(device.dev_id, {}).items():
            kinds.append(_ranges(device, joined(clusters.present()), _kind(reason), reason))
        yield from heapq.merge(*kinds)

    def is_complete(self, device: Device) -> bool:
        """Return whether all clusters have come (of vmstate: none is missing in between)."""
        return next(self._missing(device), None) is None

    def vmstate_clusters(self, dev_id: int) -> int:
        """How long the vmstate stream is so far, in clusters."""
        return self._vmstate[dev_id].end

    def clusters_seen(self, device: Device) -> int:
        """How many different clusters of the device have come."""
        if device.is_vmstate:
            return self._vmstate[device.dev_id].clusters.count
        return self._coverage.clusters_seen(device.dev_id)

    def _missing(self, device: Device) -> Iterator[tuple[int, int]]:
        if device.is_vmstate:
            stream = self._vmstate[device.dev_id]
            return joined(stream.clusters.missing(0, stream.end))
        return joined(self._coverage.missing_of(device.dev_id))

    def _found(self, error: CoverageError) -> None:
        self.first_error = self.first_error or error

    def _counted(self, run: ClusterRun, offset: int) -> bool:
        try:
            self._coverage.add_run(run, offset)
        except CoverageError as error:
            self._found(error)
            return False
        return True

    def _one_by_one(
        self, device: Device | None, run: ClusterRun, at: int, number: int
    ) -> Iterator[Damage]:
        """A run with something wrong in it: tells which clusters, neighbours together."""
        wrong = ""
        first = run.first_cluster
        for index, mask in enumerate(run.masks):
            num = run.first_cluster + index
            single = ClusterRun(run.dev_id, num, (mask,), 0)
            why = "" if self._counted(single, at) else _why(device, num, mask)
            if why:
                self.left_out |= {number + index}
            if why == _TWICE:
                self.mark_clusters(run.dev_id, num, 1, TWICE)
            if why != wrong:
                yield from _wrong(device, run.dev_id, wrong, first, num, at)
                wrong, first = why, num
        yield from _wrong(device, run.dev_id, wrong, first, run.first_cluster + run.count, at)

    def _add_vmstate(
        self, device: Device, run: ClusterRun, at: int, number: int
    ) -> Iterator[Damage]:
        first, end = run.first_cluster, run.first_cluster + run.count
        stream = self._vmstate[device.dev_id]
        expected, stream.end = stream.end, max(stream.end, end)
        for part in _within_pages(run, run.count):
            if stream.clusters.add(part.first_cluster, part.count) is None:
                continue
            for num in range(part.first_cluster, part.first_cluster + part.count):
                if stream.clusters.add(num, 1) is not None:
                    self.left_out |= {number + num - first}
                    self.mark_clusters(device.dev_id, num, 1, TWICE)
        if first != expected:
            self._found(
                CoverageError(
                    f"vmstate: cluster {first} where {expected} must come",
                    device=device.name,
                    cluster_num=first,
                    offset=at,
                    reference_text="found out of order vmstate data",
                )
            )
        if first > expected:
            yield from _wrong(device, device.dev_id, _MISSING_VMSTATE, expected, first, at)
        elif first < expected:
            yield from _wrong(device, device.dev_id, _OUT_OF_ORDER, first, end, at)


class _Stream:
    """The machine's memory: which clusters have come, and where it ends so far."""

    def __init__(self) -> None:
        self.clusters = ClusterSet(MAX_CLUSTERS)
        self.end = 0


def _within_pages(run: ClusterRun, count: int) -> tuple[ClusterRun, ...]:
    """Coverage counts such a run wholly or not at all."""
    cut = PAGE_CLUSTERS - run.first_cluster % PAGE_CLUSTERS
    if count <= cut:
        return (run,)
    return (
        ClusterRun(run.dev_id, run.first_cluster, run.masks[:cut], run.data_at),
        ClusterRun(run.dev_id, run.first_cluster + cut, run.masks[cut:], 0),
    )


def _why(device: Device | None, num: int, mask: int) -> str:
    """Return what is wrong with a cluster that Coverage refuses."""
    if device is None:
        return _UNKNOWN
    if num >= device.clusters:
        return _BEYOND
    tail_bytes = device.size_bytes - num * CLUSTER_BYTES
    reaches_out = tail_bytes < CLUSTER_BYTES and mask >> -(-tail_bytes // BLOCK_BYTES)
    # A full mask is cut at the end, as the reference tool does.
    return _DATA_BEYOND if reaches_out and mask != FULL_MASK else _TWICE


def _ranges(
    device: Device, runs: Iterable[tuple[int, int]], state: RangeStateName, reason: str
) -> Iterator[BadRange]:
    def of(first: int, count: int) -> BadRange:
        return BadRange(first * CLUSTER_BYTES, _length(device, first, count), state, reason)

    return starmap(of, runs)


def _length(device: Device, first: int, count: int) -> int:
    """Bytes of these clusters, as far as they are the device's."""
    start, length = first * CLUSTER_BYTES, count * CLUSTER_BYTES
    if not device.is_vmstate and start < device.size_bytes:
        length = min(length, device.size_bytes - start)
    return length


def _wrong(
    device: Device | None, dev_id: int, why: str, first: int, end: int, at: int | None
) -> Iterator[Damage]:
    """Clusters [first, end) and what is wrong with them (empty: nothing is)."""
    if not why:
        return
    name = str(dev_id) if device is None else device.name
    what = f"cluster {first} is" if end == first + 1 else f"clusters {first}..{end - 1} are"
    reference_text = _REFERENCE_WORDS[why].format(cluster=first, name=name)
    if device is None:
        text = f"{what} {why} ({dev_id})"
        yield Damage(text, archive_offset=at, reference_text=reference_text)
        return
    start, length = first * CLUSTER_BYTES, _length(device, first, end - first)
    yield Damage(f"{what} {why}", name, start, length, at, reference_text)


def _kind(reason: str) -> RangeStateName:
    return "missing" if reason == UNREADABLE else "damaged"
