# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a read have arrived, in chunks that come in any order and never overlap."""

from __future__ import annotations

from bisect import bisect_right


class Coverage:
    """Ranges of bytes, neighbours joined: chunks in order cost no memory."""

    def __init__(self) -> None:
        self.covered_bytes = 0
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, length: int) -> bool:
        """False, and nothing is added, when the range touches a byte that was there before."""
        starts, ends = self._starts, self._ends
        end = start + length
        at = bisect_right(starts, start)
        if (at and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            return False
        if at and ends[at - 1] == start:
            ends[at - 1] = end
        else:
            starts.insert(at, start)
            ends.insert(at, end)
            at += 1
        if at < len(starts) and starts[at] == end:
            ends[at - 1] = ends[at]
            del starts[at], ends[at]
        self.covered_bytes += length
        return True
