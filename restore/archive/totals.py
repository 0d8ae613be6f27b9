# SPDX-License-Identifier: Apache-2.0
"""What was found in an archive, counted."""

from __future__ import annotations

from vmapipe.vma.extent import Extent
from vmapipe.vma.layout import CLUSTER_BYTES


class Totals:
    """What the extents so far hold, in bytes; clusters in full, also a device's last one.

    `clusters` of all devices; `zero_cluster_bytes`: of clusters that are all
    zero; `zero_block_bytes`: of zero blocks inside the others; `data_bytes`:
    what is stored. `archive_bytes`: of the plain archive, header included.
    """

    def __init__(self) -> None:
        self.archive_bytes = self.extents = self.clusters = 0
        self.data_bytes = self.zero_cluster_bytes = 0

    @property
    def cluster_bytes(self) -> int:
        return self.clusters * CLUSTER_BYTES

    @property
    def zero_block_bytes(self) -> int:
        return self.cluster_bytes - self.zero_cluster_bytes - self.data_bytes

    def add(self, extent: Extent) -> None:
        self.archive_bytes = extent.offset + extent.total_bytes
        self.extents += 1
        self.data_bytes += extent.data_bytes
        for run in extent.runs:
            self.clusters += run.count
            self.zero_cluster_bytes += run.masks.count(0) * CLUSTER_BYTES
