# SPDX-License-Identifier: Apache-2.0
"""Copy-before-write, the book-keeping: which clusters are copied, who waits for whom.

Pure: no lock, thread or I/O. Whoever serves a disk holds a lock around every
call, copies what it is told to copy, and lets its writes wait for the copies
that it is told to wait for.

The state of a cluster is todo, copying or done; it only moves in this order,
so each is copied exactly once, by a guest's write or by the background reader,
whoever comes first.
"""

from __future__ import annotations

from typing import NamedTuple

# How much of the bitmap is looked at in one step when searching for work:
# 4 KiB of it stand for 2 GiB of disk.
_SCAN_BYTES = 4096


class Copy:
    """One run of clusters that somebody is copying right now."""

    __slots__ = ("by_guest", "clusters", "finished", "first")

    def __init__(self, first: int, clusters: int, *, by_guest: bool) -> None:
        self.first = first
        self.clusters = clusters
        self.by_guest = by_guest
        self.finished = False

    def overlaps(self, first: int, clusters: int) -> bool:
        return self.first < first + clusters and first < self.first + self.clusters


class BeforeWrite(NamedTuple):
    """What has to happen before a write: copy these, and wait until those are copied."""

    copies: list[Copy]
    waits: list[Copy]


class CopyBeforeWrite:
    """One job on one disk of `clusters` clusters. Memory: one bit a cluster (2 MiB a TiB)."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        #: Clusters that are copied; by whom they were, for the statistics.
        self.done = 0
        self.done_by_guest = 0
        self._bits = bytearray(-(-clusters // 8))
        self._copying: list[Copy] = []
        # Everything below is done or being copied.
        self._cursor = 0

    @property
    def complete(self) -> bool:
        return self.done == self.clusters

    def before_write(self, first: int, clusters: int) -> BeforeWrite | None:
        """A guest wants to write to these clusters; None: it may, at once.

        The caller owes `copied` for each of the copies, also when reading the
        old data fails (the job has then failed, and the guest goes on).
        """
        if self.is_copied(first, clusters):
            return None
        waits = [copy for copy in self._copying if copy.overlaps(first, clusters)]
        copies = []
        start: int | None = None
        for num in range(first, first + clusters + 1):
            todo = num < first + clusters and not self._is_taken(num, waits)
            if todo and start is None:
                start = num
            elif not todo and start is not None:
                copies.append(self._begin(start, num - start, by_guest=True))
                start = None
        return BeforeWrite(copies, waits)

    def is_being_copied(self, first: int, clusters: int) -> bool:
        """Whether somebody is copying one of these right now."""
        return any(copy.overlaps(first, clusters) for copy in self._copying)

    def next_background(self, most: int) -> Copy | None:
        """The next run of at most `most` clusters for the background reader; None: none is left.

        None does not mean that all is done: others may still be copying.
        """
        num = self._next_todo(self._cursor)
        if num is None:
            self._cursor = self.clusters
            return None
        end = self._next_done(num, min(self.clusters, num + most))
        end = min([end, *(copy.first for copy in self._copying if copy.first > num)])
        self._cursor = end
        return self._begin(num, end - num, by_guest=False)

    def abandon(self, copy: Copy) -> None:
        """It is not made after all: whoever waits for it has to ask again."""
        self._copying.remove(copy)
        copy.finished = True
        self._cursor = min(self._cursor, copy.first)

    def shorten(self, copy: Copy, clusters: int) -> None:
        """Only the first `clusters` of it will be copied; the others are to do again."""
        if clusters < copy.clusters:
            copy.clusters = clusters
            self._cursor = min(self._cursor, copy.first + clusters)

    def copied(self, copy: Copy) -> None:
        """The old data of these clusters is safe: whoever waits for them may write."""
        self._copying.remove(copy)
        copy.finished = True
        _set_bits(self._bits, copy.first, copy.clusters)
        self.done += copy.clusters
        if copy.by_guest:
            self.done_by_guest += copy.clusters

    def _begin(self, first: int, clusters: int, *, by_guest: bool) -> Copy:
        copy = Copy(first, clusters, by_guest=by_guest)
        self._copying.append(copy)
        return copy

    def is_copied(self, first: int, clusters: int) -> bool:
        """Whether all of these are: a guest may then write to them at once."""
        low, high = first // 8, (first + clusters - 1) // 8
        span = int.from_bytes(self._bits[low : high + 1], "little")
        wanted = ((1 << clusters) - 1) << (first - low * 8)
        return span & wanted == wanted

    def _is_taken(self, num: int, copying: list[Copy]) -> bool:
        """Done, or being copied by one of `copying`."""
        return bool(self._bits[num // 8] >> num % 8 & 1) or any(
            copy.overlaps(num, 1) for copy in copying
        )

    def _next_done(self, num: int, end: int) -> int:
        """The first cluster from `num` on that is done, or `end`."""
        while num < end:
            if num % 8 == 0:
                piece = self._bits[num // 8 : min(num // 8 + _SCAN_BYTES, -(-end // 8))]
                none = len(piece) - len(piece.lstrip(b"\0"))
                if none:
                    num += 8 * none
                    continue
            if self._bits[num // 8] >> num % 8 & 1:
                return num
            num += 1
        return end

    def _next_todo(self, num: int) -> int | None:
        while num < self.clusters:
            if num % 8 == 0:
                # Whole bytes of clusters that are done are passed over at once.
                piece = self._bits[num // 8 : num // 8 + _SCAN_BYTES]
                full = len(piece) - len(piece.lstrip(b"\xff"))
                if full:
                    num += 8 * full
                    continue
            if not self._is_taken(num, self._copying):
                return num
            num += 1
        return None


def _set_bits(bits: bytearray, first: int, count: int) -> None:
    low, high = first // 8, (first + count - 1) // 8
    span = int.from_bytes(bits[low : high + 1], "little")
    span |= ((1 << count) - 1) << (first - low * 8)
    bits[low : high + 1] = span.to_bytes(high + 1 - low, "little")
