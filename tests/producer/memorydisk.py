# SPDX-License-Identifier: Apache-2.0
"""A disk in memory, as a source that a producer reads; and a disk cut into runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.disk_feed import RunCutter
from vmapipe.producer.runs import Run, piece_bytes
from vmapipe.producer.source import Segment, Source


class MemoryDisk:
    """A disk in memory; `holes` are clusters it knows to be zero without being read."""

    def __init__(self, data: bytes, holes: frozenset[int] = frozenset()) -> None:
        self.name = "disk"
        self.data = data
        self.size_bytes = len(data)
        self.holes = holes
        self.read: set[int] = set()

    def segments(self) -> Iterator[Segment]:
        for at in range(0, self.size_bytes, CLUSTER_BYTES):
            end = min(self.size_bytes, at + CLUSTER_BYTES)
            yield Segment(at, end, is_data=at // CLUSTER_BYTES not in self.holes)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.read |= set(
            range(offset // CLUSTER_BYTES, -(-(offset + len(buffer)) // CLUSTER_BYTES))
        )
        buffer[:] = self.data[offset : offset + len(buffer)]

    def check_unchanged(self) -> None: ...

    def close(self) -> None: ...


def cut(
    source: Source, memory: memoryview, frame_bytes: int, step: Callable[[], int] | None = None
) -> Iterator[Run]:
    """The runs of a disk, each with its data at the beginning of `memory` until the next."""
    cutter = RunCutter(source, memory, frame_bytes)
    while not cutter.ended:
        if cutter.at_hole:
            yield from cutter.pass_hole()
        else:
            yield from cutter.read(step() if step else piece_bytes(frame_bytes), 0)
