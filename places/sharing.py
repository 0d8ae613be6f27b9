# SPDX-License-Identifier: Apache-2.0
"""How much of a file lies on blocks that other files have, too: Linux's FIEMAP (XFS, btrfs)."""

from __future__ import annotations

import array
import fcntl
import struct

# linux/fs.h and linux/fiemap.h: _IOWR('f', 11, struct fiemap)
_FS_IOC_FIEMAP = 0xC020660B
# fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count, fm_reserved
_HEAD = struct.Struct("=QQIIII")
# fe_logical, fe_physical, fe_length, 2 x reserved, fe_flags, 3 x reserved
_EXTENT = struct.Struct("=QQQQQI3I")
_LAST, _SHARED = 0x1, 0x2000
_EXTENTS = 256
_MOST_CALLS = 4096


def shared_bytes(fd: int) -> int | None:
    """Of the file `fd`, in bytes; None where the file system does not tell."""
    start = shared = 0
    for _ in range(_MOST_CALLS):
        buffer = array.array("B", bytes(_HEAD.size + _EXTENTS * _EXTENT.size))
        _HEAD.pack_into(buffer, 0, start, (1 << 64) - 1 - start, 0, 0, _EXTENTS, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
        except OSError:
            return None
        mapped = _HEAD.unpack_from(buffer)[3]
        if not mapped:
            return shared
        for index in range(mapped):
            fields = _EXTENT.unpack_from(buffer, _HEAD.size + index * _EXTENT.size)
            logical, length, flags = fields[0], fields[2], fields[5]
            shared += length if flags & _SHARED else 0
            if flags & _LAST:
                return shared
            start = logical + length
    return shared
