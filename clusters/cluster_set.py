# SPDX-License-Identifier: Apache-2.0
"""Sets of cluster numbers: which clusters of a disk are copied, have arrived or were seen."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from vmapipe.clusters.masks import bit_runs

# Clusters a page of the set covers: 4 GiB of disk in 8 KiB of bitmap. A page
# that is full shrinks to one entry, so a disk that arrives in order costs a
# few bytes a GiB whatever its size.
PAGE_CLUSTERS = _PAGE = 1 << 16
# A page with at most so many clusters lists them, 2 bytes each: an archive
# whose clusters lie far apart must not cost 8 KiB for each of them.
_FEW = 256


class ClusterSet:
    """A set of cluster numbers below `size`, made for long runs. At most a bit a cluster.

    A run is (first cluster, count). `missing` and `present` give runs page by page, so
    one that crosses a multiple of PAGE_CLUSTERS comes in pieces (see `joined`).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        # None: the page is full. Not there: it is empty.
        self._pages: dict[int, _Page | None] = {}

    # --- adding ---

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
            number, start = divmod(at, _PAGE)
            stop = min(_PAGE, start + end - at)
            length = min(_PAGE, self.size - number * _PAGE)
            if number not in self._pages:
                self._pages[number] = None if stop - start == length else _Page()
                page = self._pages[number]
                double = None if page is None else page.add(start, stop)
            else:
                page = self._pages[number]
                double = start if page is None else page.add(start, stop)
            if double is not None:
                return number * _PAGE + double
            if page is not None and page.used == length:
                self._pages[number] = None
            at += stop - start
        self.count += count
        return None

    def add_all(self, first: int, count: int) -> None:
        """Add a run of which some, or all, may be in already."""
        for run_first, run_count in list(self.missing(first, first + count)):
            self.add(run_first, run_count)

    # --- asking ---

    def has(self, cluster: int) -> bool:
        return self.count_in(cluster, 1) == 1

    def has_all(self, first: int, count: int) -> bool:
        return self.count_in(first, count) == count

    def count_in(self, first: int, count: int) -> int:
        """How many clusters of this run are in."""
        number, start = divmod(first, _PAGE)
        if start + count <= _PAGE:  # nearly always, and asked before each write of a guest
            page = self._pages.get(number, _EMPTY)
            return count if page is None else page.count_in(start, start + count)
        found = 0
        for number, start, stop in _pages_of(first, first + count):
            page = self._pages.get(number, _EMPTY)
            found += stop - start if page is None else page.count_in(start, stop)
        return found

    def present(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the runs in [`first`, `end`) that are in, in order."""
        return self._runs(first, end, 0)

    def missing(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the runs in [`first`, `end`) that are not in, in order."""
        return self._runs(first, end, -1)

    def _runs(self, first: int, end: int | None, flip: int) -> Iterator[tuple[int, int]]:
        """`flip`: -1 for the clusters that are not in, else 0."""
        for number, start, stop in _pages_of(first, self.size if end is None else end):
            at = number * _PAGE + start
            page = self._pages.get(number, _EMPTY)
            if page is None or page is _EMPTY:
                if (page is None) == (flip == 0):
                    yield at, stop - start
                continue
            bits = (page.window(start, stop) ^ flip) & ((1 << (stop - start)) - 1)
            for run_first, count in bit_runs(bits):
                yield at + run_first, count

    def next_present(self, cluster: int, end: int) -> int:
        """Return the first cluster in [`cluster`, `end`) that is in, or `end`."""
        return self._next(cluster, end, is_in=True)

    def next_missing(self, cluster: int, end: int) -> int:
        """Return the first cluster in [`cluster`, `end`) that is not in, or `end`."""
        return self._next(cluster, end, is_in=False)

    def _next(self, cluster: int, end: int, *, is_in: bool) -> int:
        for number, start, stop in _pages_of(cluster, end):
            page = self._pages.get(number, _EMPTY)
            if page is None:
                found = start if is_in else stop
            else:
                found = page.next(start, stop, is_in=is_in)
            if found < stop:
                return number * _PAGE + found
        return end


class _Page:
    """A page that is not full: a list of its clusters while they are few, else a bitmap."""

    __slots__ = ("_bits", "_few", "used")

    def __init__(self) -> None:
        self.used = 0
        self._few = array("H")
        self._bits: bytearray | None = None

    def add(self, first: int, stop: int) -> int | None:
        """Add [first, stop), or return the first that was in already and add none."""
        used = self.used + stop - first
        if self._bits is None and used > _FEW:
            self._bits = bytearray(self.window(0, _PAGE).to_bytes(_PAGE // 8, "little"))
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

    def count_in(self, first: int, stop: int) -> int:
        if self._bits is None:
            return bisect_left(self._few, stop) - bisect_left(self._few, first)
        return self.window(first, stop).bit_count()

    def window(self, first: int, stop: int) -> int:
        """The bits of [first, stop); the lowest stands for `first`."""
        if self._bits is not None:
            span = int.from_bytes(self._bits[first // 8 : (stop + 7) // 8], "little")
            return span >> first % 8 & ((1 << (stop - first)) - 1)
        bits = bytearray((stop - first + 7) // 8)
        for cluster in self._few[bisect_left(self._few, first) : bisect_left(self._few, stop)]:
            bits[(cluster - first) >> 3] |= 1 << (cluster - first & 7)
        return int.from_bytes(bits, "little")

    def next(self, first: int, stop: int, *, is_in: bool) -> int:
        """The first in [first, stop) that is in, or is not; `stop`: there is none."""
        if self._bits is None:
            return self._next_listed(first, stop, is_in=is_in)
        # Bytes of eight clusters that are none of these are passed over at once.
        dull = b"\0" if is_in else b"\xff"
        while first < stop:
            if first % 8 == 0:
                piece = self._bits[first // 8 : (stop + 7) // 8]
                first += 8 * (len(piece) - len(piece.lstrip(dull)))
                if first >= stop:
                    break
            if bool(self._bits[first // 8] >> first % 8 & 1) == is_in:
                return first
            first += 1
        return stop

    def _next_listed(self, first: int, stop: int, *, is_in: bool) -> int:
        at = bisect_left(self._few, first)
        if is_in:
            return min(self._few[at], stop) if at < len(self._few) else stop
        while at < len(self._few) and self._few[at] == first:
            first, at = first + 1, at + 1
        return min(first, stop)


_EMPTY = _Page()


def _set_bits(bits: bytearray, first: int, stop: int) -> int | None:
    """Set bits [first, stop); if some was set before, set none and return the first of these."""
    low, high = first // 8, (stop - 1) // 8
    span = int.from_bytes(bits[low : high + 1], "little")
    wanted = ((1 << (stop - first)) - 1) << first % 8
    double = span & wanted
    if double:
        return low * 8 + (double & -double).bit_length() - 1
    bits[low : high + 1] = (span | wanted).to_bytes(high + 1 - low, "little")
    return None


def _pages_of(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The pages that hold [first, end), each as (number, first, stop) within the page."""
    while first < end:
        number = first // _PAGE
        base = number * _PAGE
        stop = min(end, base + _PAGE)
        yield number, first - base, stop - base
        first = stop


def joined(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield runs (first, count) in order, neighbours made one."""
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
