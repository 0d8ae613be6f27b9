# SPDX-License-Identifier: Apache-2.0
"""Sizes and positions of the VMA format, version 1 (docs/vma-format.md).

What the wire has, too (clusters, blocks, extents), is in `vmapipe.clusters.sizes`.
Everything is big endian except the 16-bit length in front of each blob, which
is little endian: that is what the reference tool writes and reads.
"""

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

EXTENT_MAGIC = b"VMAE"

# A target may be larger than its device by this much, as in the reference
# tool: storages round sizes up.
TARGET_SLACK_BYTES = 4 * 1024 * 1024
