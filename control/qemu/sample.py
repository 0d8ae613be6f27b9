# SPDX-License-Identifier: Apache-2.0
"""A sample of a disk's clusters, given to QEMU as an image that has a dirty bitmap and nothing else.

QEMU has no command that sets bits of a bitmap. But it merges bitmaps of other nodes, and reads
them from qcow2 images (docs/interop/qcow2.txt in its sources: "Bitmaps extension"). The image is
sparse: its header, tables and bitmap are a few pages, and 2 MiB more a TiB of disk. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vmapipe.clusters.sizes import cluster_count

#: The name of the bitmap in the image.
BITMAP = "sample"

# The largest clusters that qcow2 has: tables of a few entries for any disk.
_CLUSTER_BITS = 21
_CLUSTER = 1 << _CLUSTER_BITS
# What one table of the second level maps.
_L2_REACH = _CLUSTER * (_CLUSTER // 8)
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">IIIIQQ")
_BITMAPS_EXTENSION = 0x23852875
_ENTRY = struct.Struct(">QIIBBHI")
_GRANULARITY_BITS = 16
# The header's fixed version 3 length; autoclear bit 0: bitmaps are as the image is.
_VERSION, _HEADER_BYTES, _BITMAPS_ARE_VALID = 3, 104, 1
_REFCOUNT_ORDER = 4
_DIRTY_TRACKING = 1
# The places of what there is, in clusters of the image; the bitmap's bits come last.
_REFCOUNT_TABLE, _REFCOUNT_BLOCK, _L1, _DIRECTORY, _BITMAP_TABLE, _BITS = 1, 2, 3, 4, 5, 6


def sample_image(size_bytes: int, clusters: Iterable[int]) -> list[tuple[int, bytes]]:
    """Return the image for a disk of this size as pieces: offset and bytes; elsewhere it is holes.

    The bitmap has these clusters of the disk.
    """
    bits = bytearray(-(-cluster_count(size_bytes) // 8))
    for cluster in clusters:
        bits[cluster // 8] |= 1 << cluster % 8
    tables = -(-len(bits) // _CLUSTER)
    name = BITMAP.encode()
    entry = _ENTRY.pack(
        *(_BITMAP_TABLE * _CLUSTER, tables, 0, _DIRTY_TRACKING, _GRANULARITY_BITS, len(name), 0)
    )
    directory = entry + name
    directory += bytes(-len(directory) % 8)
    virtual_bytes = -(-size_bytes // 512) * 512
    header = _HEADER.pack(
        *(b"QFI\xfb", _VERSION, 0, 0, _CLUSTER_BITS, virtual_bytes, 0),
        *(max(1, -(-virtual_bytes // _L2_REACH)), _L1 * _CLUSTER),
        *(_REFCOUNT_TABLE * _CLUSTER, 1, 0, 0),
        *(0, 0, _BITMAPS_ARE_VALID, _REFCOUNT_ORDER, _HEADER_BYTES),
    )
    extension = _EXTENSION.pack(
        *(_BITMAPS_EXTENSION, 24, 1, 0, len(directory), _DIRECTORY * _CLUSTER)
    )
    end = struct.pack(">II", 0, 0)
    used = _BITS + tables
    return [
        (0, header + extension + end),
        (_REFCOUNT_TABLE * _CLUSTER, struct.pack(">Q", _REFCOUNT_BLOCK * _CLUSTER)),
        (_REFCOUNT_BLOCK * _CLUSTER, struct.pack(f">{used}H", *[1] * used)),
        (_DIRECTORY * _CLUSTER, directory),
        (
            _BITMAP_TABLE * _CLUSTER,
            struct.pack(f">{tables}Q", *((_BITS + n) * _CLUSTER for n in range(tables))),
        ),
        (_BITS * _CLUSTER, bytes(bits)),
        # The last cluster has its whole length.
        (used * _CLUSTER - 1, b"\0"),
    ]
