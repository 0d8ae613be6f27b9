# SPDX-License-Identifier: Apache-2.0
"""Which clusters were seen: each of every device exactly once, none beyond its end."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from vmapipe.vma.errors import CoverageError
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device, Header
from vmapipe.vma.layout import BLOCK_BYTES, BLOCKS_PER_CLUSTER, FULL_MASK, cluster_count
from vmapipe.vma.names import printable

# Clusters a page of the set covers: 4 GiB of disk in 8 KiB of bitmap. A page
# that is full shrinks to one entry, so a disk that arrives in order costs a
# few bytes a GiB whatever its size.
PAGE_CLUSTERS = _PAGE = 1 << 16
# A page with at most so many clusters lists them, 2 bytes each: an archive
# whose clusters lie far apart must not cost 8 KiB for each of them.
_FEW = 256


class ClusterSet:
    """A set of cluster numbers below `size`, made for long runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        # None: the page is full. Not there: it is empty.
        self._pages: dict[int, _Page | None] = {}

    def add(self, first: int, count: int) -> int | None:
        """Add a run; return the first cluster that was in already.

        Then nothing is promised of a run that crosses a multiple of
        PAGE_CLUSTERS; any other was not added at all.
        """
        end = first + count
        if not 0 <= first <= end <= self.size:
            raise ValueError(f"clusters {first} + {count} in a set of {self.size}")
        at = first
        while at < end:
            number = at // _PAGE
            stop = min(end, (number + 1) * _PAGE)
            double = self._add_in_page(number, at - number * _PAGE, stop - number * _PAGE)
            if double is not None:
                return number * _PAGE + double
            at = stop
        self.count += count
        return None

    def _add_in_page(self, number: int, first: int, stop: int) -> int | None:
        length = min(_PAGE, self.size - number * _PAGE)
        if number not in self._pages:
            if stop - first == length:
                self._pages[number] = None
                return None
            self._pages[number] = _Page()
        page = self._pages[number]
        if page is None:
            return first
        double = page.add(first, stop)
        if page.used == length and double is None:
            self._pages[number] = None
        return double

    def add_all(self, first: int, count: int) -> None:
        """Add a run of which some, or all, may be in already."""
        at, end = first, first + count
        while at < end:
            stop = min(end, (at // _PAGE + 1) * _PAGE)
            if self.add(at, stop - at) is not None:
                for single in range(at, stop):
                    self.add(single, 1)
            at = stop

    def present(self) -> Iterator[tuple[int, int]]:
        """The runs (first, count) that are in, page by page, in order."""
        for number in sorted(self._pages):
            base = number * _PAGE
            length = min(_PAGE, self.size - base)
            page = self._pages[number]
            if page is None:
                yield base, length
                continue
            clear = bytes(byte ^ 0xFF for byte in page.bits())
            for first, count in _clear_runs(clear, length):
                yield base + first, count

    def missing(self, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The runs (first, count) below `end` that are not in, page by page, in order."""
        size = self.size if end is None else end
        for number in range(-(-size // _PAGE)):
            base = number * _PAGE
            length = min(_PAGE, size - base)
            if number not in self._pages:
                yield base, length
                continue
            page = self._pages[number]
            if page is not None:
                for first, count in _clear_runs(page.bits(), length):
                    yield base + first, count


class _Page:
    """A page that is neither empty nor full."""

    __slots__ = ("_bits", "_few", "used")

    def __init__(self) -> None:
        self.used = 0
        self._few = array("H")
        self._bits: bytearray | None = None

    def add(self, first: int, stop: int) -> int | None:
        """Add [first, stop), or return the first that was in already and add none."""
        used = self.used + stop - first
        if self._bits is None and used > _FEW:
            self._bits = self.bits()
            self._few = array("H")
        if self._bits is None:
            double = self._list(first, stop)
        else:
            double = _set_bits(self._bits, first, stop)
        if double is None:
            self.used = used
        return double

    def _list(self, first: int, stop: int) -> int | None:
        at = bisect_left(self._few, first)
        if at < len(self._few) and self._few[at] < stop:
            return self._few[at]
        self._few[at:at] = array("H", range(first, stop))
        return None

    def bits(self) -> bytearray:
        if self._bits is not None:
            return self._bits
        bits = bytearray(_PAGE // 8)
        for cluster in self._few:
            bits[cluster >> 3] |= 1 << (cluster & 7)
        return bits


def _set_bits(bits: bytearray, first: int, stop: int) -> int | None:
    """Set bits [first, stop); return the first that was set before."""
    low, high = first // 8, (stop - 1) // 8
    span = int.from_bytes(bits[low : high + 1], "little")
    wanted = ((1 << (stop - first)) - 1) << (first - low * 8)
    double = span & wanted
    if double:
        return low * 8 + (double & -double).bit_length() - 1
    bits[low : high + 1] = (span | wanted).to_bytes(high + 1 - low, "little")
    return None


def _clear_runs(bits: bytes | bytearray, length: int) -> Iterator[tuple[int, int]]:
    rest = ~int.from_bytes(bits, "little") & ((1 << length) - 1)
    at = 0
    while rest:
        skip = (rest & -rest).bit_length() - 1
        rest >>= skip
        count = (~rest & (rest + 1)).bit_length() - 1
        rest >>= count
        yield at + skip, count
        at += skip + count


def joined(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs (first, count) in order, neighbours made one."""
    first = count = 0
    for next_first, next_count in runs:
        if count and next_first == first + count:
            count += next_count
            continue
        if count:
            yield first, count
        first, count = next_first, next_count
    if count:
        yield first, count


class _DeviceCoverage:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.clusters = ClusterSet(device.clusters)
        self.next_vmstate = 0


class Coverage:
    """Checks an archive's extents against its header. Feed it every extent, then `finish`."""

    def __init__(self, header: Header) -> None:
        self._devices = {d.dev_id: _DeviceCoverage(d) for d in header.devices}

    def add(self, extent: Extent) -> None:
        """Raises CoverageError for the first cluster that cannot be right."""
        for run in extent.runs:
            state = self._devices.get(run.dev_id)
            if state is None:
                raise CoverageError(
                    f"a cluster of device {run.dev_id}, which the header does not list",
                    device=str(run.dev_id),
                    cluster_num=run.first_cluster,
                    offset=extent.offset,
                    reference_text=f"got wrong dev id {run.dev_id}",
                )
            if state.device.is_vmstate:
                self._add_vmstate(state, run, extent.offset)
            else:
                self._add_disk(state, run, extent.offset)

    def _add_vmstate(self, state: _DeviceCoverage, run: ClusterRun, offset: int) -> None:
        if run.first_cluster != state.next_vmstate:
            raise CoverageError(
                f"vmstate: cluster {run.first_cluster} where {state.next_vmstate} must come",
                device=state.device.name,
                cluster_num=run.first_cluster,
                offset=offset,
                reference_text="found out of order vmstate data",
            )
        state.next_vmstate += run.count

    def _add_disk(self, state: _DeviceCoverage, run: ClusterRun, offset: int) -> None:
        device = state.device
        end = run.first_cluster + run.count
        if end > device.clusters:
            raise CoverageError(
                f"device {device.name!r}: cluster {max(run.first_cluster, device.clusters)} lies "
                f"beyond its end ({device.clusters} clusters)",
                device=device.name,
                cluster_num=max(run.first_cluster, device.clusters),
                offset=offset,
                reference_text="got wrong block address - write beyond end",
            )
        if end == device.clusters and not mask_fits(device, run.masks[-1]):
            raise CoverageError(
                f"device {device.name!r}: cluster {end - 1} has data beyond the device's end",
                device=device.name,
                cluster_num=end - 1,
                offset=offset,
                reference_text="got wrong block address - write beyond end",
            )
        double = state.clusters.add(run.first_cluster, run.count)
        if double is not None:
            raise CoverageError(
                f"device {device.name!r}: cluster {double} comes a second time",
                device=device.name,
                cluster_num=double,
                offset=offset,
                reference_text=(
                    f"found duplicated cluster {double} for stream {printable(device.name)}"
                ),
            )

    def missing_of(self, dev_id: int) -> Iterator[tuple[int, int]]:
        """Runs (first cluster, count) of this device that have not come."""
        return self._devices[dev_id].clusters.missing()

    def clusters_seen(self, dev_id: int) -> int:
        """How many of its clusters have come."""
        return self._devices[dev_id].clusters.count

    def missing(self) -> Iterator[tuple[Device, int, int]]:
        """(device, first cluster, count) of what has not come; vmstate has no fixed length."""
        for state in self._devices.values():
            if not state.device.is_vmstate:
                for first, count in state.clusters.missing():
                    yield state.device, first, count

    def finish(self) -> None:
        """Raises CoverageError when the archive ended and clusters are missing."""
        for device, first, _ in self.missing():
            expected = cluster_count(device.size_bytes)
            got = self._devices[device.dev_id].clusters.count
            raise CoverageError(
                f"device {device.name!r}: cluster {first} is missing "
                f"({expected - got} of {expected} are)",
                device=device.name,
                cluster_num=first,
                reference_text=(
                    f"detected missing cluster {first} for stream {printable(device.name)}"
                ),
            )

    def vmstate_clusters(self, dev_id: int) -> int:
        """How long the vmstate stream is so far, in clusters."""
        return self._devices[dev_id].next_vmstate


def mask_fits(device: Device, mask: int, *, cut_full: bool = True) -> bool:
    """Whether a last cluster's mask stays within the device.

    A reader cuts a full mask at the device's end (`cut_full`), as the
    reference does; any other must not have a block beyond it.
    """
    if cut_full and mask == FULL_MASK:
        return True
    tail_bytes = device.size_bytes - (device.clusters - 1) * BLOCKS_PER_CLUSTER * BLOCK_BYTES
    return mask >> -(-tail_bytes // BLOCK_BYTES) == 0
