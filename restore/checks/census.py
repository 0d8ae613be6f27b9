# SPDX-License-Identifier: Apache-2.0
"""Counts an archive's clusters and goes on where `Coverage` stops at the first mistake. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from vmapipe.restore.checks.report import Damage
from vmapipe.vma.coverage import PAGE_CLUSTERS, Coverage
from vmapipe.vma.errors import CoverageError
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device, Header
from vmapipe.vma.layout import BLOCK_BYTES, CLUSTER_BYTES, FULL_MASK

_UNKNOWN = "of a device that the header does not list"
_BEYOND = "beyond the device's end"
_DATA_BEYOND = "reaching beyond the device's end with data"
_TWICE = "there a second time"
_MISSING = "missing"
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


class Census:
    """Feed it every extent that was found, then `finish`; both tell what is wrong."""

    def __init__(self, header: Header) -> None:
        self._devices = {device.dev_id: device for device in header.devices}
        self._coverage = Coverage(header)
        self._next_vmstate: dict[int, int] = {}

    def add(self, extent: Extent) -> Iterator[Damage]:
        """Exhaust it."""
        for whole in extent.runs:
            device = self._devices.get(whole.dev_id)
            if device is not None and device.is_vmstate:
                yield from self._add_vmstate(device, whole, extent.offset)
                continue
            for run in _within_pages(whole):
                if not self._counted(run):
                    yield from self._one_by_one(device, run, extent.offset)

    def finish(self) -> Iterator[Damage]:
        """Everything was fed: what is missing."""
        device: Device | None = None
        first = end = 0
        for next_device, next_first, count in self._coverage.missing():
            if next_device is not device or next_first != end:
                if device is not None:
                    yield from _wrong(device, device.dev_id, _MISSING, first, end, None)
                device, first = next_device, next_first
            end = next_first + count
        if device is not None:
            yield from _wrong(device, device.dev_id, _MISSING, first, end, None)

    def _counted(self, run: ClusterRun) -> bool:
        try:
            self._coverage.add(Extent(0, 0, (run,)))
        except CoverageError:
            return False
        return True

    def _one_by_one(self, device: Device | None, run: ClusterRun, at: int) -> Iterator[Damage]:
        """A run with something wrong in it: tells which clusters, neighbours together."""
        wrong = ""
        first = run.first_cluster
        for index, mask in enumerate(run.masks):
            num = run.first_cluster + index
            single = ClusterRun(run.dev_id, num, (mask,), 0)
            why = "" if self._counted(single) else _why(device, num, mask)
            if why != wrong:
                yield from _wrong(device, run.dev_id, wrong, first, num, at)
                wrong, first = why, num
        yield from _wrong(device, run.dev_id, wrong, first, run.first_cluster + run.count, at)

    def _add_vmstate(self, device: Device, run: ClusterRun, at: int) -> Iterator[Damage]:
        first, end = run.first_cluster, run.first_cluster + run.count
        expected = self._next_vmstate.get(device.dev_id, 0)
        self._next_vmstate[device.dev_id] = max(expected, end)
        if first > expected:
            yield from _wrong(device, device.dev_id, _MISSING_VMSTATE, expected, first, at)
        elif first < expected:
            yield from _wrong(device, device.dev_id, _OUT_OF_ORDER, first, end, at)


def _within_pages(run: ClusterRun) -> Iterator[ClusterRun]:
    """Coverage counts such a run wholly or not at all."""
    cut = PAGE_CLUSTERS - run.first_cluster % PAGE_CLUSTERS
    if run.count <= cut:
        yield run
    else:
        yield ClusterRun(run.dev_id, run.first_cluster, run.masks[:cut], run.data_at)
        yield ClusterRun(run.dev_id, run.first_cluster + cut, run.masks[cut:], 0)


def _why(device: Device | None, num: int, mask: int) -> str:
    """What is wrong with a cluster that Coverage refuses."""
    if device is None:
        return _UNKNOWN
    if num >= device.clusters:
        return _BEYOND
    tail_bytes = device.size_bytes - num * CLUSTER_BYTES
    reaches_out = tail_bytes < CLUSTER_BYTES and mask >> -(-tail_bytes // BLOCK_BYTES)
    # A full mask is cut at the end, as the reference tool does.
    return _DATA_BEYOND if reaches_out and mask != FULL_MASK else _TWICE


def _wrong(
    device: Device | None, dev_id: int, why: str, first: int, end: int, at: int | None
) -> Iterator[Damage]:
    """Clusters [first, end) and what is wrong with them (empty: nothing is)."""
    if not why:
        return
    name = str(dev_id) if device is None else device.name
    what = f"cluster {first} is" if end == first + 1 else f"clusters {first}..{end - 1} are"
    words = _REFERENCE_WORDS[why].format(cluster=first, name=name)
    if device is None:
        text = f"{what} {why} ({dev_id})"
        yield Damage(text, archive_offset=at, reference_text=words)
        return
    start = first * CLUSTER_BYTES
    length = (end - first) * CLUSTER_BYTES
    if not device.is_vmstate and start < device.size_bytes:
        length = min(length, device.size_bytes - start)
    yield Damage(f"{what} {why}", name, start, length, at, words)
