# SPDX-License-Identifier: Apache-2.0
"""Sizes that the wire protocol and the archive format share (docs/vma-format.md)."""

BLOCK_BYTES = 4096
CLUSTER_BYTES = 65536
BLOCKS_PER_CLUSTER = 16
#: The mask of a cluster of which every block is stored.
FULL_MASK = 0xFFFF
# A cluster's number has 32 bits in the archive.
MAX_CLUSTERS = 1 << 32
MAX_DEVICE_BYTES = MAX_CLUSTERS * CLUSTER_BYTES

EXTENT_HEADER_BYTES = 512
# 512 = 40 bytes of fixed fields + 59 slots of 8 bytes, one for each cluster.
MAX_EXTENT_CLUSTERS = 59
# The reference writer closes an extent when 58 slots are used. Ours does so too: archives
# of one disk are then the same bytes from both tools. For the wire it is no rule, but
# frames that end where an extent does are written, and acknowledged, as a whole.
EXTENT_CLUSTERS = 58
MAX_EXTENT_DATA_BYTES = MAX_EXTENT_CLUSTERS * CLUSTER_BYTES
MAX_EXTENT_BYTES = EXTENT_HEADER_BYTES + MAX_EXTENT_DATA_BYTES

#: The name of the device that has no fixed size: its clusters come in order until it ends.
VMSTATE_NAME = "vmstate"


def cluster_count(size_bytes: int) -> int:
    """Clusters of a device of `size_bytes` bytes; the last one may be partial."""
    return -(-size_bytes // CLUSTER_BYTES)
