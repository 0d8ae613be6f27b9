# SPDX-License-Identifier: Apache-2.0
"""What was found in an archive, counted."""

from __future__ import annotations

from dataclasses import dataclass

from vmapipe.vma.extent import Extent
from vmapipe.vma.layout import CLUSTER_BYTES


@dataclass(slots=True)
class Totals:
    """What the extents so far hold, in bytes; clusters in full, also a device's last one.

    `clusters` of all devices; `zero_cluster_bytes`: of clusters that are all
    zero; `zero_block_bytes`: of zero blocks inside the others; `data_bytes`:
    what is stored. `archive_bytes`: of the plain archive, header included.
    """

    archive_bytes: int = 0
    extents: int = 0
    clusters: int = 0
    data_bytes: int = 0
    zero_cluster_bytes: int = 0
    zero_block_bytes: int = 0

    @property
    def cluster_bytes(self) -> int:
        return self.clusters * CLUSTER_BYTES

    def add(self, extent: Extent) -> None:
        self.archive_bytes = extent.offset + extent.total_bytes
        self.extents += 1
        clusters = sum(run.count for run in extent.runs)
        zero_bytes = CLUSTER_BYTES * sum(run.masks.count(0) for run in extent.runs)
        self.clusters += clusters
        self.data_bytes += extent.data_bytes
        self.zero_cluster_bytes += zero_bytes
        self.zero_block_bytes += clusters * CLUSTER_BYTES - zero_bytes - extent.data_bytes
