# SPDX-License-Identifier: Apache-2.0
"""Cuts a disk at rest into runs of clusters that fit a frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from vmapipe.producer.source import Source
from vmapipe.protocol import blocks, limits
from vmapipe.protocol.limits import BLOCK_BYTES, CLUSTER_BYTES


class Run(NamedTuple):
    """What becomes one frame. `buffer`: what `payload` is a view of, to be given back; or None."""

    first_cluster: int
    count: int
    masks: bytes
    payload: bytes | memoryview
    buffer: bytearray | None

    @property
    def charge(self) -> int:
        return limits.charge(self.count, len(self.payload))


class Buffers:
    """Buffers that are used again: a fresh megabyte costs its page faults every time."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free: deque[bytearray] = deque()

    def take(self) -> bytearray:
        return self._free.pop() if self._free else bytearray(self.size_bytes)

    def give_back(self, buffer: bytearray) -> None:
        self._free.append(buffer)


def runs(source: Source, buffers: Buffers, frame_bytes: int) -> Iterator[Run]:
    """The whole disk in order, each run's charge at most `frame_bytes`.

    Neighbouring zero clusters, holes or read ones, become one run without data.
    """
    fitting = (frame_bytes - limits.CHARGE_PER_FRAME) // (
        CLUSTER_BYTES + limits.CHARGE_PER_CLUSTER
    )
    step = min(buffers.size_bytes, fitting * CLUSTER_BYTES)
    longest_zero = min(
        limits.MAX_RUN_CLUSTERS,
        (frame_bytes - limits.CHARGE_PER_FRAME) // limits.CHARGE_PER_CLUSTER,
    )
    zero_from = zero_to = 0
    for segment in source.segments():
        if not segment.is_data:
            zero_to = segment.end
            continue
        for at in range(segment.start, segment.end, step):
            run = _read(source, buffers, at, min(step, segment.end - at))
            end = min(segment.end, at + step)
            if run is not None:
                yield from _zero_runs(zero_from, at, longest_zero)
                yield run
                zero_from = end
            zero_to = end
    yield from _zero_runs(zero_from, zero_to, longest_zero)


def _read(source: Source, buffers: Buffers, at: int, length: int) -> Run | None:
    """One piece of the disk; None when it is all zero."""
    buffer = buffers.take()
    with memoryview(buffer) as view:
        source.read_into(view[:length], at)
    padded = -(-length // BLOCK_BYTES) * BLOCK_BYTES
    if padded > length:
        buffer[length:padded] = bytes(padded - length)
    masks = blocks.cluster_masks(buffer, padded)
    payload = blocks.collect(buffer, masks) if masks else b""
    kept = buffer if isinstance(payload, memoryview) else None
    if kept is None:
        buffers.give_back(buffer)
    if not masks:
        return None
    return Run(at // CLUSTER_BYTES, -(-length // CLUSTER_BYTES), masks, payload, kept)


def _zero_runs(start: int, end: int, longest: int) -> Iterator[Run]:
    """Bytes [start, end), all zero, as runs of at most `longest` clusters."""
    last = -(-end // CLUSTER_BYTES)
    for first in range(start // CLUSTER_BYTES, last, longest):
        yield Run(first, min(longest, last - first), b"", b"", None)
