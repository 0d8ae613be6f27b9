# SPDX-License-Identifier: Apache-2.0
"""Clusters that come in parts: collected until they are whole.

QEMU writes whole clusters. Should another version cut them, the backup is
slower and still right.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmapipe.protocol.limits import CLUSTER_BYTES

# Each costs 64 KiB. QEMU has at most 16 requests under way, each with two
# clusters that it may have cut; somewhat more for a client with more of them.
MAX_PARTIAL_CLUSTERS = 128


class TooManyParts(Exception):
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


class Parts:
    """Of a disk of `size_bytes` bytes. Pure."""

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
                raise TooManyParts
            length = min(CLUSTER_BYTES, self._size_bytes - cluster * CLUSTER_BYTES)
            begun = self._begun[cluster] = _Begun(length)
        begun.put(at, data)
        if begun.missing:
            return None
        del self._begun[cluster]
        return bytes(begun.data)

    def forget(self, first: int, count: int) -> None:
        """These clusters have come whole."""
        for cluster in [c for c in self._begun if first <= c < first + count]:
            del self._begun[cluster]


def is_whole(offset: int, length: int, size_bytes: int) -> bool:
    """Whether these bytes of a disk are whole clusters, the last one being what it is."""
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
