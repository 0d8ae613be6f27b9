# SPDX-License-Identifier: Apache-2.0
"""Runs of clusters, each of which becomes a frame, and the sizes of what is read for one."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmapipe.clusters.masks import cluster_masks, compact
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_CLUSTERS
from vmapipe.protocol import limits

# Clusters of a frame that has data. Frames that end where an extent of the archive does are
# written, and acknowledged, as a whole; that is no rule of the wire. But where most clusters
# are zero, a message for each extent of the archive would be little data for its cost. Four
# extents of a disk that is a quarter full are one full extent of data.
MOST_CLUSTERS = 4 * EXTENT_CLUSTERS


class Run(NamedTuple):
    """Consecutive clusters that become one frame: `length` bytes of data at `position` of the memory."""

    first_cluster: int
    clusters: int
    masks: bytes
    position: int
    length: int

    @property
    def zero_clusters(self) -> int:
        if not self.masks:
            return self.clusters
        if self.length == self.clusters * CLUSTER_BYTES:
            return 0
        return struct.unpack(f">{self.clusters}H", self.masks).count(0)


def piece_bytes(frame_bytes: int) -> int:
    """Return how much is read for one frame that may charge `frame_bytes`: half of it.

    So that a window holds several, and one is on its way while the next is read.
    """
    clusters = min(limits.MAX_PAYLOAD_BYTES, frame_bytes // 2) // CLUSTER_BYTES
    return max(1, clusters) * CLUSTER_BYTES


def largest_frame_bytes(allowed: int, bytes_per_s: int) -> int:
    """Return the largest charge of a frame: with a speed limit several a second, so it holds evenly."""
    if bytes_per_s:
        allowed = min(allowed, bytes_per_s // 8)
    return max(limits.MIN_FRAME_CHARGE, allowed)


def packed(memory: memoryview, position: int, first_cluster: int, length: int) -> Run:
    """Return the run of the `length` bytes at `position`; its zero blocks are taken out there.

    The memory must have room for whole blocks.
    """
    padded = length
    if length % BLOCK_BYTES:  # where the disk ends
        padded = whole_blocks(length)
        memory[position + length : position + padded] = bytes(padded - length)
    view = memory[position : position + padded]
    masks = cluster_masks(view, padded)
    stored = compact(view, masks) if masks else 0
    return Run(first_cluster, -(-length // CLUSTER_BYTES), masks, position, stored)


def whole_blocks(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES
