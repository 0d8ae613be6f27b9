# SPDX-License-Identifier: Apache-2.0
"""Which clusters have arrived: the first one counts, a second one is passed over."""

from __future__ import annotations

from collections.abc import Iterator


class Arrivals:
    """One bit a cluster (2 MiB a TiB). Pure."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        #: How many have arrived.
        self.count = 0
        self._bits = bytearray(-(-clusters // 8))

    @property
    def missing(self) -> int:
        return self.clusters - self.count

    def has(self, cluster: int) -> bool:
        return bool(self._bits[cluster // 8] >> cluster % 8 & 1)

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

    def _span(self, first: int, count: int) -> int:
        return int.from_bytes(self._bits[first // 8 : (first + count - 1) // 8 + 1], "little")


def _ones(first: int, count: int) -> int:
    return ((1 << count) - 1) << first % 8
