# SPDX-License-Identifier: Apache-2.0
"""What of an export is read, in which pieces and requests, and the runs that come of it. Pure."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_CLUSTERS
from vmapipe.producer.runs import MOST_CLUSTERS, Run, packed, piece_bytes
from vmapipe.protocol import limits
from vmapipe.protocol.nbd.constants import NBD_STATE_ZERO, STATE_DIRTY

# Whether there is data in so much is asked at once. A multiple of every minimum block size.
STATUS_BYTES = 1 << 31
_MASK_BYTES = 2


class Content(enum.Enum):
    """What is known of some bytes before they are read."""

    DATA = enum.auto()
    #: They read as zeroes.
    ZERO = enum.auto()
    #: They are what the base of this backup has there; nobody may read them.
    UNCHANGED = enum.auto()


class ExportExtent(NamedTuple):
    """Bytes [start, end) of the export, as the server tells of them."""

    start: int
    end: int
    content: Content


def extents_told(
    at: int,
    allocation: Iterable[tuple[int, int]] | None,
    dirty: Iterable[tuple[int, int]] | None,
) -> Iterator[ExportExtent]:
    """Yield what an answer tells from offset `at` on: as far as both contexts reach.

    `allocation`, `dirty`: lengths in bytes and flags, of base:allocation and of a dirty bitmap;
    None: nothing is known of that: all may be data, all may have changed.
    """
    # Without the other one, each alone: there is nothing to put together.
    if dirty is None:
        for length, flags in allocation or ():
            content = Content.ZERO if flags & NBD_STATE_ZERO else Content.DATA
            yield ExportExtent(at, at + length, content)
            at += length
        return
    rest = iter(allocation) if allocation is not None else None
    length = flags = 0
    for dirty_length, dirty_flags in dirty:
        end = at + dirty_length
        while at < end:
            if rest is None:
                length = end - at
            elif not length:
                length, flags = next(rest, (0, 0))
                if not length:
                    return
            taken = min(length, end - at)
            if not dirty_flags & STATE_DIRTY:
                content = Content.UNCHANGED
            else:
                content = Content.ZERO if flags & NBD_STATE_ZERO else Content.DATA
            yield ExportExtent(at, at + taken, content)
            at, length = at + taken, length - taken


class Clusters:
    """Clusters from where those before it end, to `end`, all with the same content."""

    __slots__ = ("content", "end")

    def __init__(self, end: int, content: Content) -> None:
        self.end = end
        self.content = content


class Layout:
    """What an export has where, as far as it was told, in clusters and not yet planned.

    A cluster whose bytes are not all the same is data: it is read whole. What was told is looked
    at no further than is needed: an answer may have a million extents.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self.clusters = -(-size_bytes // CLUSTER_BYTES)
        #: What is known and not forgotten, in order and without gaps.
        self.known: deque[Clusters] = deque()
        # The rest of the last answer, and what comes next of it; none: it is used up.
        self._told: Iterator[ExportExtent] = iter(())
        self._coming: ExportExtent | None = None
        self._is_asked = False
        # All clusters, and all bytes, before these are known; between them lies part of a cluster.
        self._known_to = self._at = 0
        self._part = Content.DATA

    def question(self) -> tuple[int, int] | None:
        """Offset and length of what to ask the server next; None: nothing yet, or nothing more."""
        if self._coming is not None or self._is_asked or self._at >= self._size_bytes:
            return None
        self._is_asked = True
        return self._at, min(STATUS_BYTES, self._size_bytes - self._at)

    def tell(self, extents: Iterable[ExportExtent]) -> None:
        """Take the answer: extents in order and without gaps, from the question's offset on."""
        self._is_asked = False
        self._told = iter(extents)
        self._coming = next(self._told, None)

    def knows(self, cluster: int) -> bool:
        """Whether all clusters before this one, or all of the export's, are known."""
        stop = min(cluster, self.clusters)
        while self._known_to < stop and self._draw():
            pass
        return self._known_to >= stop

    def forget(self, cluster: int) -> None:
        """Nobody asks for what lies before this cluster any more."""
        while self.known and self.known[0].end <= cluster:
            self.known.popleft()

    def _draw(self) -> bool:
        """Take in the next extent; False: none is there."""
        extent = self._coming
        if extent is None:
            return False
        self._coming = next(self._told, None)
        content, started = extent.content, self._at % CLUSTER_BYTES
        self._at = end = min(extent.end, self._size_bytes)
        stop = self.clusters if end == self._size_bytes else end // CLUSTER_BYTES
        if started:
            if self._part is not content:
                self._part = Content.DATA
            if stop > self._known_to:
                self._add(self._known_to + 1, self._part)
        self._add(stop, content)
        if not started or end // CLUSTER_BYTES * CLUSTER_BYTES > extent.start:
            self._part = content
        return True

    def _add(self, stop: int, content: Content) -> None:
        """All clusters up to `stop` that are not known yet."""
        if stop <= self._known_to:
            return
        last = self.known[-1] if self.known else None
        if last is not None and last.content is content:
            last.end = stop
        else:
            self.known.append(Clusters(stop, content))
        self._known_to = stop


class Request(NamedTuple):
    """Read `length` bytes at `offset` of the export, to `position` of the memory."""

    offset: int
    length: int
    position: int


class PullPiece:
    """Consecutive clusters that become one run; their data is to lie at `position`, without the holes."""

    def __init__(
        self,
        first: int,
        parts: list[tuple[int, bool]],
        size_bytes: int,
        *,
        is_unchanged: bool = False,
    ) -> None:
        """`parts`: numbers of clusters, and whether they are data. `is_unchanged`: they are the base's."""
        self.first = first
        self.is_unchanged = is_unchanged
        self.clusters = sum(count for count, _ in parts)
        self._parts = parts
        end = (first + self.clusters) * CLUSTER_BYTES
        beyond = max(0, end - size_bytes) if parts[-1][1] else 0
        self.data_bytes = sum(n for n, is_data in parts if is_data) * CLUSTER_BYTES - beyond
        self.position = 0
        self._missing_bytes = self.data_bytes

    def requests(self, longest_bytes: int) -> Iterator[Request]:
        """Yield what is to be read for it, once `position` is settled."""
        at, position, left = self.first * CLUSTER_BYTES, self.position, self.data_bytes
        for count, is_data in self._parts:
            end = at + count * CLUSTER_BYTES
            while is_data and at < end and left:
                length = min(longest_bytes, end - at, left)
                yield Request(at, length, position)
                at, position, left = at + length, position + length, left - length
            at = end

    def came(self, length: int) -> None:
        """So many more of its bytes are there."""
        self._missing_bytes -= length

    @property
    def is_complete(self) -> bool:
        return not self._missing_bytes

    def run(self, memory: memoryview) -> Run:
        """Return its run; the zero blocks are taken out where it lies."""
        if not self.data_bytes:
            return Run(self.first, self.clusters, b"", 0, 0)
        data = packed(memory, self.position, self.first, self.data_bytes)
        if not data.masks:
            return Run(self.first, self.clusters, b"", 0, 0)
        masks, at = [], 0
        for count, is_data in self._parts:
            size = count * _MASK_BYTES
            masks.append(data.masks[at : at + size] if is_data else bytes(size))
            at += size if is_data else 0
        return Run(self.first, self.clusters, b"".join(masks), self.position, data.length)


class PullPlan:
    """Cuts an export into pieces, in order, each with a charge of at most `frame_bytes`.

    Holes go with the data beside them as far as the archive's extent goes; the rest is a
    piece without data, and so is what is unchanged. Pieces end where an extent of the archive does, as those of a
    disk at rest (`RunCutter`), which knows what it has read before it cuts; this does not.
    """

    def __init__(self, size_bytes: int, frame_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._frame_bytes = frame_bytes
        spare = frame_bytes - limits.CHARGE_PER_FRAME
        self._longest_zero = min(limits.MAX_RUN_CLUSTERS, spare // limits.CHARGE_PER_CLUSTER)
        self.layout = Layout(size_bytes)
        self._next = 0

    @property
    def ended(self) -> bool:
        """Whether all of the export is planned."""
        return self._next >= self.layout.clusters

    def next_piece(self, frame_bytes: int) -> PullPiece | None:
        """Return the next piece, with at most the data of a frame of `frame_bytes`.

        None: all is planned, or the layout has to be told more.
        """
        if self.ended or not self.layout.knows(self._next + MOST_CLUSTERS + EXTENT_CLUSTERS):
            return None
        self.layout.forget(self._next)
        if self._may_grow():
            return None
        parts = self._without_data() or self._data(piece_bytes(frame_bytes) // CLUSTER_BYTES)
        is_unchanged = self.layout.known[0].content is Content.UNCHANGED
        piece = PullPiece(self._next, parts, self._size_bytes, is_unchanged=is_unchanged)
        self._next += piece.clusters
        return piece

    def _may_grow(self) -> bool:
        """Whether what is known is one run without data, and the next answer may make it longer.

        Else an empty disk would be a message for each answer, thirty times as many.
        """
        first = self.layout.known[0]
        while first.content is not Content.DATA and len(self.layout.known) == 1:
            if first.end - self._next >= self._longest_zero or first.end == self.layout.clusters:
                return False
            if not self.layout.knows(first.end + 1):
                return True
        return False

    def _without_data(self) -> list[tuple[int, bool]]:
        """What is unchanged; or a hole, but for what can go with the data behind it.

        Empty: there is neither, or the hole is not long enough.
        """
        first = self.layout.known[0]
        if first.content is Content.DATA:
            return []
        stop = first.end
        if first.content is Content.UNCHANGED:
            # A message for it says no more than the number, whatever that is.
            return [(stop - self._next, False)]
        if self._is_followed_by_data(first):
            stop -= stop % EXTENT_CLUSTERS
        count = min(stop - self._next, self._longest_zero)
        return [(count, False)] if count > 0 else []

    def _is_followed_by_data(self, hole: Clusters) -> bool:
        """Or nobody knows yet."""
        known = self.layout.known
        if len(known) > 1:
            return known[1].content is Content.DATA
        return hole.end < self.layout.clusters

    def _data(self, most_data: int) -> list[tuple[int, bool]]:
        spare = self._frame_bytes - limits.CHARGE_PER_FRAME - most_data * CLUSTER_BYTES
        most = min(MOST_CLUSTERS, spare // limits.CHARGE_PER_CLUSTER)
        parts: list[tuple[int, bool]] = []
        at, left, data_left = self._next, most, most_data
        for known in self.layout.known:
            if known.content is Content.UNCHANGED:
                return parts
            is_data = known.content is Content.DATA
            # What is zero as far as the next extent's end needs no masks.
            if parts and self._is_left_out(at, known):
                return parts
            while at < known.end:
                room = min(known.end - at, left, EXTENT_CLUSTERS - at % EXTENT_CLUSTERS)
                if is_data:
                    room = min(room, data_left)
                    data_left -= room
                parts.append((room, is_data))
                at, left = at + room, left - room
                if not left or not data_left:
                    return parts
                is_full = not at % EXTENT_CLUSTERS and data_left < EXTENT_CLUSTERS // 2
                if is_full or self._is_left_out(at, known):
                    return parts
        return parts

    @staticmethod
    def _is_left_out(at: int, known: Clusters) -> bool:
        whole_extent = not at % EXTENT_CLUSTERS and known.end - at >= EXTENT_CLUSTERS
        return whole_extent and known.content is Content.ZERO
