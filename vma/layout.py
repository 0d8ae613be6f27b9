# SPDX-License-Identifier: Apache-2.0
"""Sizes and positions of the VMA format, version 1 (docs/vma-format.md).

Everything is big endian except the 16-bit length in front of each blob, which
is little endian: that is what the reference tool writes and reads.
"""

BLOCK_BYTES = 4096
CLUSTER_BYTES = 65536
BLOCKS_PER_CLUSTER = 16
FULL_MASK = 0xFFFF

VMA_MAGIC = b"VMA\0"
VMA_VERSION = 1
UUID_BYTES = 16
# The time of the backup is a signed 64-bit field.
MAX_CTIME_S = (1 << 63) - 1
HEADER_BYTES = 12288
# The reference tool refuses larger headers, blob table included.
MAX_HEADER_BYTES = 8 * 65536
# A blob's length is a 16-bit field.
MAX_BLOB_BYTES = 65535
MAX_CONFIGS = 256
# dev_id 0 marks an unused slot, 255 is reserved.
MAX_DEVICES = 254
# cluster_num is a 32-bit field.
MAX_CLUSTERS = 1 << 32
MAX_DEVICE_BYTES = MAX_CLUSTERS * CLUSTER_BYTES

EXTENT_MAGIC = b"VMAE"
EXTENT_HEADER_BYTES = 512
# 512 = 40 bytes of fixed fields + 59 slots of 8 bytes.
MAX_SLOTS = 59
# The reference writer closes an extent when 58 slots are used. Ours does so
# too: archives of one disk are then the same bytes from both tools.
WRITER_SLOTS = 58
MAX_EXTENT_DATA_BYTES = MAX_SLOTS * CLUSTER_BYTES
MAX_EXTENT_BYTES = EXTENT_HEADER_BYTES + MAX_EXTENT_DATA_BYTES

# The device of this name is sequential and its size is not known in advance.
VMSTATE_NAME = "vmstate"
# A target may be larger than its device by this much, as in the reference
# tool: storages round sizes up.
TARGET_SLACK_BYTES = 4 * 1024 * 1024


def cluster_count(size_bytes: int) -> int:
    """Clusters of a device of `size_bytes` bytes; the last one may be partial."""
    return -(-size_bytes // CLUSTER_BYTES)
