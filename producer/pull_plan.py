# SPDX-License-Identifier: Apache-2.0
"""What of an export is read, in which pieces and requests, and the runs that come of it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_CLUSTERS
from vmapipe.producer.runs import MOST_CLUSTERS, Run, packed, piece_bytes
from vmapipe.protocol import limits

# Whether there is data in so much is asked at once. A multiple of every minimum block size.
STATUS_BYTES = 1 << 31
_MASK_BYTES = 2


class DataExtent(NamedTuple):
    """Bytes [start, end) of the export, as the server tells of them."""

    start: int
    end: int
    is_data: bool


class Clusters:
    """Clusters from where those before it end, to `end`: data, or zero."""

    __slots__ = ("end", "is_data")

    def __init__(self, end: int, *, is_data: bool) -> None:
        self.end = end
        self.is_data = is_data


class Layout:
    """Where an export has data, as far as it was told, in clusters and not yet planned.

    A cluster that is partly data is data. What was told is looked at no further than is
    needed: an answer may have a million extents.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self.clusters = -(-size_bytes // CLUSTER_BYTES)
        #: What is known and not forgotten, in order and without gaps.
        self.known: deque[Clusters] = deque()
        # The rest of the last answer, and what comes next of it; none: it is used up.
        self._told: Iterator[DataExtent] = iter(())
        self._coming: DataExtent | None = None
        self._is_asked = False
        # All clusters, and all bytes, before these are known.
        self._known_to = self._at = 0

    def question(self) -> tuple[int, int] | None:
        """Offset and length of what to ask the server next; None: nothing yet, or nothing more."""
        if self._coming is not None or self._is_asked or self._at >= self._size_bytes:
            return None
        self._is_asked = True
        return self._at, min(STATUS_BYTES, self._size_bytes - self._at)

    def tell(self, extents: Iterable[DataExtent]) -> None:
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
        self._at = end = min(extent.end, self._size_bytes)
        if extent.is_data:
            self._add(extent.start // CLUSTER_BYTES, is_data=False)
            self._add(-(-end // CLUSTER_BYTES), is_data=True)
        else:
            at_end = end == self._size_bytes
            self._add(self.clusters if at_end else end // CLUSTER_BYTES, is_data=False)
        return True

    def _add(self, stop: int, *, is_data: bool) -> None:
        """All clusters up to `stop` that are not known yet."""
        if stop <= self._known_to:
            return
        last = self.known[-1] if self.known else None
        if last is not None and last.is_data == is_data:
            last.end = stop
        else:
            self.known.append(Clusters(stop, is_data=is_data))
        self._known_to = stop


class Request(NamedTuple):
    """Read `length` bytes at `offset` of the export, to `position` of the memory."""

    offset: int
    length: int
    position: int


class PullPiece:
    """Consecutive clusters that become one run; their data is to lie at `position`, without the holes."""

    def __init__(self, first: int, parts: list[tuple[int, bool]], size_bytes: int) -> None:
        """`parts`: numbers of clusters, and whether they are data."""
        self.first = first
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
    piece without data. Pieces end where an extent of the archive does, as those of a
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
        parts = self._zeroes() or self._data(piece_bytes(frame_bytes) // CLUSTER_BYTES)
        piece = PullPiece(self._next, parts, self._size_bytes)
        self._next += piece.clusters
        return piece

    def _zeroes(self) -> list[tuple[int, bool]]:
        """A hole, but for what can go with the data behind it; empty: none is long enough."""
        hole = self.layout.known[0]
        if hole.is_data:
            return []
        stop = (
            hole.end if hole.end == self.layout.clusters else hole.end - hole.end % EXTENT_CLUSTERS
        )
        count = min(stop - self._next, self._longest_zero)
        return [(count, False)] if count > 0 else []

    def _data(self, most_data: int) -> list[tuple[int, bool]]:
        spare = self._frame_bytes - limits.CHARGE_PER_FRAME - most_data * CLUSTER_BYTES
        most = min(MOST_CLUSTERS, spare // limits.CHARGE_PER_CLUSTER)
        parts: list[tuple[int, bool]] = []
        at, left, data_left = self._next, most, most_data
        for known in self.layout.known:
            # What is zero as far as the next extent's end needs no masks.
            if parts and self._is_left_out(at, known):
                return parts
            while at < known.end:
                room = min(known.end - at, left, EXTENT_CLUSTERS - at % EXTENT_CLUSTERS)
                if known.is_data:
                    room = min(room, data_left)
                    data_left -= room
                parts.append((room, known.is_data))
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
        return whole_extent and not known.is_data
