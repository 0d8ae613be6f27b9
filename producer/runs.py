# SPDX-License-Identifier: Apache-2.0
"""Cuts a disk at rest into runs of clusters that fit a frame."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmapipe.clusters.masks import cluster_masks, compact
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_CLUSTERS
from vmapipe.producer.source import Source
from vmapipe.protocol import limits

# Of a frame that has data: where most clusters are zero, a message for each extent
# of the archive would be little data for its cost. Four extents of a disk that is a
# quarter full are one full extent of data.
_MOST_CLUSTERS = 4 * EXTENT_CLUSTERS


class Run(NamedTuple):
    """What becomes one frame: its data is `length` bytes at `position` of the memory."""

    first_cluster: int
    clusters: int
    masks: bytes
    position: int
    length: int

    @property
    def charge(self) -> int:
        return limits.charge(self.clusters, self.length)

    @property
    def zero_clusters(self) -> int:
        if not self.masks:
            return self.clusters
        if self.length == self.clusters * CLUSTER_BYTES:
            return 0
        return struct.unpack(f">{self.clusters}H", self.masks).count(0)


def runs(
    source: Source,
    memory: memoryview,
    take: Callable[[int], int],
    frame_bytes: int,
    step: Callable[[], int] | None = None,
    reading: Callable[[int], None] | None = None,
) -> Iterator[Run]:
    """The whole disk in order, each run's charge at most `frame_bytes`.

    `take(length)` tells where in `memory` a run may be read to; it may be
    used again for the next one unless the run before was kept. `step`, asked just
    before each read, may make that and the run smaller than `frame_bytes` allows;
    `reading(length)` says how long the read will be. Zero clusters, holes or read
    ones, go with the data beside them as far as the archive's extent goes; the rest
    is a run without data.
    """
    cutter = _Cutter(memory, take, frame_bytes, step or (lambda: piece_bytes(frame_bytes)))
    for segment in source.segments():
        if not segment.is_data:
            yield from cutter.zeroes(-(-segment.end // CLUSTER_BYTES))
            continue
        at = segment.start
        while at < segment.end:
            buffer = cutter.room(segment.end - at)
            if reading:
                reading(len(buffer))
            source.read_into(buffer, at)
            yield from cutter.take_in(len(buffer))
            at += len(buffer)
    yield from cutter.finish()


def piece_bytes(frame_bytes: int) -> int:
    """How much is read for one frame, where that may charge `frame_bytes`: half of it.

    So that a window holds several, and one is on its way while the next is read.
    """
    clusters = min(limits.MAX_PAYLOAD_BYTES, frame_bytes // 2) // CLUSTER_BYTES
    return max(1, clusters) * CLUSTER_BYTES


def largest_frame_bytes(allowed: int, bytes_per_s: int) -> int:
    """Return the largest charge of a frame: with a speed limit several a second, so it holds evenly."""
    if bytes_per_s:
        allowed = min(allowed, bytes_per_s // 8)
    return max(limits.MIN_FRAME_CHARGE, allowed)


class _Cutter:
    """Clusters come in order. Behind `_zero_from` they are zero, up to the open run or `_next`."""

    def __init__(
        self,
        memory: memoryview,
        take: Callable[[int], int],
        frame_bytes: int,
        step: Callable[[], int],
    ) -> None:
        self._memory = memory
        self._take = take
        self._step = step
        self._frame_bytes = frame_bytes
        room = frame_bytes - limits.CHARGE_PER_FRAME
        self._longest_zero = min(limits.MAX_RUN_CLUSTERS, room // limits.CHARGE_PER_CLUSTER)
        self._next = self._zero_from = 0
        # The open run: empty masks where there is none.
        self._masks = bytearray()
        self._position = self._filled = self._largest = self._step_bytes = self._most = 0

    def room(self, length: int) -> memoryview:
        """Where at most `length` bytes of the next clusters are to be read to."""
        self._step_bytes = self._step()
        if not self._masks:
            self._largest = self._step_bytes
            spare = self._frame_bytes - limits.CHARGE_PER_FRAME - self._largest
            self._most = min(_MOST_CLUSTERS, spare // limits.CHARGE_PER_CLUSTER)
            self._position = self._take(self._largest)
            self._filled = 0
        clusters = min(
            min(self._step_bytes, self._largest - self._filled) // CLUSTER_BYTES,
            self._most - self._clusters,
            _to_extents_end(self._next),
        )
        at = self._position + self._filled
        return self._memory[at : at + min(length, clusters * CLUSTER_BYTES)]

    def take_in(self, length: int) -> Iterator[Run]:
        """So much was read to where `room` said."""
        run = packed(self._memory, self._position + self._filled, self._next, length)
        if not run.masks:
            yield from self.zeroes(self._next + run.clusters)
            return
        if not self._masks:
            before = min(
                self._next - self._zero_from,
                self._next % EXTENT_CLUSTERS,
                self._most - run.clusters,
            )
            yield from self._zero_runs(self._next - before)
            self._masks += bytes(2 * before)
        self._masks += run.masks
        self._filled += run.length
        self._next += run.clusters
        yield from self._cut_if_full()

    def zeroes(self, stop: int) -> Iterator[Run]:
        """The clusters up to `stop` are zero."""
        while self._masks and self._next < stop:
            count = min(stop - self._next, self._most - self._clusters, _to_extents_end(self._next))
            self._masks += bytes(2 * count)
            self._next += count
            # What is zero as far as the next extent's end needs no masks.
            yield from self._cut_if_full(ahead=stop - self._next)
        self._next = stop

    def finish(self) -> Iterator[Run]:
        yield from self._cut()
        yield from self._zero_runs(self._next)

    @property
    def _clusters(self) -> int:
        return len(self._masks) // 2

    def _cut_if_full(self, ahead: int = 0) -> Iterator[Run]:
        left = self._largest - self._filled
        full = left < CLUSTER_BYTES or self._clusters >= self._most
        # Under a lower speed limit than it was begun with, it would take long to fill.
        full = full or self._filled >= self._step_bytes
        if _to_extents_end(self._next) == EXTENT_CLUSTERS:
            # A frame that ends with an extent is written, and its memory free, at once.
            full = full or left < EXTENT_CLUSTERS // 2 * CLUSTER_BYTES or ahead >= EXTENT_CLUSTERS
        if full:
            yield from self._cut()

    def _cut(self) -> Iterator[Run]:
        if self._masks:
            first = self._next - self._clusters
            yield Run(first, self._clusters, bytes(self._masks), self._position, self._filled)
            self._masks.clear()
            self._zero_from = self._next

    def _zero_runs(self, stop: int) -> Iterator[Run]:
        for first in range(self._zero_from, stop, self._longest_zero):
            yield Run(first, min(self._longest_zero, stop - first), b"", 0, 0)
        self._zero_from = stop


def _to_extents_end(cluster: int) -> int:
    return EXTENT_CLUSTERS - cluster % EXTENT_CLUSTERS


def packed(memory: memoryview, position: int, first_cluster: int, length: int) -> Run:
    """The run of `length` bytes that were read to `position`; its zero blocks are taken out there.

    The memory must have room for whole blocks.
    """
    padded = whole_blocks(length)
    view = memory[position : position + padded]
    view[length:] = bytes(padded - length)
    masks = cluster_masks(view, padded)
    stored = compact(view, masks) if masks else 0
    return Run(first_cluster, -(-length // CLUSTER_BYTES), masks, position, stored)


def whole_blocks(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES
