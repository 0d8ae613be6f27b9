# SPDX-License-Identifier: Apache-2.0
"""Which clusters of a disk are done: copied, or arrived; each counts once."""

from __future__ import annotations

from collections.abc import Iterator

# How much is looked at in one step when searching: 4 KiB stand for 2 GiB of disk.
_SCAN_BYTES = 4096


class ClusterBits:
    """One bit a cluster (2 MiB a TiB). Pure."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        #: How many are here.
        self.count = 0
        self._bits = bytearray(-(-clusters // 8))

    @property
    def missing(self) -> int:
        return self.clusters - self.count

    def has(self, cluster: int) -> bool:
        return bool(self._bits[cluster // 8] >> cluster % 8 & 1)

    def has_all(self, first: int, count: int) -> bool:
        wanted = _ones(first, count)
        return self._span(first, count) & wanted == wanted

    def how_many(self, first: int, count: int) -> int:
        """How many of these are here already."""
        return (self._span(first, count) & _ones(first, count)).bit_count()

    def add(self, first: int, count: int) -> None:
        """None of them may be here yet."""
        low, high = first // 8, (first + count - 1) // 8
        span = self._span(first, count) | _ones(first, count)
        self._bits[low : high + 1] = span.to_bytes(high + 1 - low, "little")
        self.count += count

    def new(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Runs (first, count) of those that are not here yet, in order; nothing is added."""
        here = self.how_many(first, count)
        if here == 0:
            yield first, count
        if here in (0, count):
            return
        start = None
        for cluster in range(first, first + count + 1):
            is_new = cluster < first + count and not self.has(cluster)
            if is_new and start is None:
                start = cluster
            elif not is_new and start is not None:
                yield start, cluster - start
                start = None

    def next_here(self, cluster: int, end: int) -> int:
        """The first one from `cluster` on that is here, or `end`."""
        return self._next(cluster, end, b"\0", is_here=True)

    def next_missing(self, cluster: int, end: int) -> int:
        """The first one from `cluster` on that is not here, or `end`."""
        return self._next(cluster, end, b"\xff", is_here=False)

    def _next(self, cluster: int, end: int, dull: bytes, *, is_here: bool) -> int:
        """`dull`: a byte of eight clusters that are none of these; many are passed over at once."""
        while cluster < end:
            if cluster % 8 == 0:
                piece = self._bits[cluster // 8 : min(cluster // 8 + _SCAN_BYTES, -(-end // 8))]
                passed = len(piece) - len(piece.lstrip(dull))
                if passed:
                    cluster += 8 * passed
                    continue
            if self.has(cluster) == is_here:
                return cluster
            cluster += 1
        return end

    def _span(self, first: int, count: int) -> int:
        return int.from_bytes(self._bits[first // 8 : (first + count - 1) // 8 + 1], "little")


def _ones(first: int, count: int) -> int:
    return ((1 << count) - 1) << first % 8
