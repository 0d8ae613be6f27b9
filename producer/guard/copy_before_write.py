# SPDX-License-Identifier: Apache-2.0
"""Copy-before-write, the book-keeping: which clusters are copied, and which copy waits for which. Pure.

Pure: no lock, thread or I/O. Whoever serves a disk holds a lock around every
call, copies what it is told to copy, and lets its writes wait for the copies
that it is told to wait for.

The state of a cluster is todo, copying or done; it only moves in this order,
so each is copied exactly once, by a guest's write or by the background reader,
whoever comes first.
"""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.clusters.cluster_set import ClusterSet


class Copy:
    """A run of clusters that is being copied right now."""

    __slots__ = ("clusters", "finished", "first")

    def __init__(self, first: int, clusters: int) -> None:
        self.first = first
        self.clusters = clusters
        self.finished = False

    def overlaps(self, first: int, clusters: int) -> bool:
        return self.first < first + clusters and first < self.first + self.clusters


class BeforeWrite(NamedTuple):
    """The steps before a write: make these copies, and wait until those are made."""

    copies: list[Copy]
    waits: list[Copy]


class CopyBeforeWrite:
    """One job on one disk of `clusters` clusters. Memory: at most one bit a cluster (2 MiB a TiB)."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self._done = ClusterSet(clusters)
        self._copying: list[Copy] = []
        # Everything below is done or being copied.
        self._cursor = 0

    @property
    def done(self) -> int:
        """The number of copied clusters."""
        return self._done.count

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
                copies.append(self._begin(start, num - start))
                start = None
        return BeforeWrite(copies, waits)

    def is_being_copied(self, first: int, clusters: int) -> bool:
        """Return whether one of these clusters is being copied right now."""
        return any(copy.overlaps(first, clusters) for copy in self._copying)

    def next_background(self, most: int) -> Copy | None:
        """The next run of at most `most` clusters for the background reader; None: none is left.

        None does not mean that all is done: others may still be copying.
        """
        num = self._next_todo(self._cursor)
        if num is None:
            self._cursor = self.clusters
            return None
        end = self._done.next_present(num, min(self.clusters, num + most))
        end = min([end, *(copy.first for copy in self._copying if copy.first > num)])
        self._cursor = end
        return self._begin(num, end - num)

    def abandon(self, copy: Copy) -> None:
        """Give a copy up: a write that waits for it has to ask again."""
        self._copying.remove(copy)
        copy.finished = True
        self._cursor = min(self._cursor, copy.first)

    def shorten(self, copy: Copy, clusters: int) -> None:
        """Only the first `clusters` of it will be copied; the others are to do again."""
        if clusters < copy.clusters:
            copy.clusters = clusters
            self._cursor = min(self._cursor, copy.first + clusters)

    def copied(self, copy: Copy) -> None:
        """Finish a copy: the old data is safe, and writes that wait for it may go on."""
        self._copying.remove(copy)
        copy.finished = True
        self._done.add(copy.first, copy.clusters)

    def _begin(self, first: int, clusters: int) -> Copy:
        copy = Copy(first, clusters)
        self._copying.append(copy)
        return copy

    def is_copied(self, first: int, clusters: int) -> bool:
        """Return whether all of these are copied: a guest may then write to them at once."""
        return self._done.has_all(first, clusters)

    def _is_taken(self, num: int, copying: list[Copy]) -> bool:
        """Return whether it is copied, or being copied by one of `copying`."""
        return self._done.has(num) or any(copy.overlaps(num, 1) for copy in copying)

    def _next_todo(self, num: int) -> int | None:
        while (num := self._done.next_missing(num, self.clusters)) < self.clusters:
            if not self._is_taken(num, self._copying):
                return num
            num += 1
        return None
