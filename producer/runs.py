# SPDX-License-Identifier: Apache-2.0
"""Cuts a disk at rest into runs of clusters that fit a frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmapipe.producer.source import Source
from vmapipe.protocol import blocks, limits
from vmapipe.protocol.limits import BLOCK_BYTES, CLUSTER_BYTES


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


def runs(
    source: Source,
    memory: memoryview,
    take: Callable[[int], int],
    frame_bytes: int,
    step: Callable[[], int] | None = None,
) -> Iterator[Run]:
    """The whole disk in order, each run's charge at most `frame_bytes`.

    `take(length)` tells where in `memory` a piece may be read to; it may be
    used again for the next one unless the run before was kept. `step`, asked just
    before, may make pieces smaller than `frame_bytes` allows. Neighbouring
    zero clusters, holes or read ones, become one run without data.
    """
    largest = piece_bytes(frame_bytes)
    room = frame_bytes - limits.CHARGE_PER_FRAME
    longest_zero = min(limits.MAX_RUN_CLUSTERS, room // limits.CHARGE_PER_CLUSTER)
    zero_from = zero_to = 0
    for segment in source.segments():
        if not segment.is_data:
            zero_to = segment.end
            continue
        at = segment.start
        while at < segment.end:
            length = min(step() if step else largest, segment.end - at)
            run = _read(source, memory, take(whole_blocks(length)), at, length)
            if run is not None:
                yield from _zero_runs(zero_from, at, longest_zero)
                yield run
                zero_from = at + length
            at += length
            zero_to = at
    yield from _zero_runs(zero_from, zero_to, longest_zero)


def piece_bytes(frame_bytes: int) -> int:
    """How much is read at once, where a frame may charge `frame_bytes`: half of that.

    So that a window holds several, and one is on its way while the next is read.
    """
    clusters = min(limits.MAX_PAYLOAD_BYTES, frame_bytes // 2) // CLUSTER_BYTES
    return max(1, clusters) * CLUSTER_BYTES


def _read(source: Source, memory: memoryview, position: int, at: int, length: int) -> Run | None:
    """One piece of the disk; None when it is all zero."""
    source.read_into(memory[position : position + length], at)
    run = packed(memory, position, at // CLUSTER_BYTES, length)
    return run if run.masks else None


def packed(memory: memoryview, position: int, first_cluster: int, length: int) -> Run:
    """The run of `length` bytes that were read to `position`; its zero blocks are taken out there.

    The memory must have room for whole blocks.
    """
    padded = whole_blocks(length)
    view = memory[position : position + padded]
    view[length:] = bytes(padded - length)
    masks = blocks.cluster_masks(view, padded)
    stored = blocks.compact(view, masks) if masks else 0
    return Run(first_cluster, -(-length // CLUSTER_BYTES), masks, position, stored)


def whole_blocks(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def _zero_runs(start: int, end: int, longest: int) -> Iterator[Run]:
    """Bytes [start, end), all zero, as runs of at most `longest` clusters."""
    # The end may lie inside the last cluster; then so does a start that equals it.
    last = -(-end // CLUSTER_BYTES)
    for first in range(-(-start // CLUSTER_BYTES), last, longest):
        yield Run(first, min(longest, last - first), b"", 0, 0)
