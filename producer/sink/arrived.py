# SPDX-License-Identifier: Apache-2.0
"""What has come from QEMU and waits to be sent: runs of clusters, in the order of coming. Pure."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.protocol.limits import MAX_RUN_CLUSTERS


class Arrived(NamedTuple):
    """A run of clusters that waits to be sent. `position` -1: they are all zero."""

    first: int
    clusters: int
    position: int
    length: int


class Zeroes:
    """Runs of zero clusters: neighbours become one, in whatever order they come.

    QEMU sends each megabyte of empty space as a request of its own: a frame for
    each would cost more than all else of an empty disk.
    """

    def __init__(self) -> None:
        # The same runs by both of their ends: first cluster -> end, end -> first cluster.
        self._ends: dict[int, int] = {}
        self._firsts: dict[int, int] = {}

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self._ends)

    def add(self, first: int, count: int) -> None:
        """None of these clusters may be here already."""
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

    def take(self) -> list[Arrived]:
        """All of them, in the order of the disk, each at most as long as a frame may be."""
        runs = sorted(self._ends.items())
        self._ends.clear()
        self._firsts.clear()
        return [
            Arrived(at, min(MAX_RUN_CLUSTERS, end - at), -1, 0)
            for first, end in runs
            for at in range(first, end, MAX_RUN_CLUSTERS)
        ]
