# SPDX-License-Identifier: Apache-2.0
"""A disk in memory, as a source that a producer reads."""

from __future__ import annotations

from collections.abc import Iterator

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.source import Segment


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
