# SPDX-License-Identifier: Apache-2.0
"""Data that QEMU has sent: chunks that wait for the archiver, runs of zeroes, clusters in parts. Pure.

QEMU writes whole clusters. Should another version cut them, the backup is
slower and still right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.limits import MAX_RUN_CLUSTERS

#: In the place of a position: the clusters are all zero, or as the base has them.
ZEROES, UNCHANGED = -1, -2


class Chunk(NamedTuple):
    """A run of clusters that waits to be sent. `position`: where its data is, ZEROES or UNCHANGED."""

    first: int
    clusters: int
    position: int
    length: int


class ZeroRuns:
    """Runs of zero clusters: neighbours become one, in whatever order they come.

    QEMU sends each megabyte of empty space as a request of its own: a frame for
    each would cost more than all else of an empty disk.
    """

    def __init__(self) -> None:
        # The same runs by both of their ends: first cluster -> end, end -> first cluster.
        self._ends: dict[int, int] = {}
        self._firsts: dict[int, int] = {}

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._ends)

    def add(self, first: int, count: int) -> None:
        """Add zero clusters, none of which may be here already."""
        end = first + count
        before = self._firsts.pop(first, None)
        if before is not None:
            first = before
        behind = self._ends.pop(end, None)
        if behind is not None:
            del self._firsts[behind]
            end = behind
        self._ends[first] = end
        self._firsts[end] = first

    def take(self) -> list[Chunk]:
        """Remove and return all runs, in the order of the disk, none longer than a frame may be."""
        runs = sorted(self._ends.items())
        self._ends.clear()
        self._firsts.clear()
        return [
            Chunk(at, min(MAX_RUN_CLUSTERS, end - at), -1, 0)
            for first, end in runs
            for at in range(first, end, MAX_RUN_CLUSTERS)
        ]


# Each costs 64 KiB. QEMU has at most 16 requests under way, each with two
# clusters that it may have cut; somewhat more for a client with more of them.
MAX_PARTIAL_CLUSTERS = 128


class TooManyPartialClusters(Exception):
    """More clusters were begun than memory is meant for."""


class _Begun:
    def __init__(self, length: int) -> None:
        self.data = bytearray(length)
        #: Bytes of it that have not come yet, as ranges [start, end).
        self.missing = [(0, length)]

    def put(self, at: int, data: bytes | memoryview) -> None:
        """The first that comes counts, also for a part."""
        end, left = at + len(data), []
        for start, stop in self.missing:
            low, high = max(start, at), min(stop, end)
            if low >= high:
                left.append((start, stop))
                continue
            self.data[low:high] = data[low - at : high - at]
            left += [(a, b) for a, b in ((start, low), (high, stop)) if a < b]
        self.missing = left


class PartialClusters:
    """The clusters of a disk of `size_bytes` bytes that have come in part. Pure."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._begun: dict[int, _Begun] = {}

    def add(self, offset: int, data: bytes | memoryview) -> bytes | None:
        """Part of one cluster; returns the cluster when that made it whole.

        Raises TooManyParts.
        """
        cluster, at = divmod(offset, CLUSTER_BYTES)
        begun = self._begun.get(cluster)
        if begun is None:
            if len(self._begun) >= MAX_PARTIAL_CLUSTERS:
                raise TooManyPartialClusters
            length = min(CLUSTER_BYTES, self._size_bytes - cluster * CLUSTER_BYTES)
            begun = self._begun[cluster] = _Begun(length)
        begun.put(at, data)
        if begun.missing:
            return None
        del self._begun[cluster]
        return bytes(begun.data)

    def forget(self, first: int, count: int) -> None:
        """Drop the parts of these clusters, which have come whole."""
        for cluster in [c for c in self._begun if first <= c < first + count]:
            del self._begun[cluster]


def is_whole(offset: int, length: int, size_bytes: int) -> bool:
    """Return whether these bytes are whole clusters; the last one of the disk may be shorter."""
    end = offset + length
    return not offset % CLUSTER_BYTES and (not end % CLUSTER_BYTES or end == size_bytes)


def pieces(offset: int, length: int, size_bytes: int, most: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths: runs of at most `most` whole clusters, and parts of one cluster."""
    at, end = offset, offset + length
    while at < end:
        if at % CLUSTER_BYTES:
            stop = min(end, at - at % CLUSTER_BYTES + CLUSTER_BYTES)
        else:
            stop = min(end, at + most * CLUSTER_BYTES)
            if stop != size_bytes and stop - stop % CLUSTER_BYTES > at:
                stop -= stop % CLUSTER_BYTES
        yield at, stop - at
        at = stop
