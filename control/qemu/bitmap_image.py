# SPDX-License-Identifier: Apache-2.0
"""Images that have a dirty bitmap and nothing else: clusters given to QEMU, and asked of it.

QEMU has no command that sets bits of a bitmap, nor one that lists them. But it merges bitmaps of
other nodes, and keeps them in qcow2 images (docs/interop/qcow2.txt in its sources: "Bitmaps
extension"). The image is sparse: its header, tables and bitmap are a few pages, and 2 MiB more a TiB
of disk. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from vmapipe.clusters.sizes import cluster_count

#: The name of the bitmap in the image.
BITMAP = "clusters"

# QEMU writes whole clusters: small ones, of which there are few for any disk.
_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
# What one table of the second level maps.
_L2_REACH = _CLUSTER * (_CLUSTER // 8)
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">IIIIQQ")
_BITMAPS_EXTENSION = 0x23852875
_ENTRY = struct.Struct(">QIIBBHI")
_GRANULARITY_BITS = 16
_MAGIC = b"QFI\xfb"
# The header's fixed version 3 length; autoclear bit 0: bitmaps are as the image is.
_VERSION, _HEADER_BYTES, _BITMAPS_ARE_VALID = 3, 104, 1
_REFCOUNT_ORDER = 4
_DIRTY_TRACKING = 1
_IN_USE = 1
# The places of what there is, in clusters of the image; then the first level's table, the bitmap's
# table and its bits.
_REFCOUNT_TABLE, _REFCOUNT_BLOCK, _DIRECTORY, _L1 = 1, 2, 3, 4


def bits_of(size_bytes: int, runs: Iterable[tuple[int, int]]) -> bytearray:
    """Return a bitmap of these runs (first cluster, count) of a disk: a bit a cluster, the lowest first."""
    bits = bytearray(-(-cluster_count(size_bytes) // 8))
    for first, count in runs:
        end = first + count
        low, high = -(-first // 8), end // 8
        if low < high:
            bits[low:high] = b"\xff" * (high - low)
            single = (*range(first, 8 * low), *range(8 * high, end))
        else:
            single = tuple(range(first, end))
        for cluster in single:
            bits[cluster // 8] |= 1 << cluster % 8
    return bits


def bitmap_image(size_bytes: int, bits: bytes | bytearray) -> list[tuple[int, bytes]]:
    """Return the image for a disk of this size as pieces: offset and bytes; elsewhere it is holes.

    The bitmap has the clusters of `bits`, as `bits_of` makes them.
    """
    virtual_bytes = -(-size_bytes // 512) * 512
    l1_entries = max(1, -(-virtual_bytes // _L2_REACH))
    tables = -(-len(bits) // _CLUSTER)
    bitmap_table = _L1 + _clusters(8 * l1_entries)
    first = bitmap_table + _clusters(8 * tables)
    used = first + tables
    name = BITMAP.encode()
    directory = name.join(
        (
            _ENTRY.pack(
                *(bitmap_table * _CLUSTER, tables, 0),
                *(_DIRTY_TRACKING, _GRANULARITY_BITS, len(name), 0),
            ),
            bytes(-(_ENTRY.size + len(name)) % 8),
        )
    )
    header = _HEADER.pack(
        *(_MAGIC, _VERSION, 0, 0, _CLUSTER_BITS, virtual_bytes, 0),
        *(l1_entries, _L1 * _CLUSTER, _REFCOUNT_TABLE * _CLUSTER, 1, 0, 0),
        *(0, 0, _BITMAPS_ARE_VALID, _REFCOUNT_ORDER, _HEADER_BYTES),
    )
    extension = _EXTENSION.pack(
        *(_BITMAPS_EXTENSION, 24, 1, 0, len(directory), _DIRECTORY * _CLUSTER)
    )
    end = struct.pack(">II", 0, 0)
    offsets = ((first + number) * _CLUSTER for number in range(tables))
    return [
        (0, header + extension + end),
        (_REFCOUNT_TABLE * _CLUSTER, struct.pack(">Q", _REFCOUNT_BLOCK * _CLUSTER)),
        (_REFCOUNT_BLOCK * _CLUSTER, struct.pack(f">{used}H", *[1] * used)),
        (_DIRECTORY * _CLUSTER, directory),
        (bitmap_table * _CLUSTER, struct.pack(f">{tables}Q", *offsets)),
        (first * _CLUSTER, bytes(bits)),
        # The last cluster has its whole length.
        (used * _CLUSTER - 1, b"\0" if len(bits) % _CLUSTER else bytes(bits[-1:])),
    ]


def _clusters(length: int) -> int:
    return -(-length // _CLUSTER)


class InvalidImage(ValueError):
    """QEMU has not left the image as the format says."""


# QEMU's own extensions are some hundred bytes.
_HEADER_AND_EXTENSIONS = 1 << 16
_MOST_DIRECTORY = 4096
_OFFSET = 0x00FFFFFFFFFFFE00
_ALL_ONES = 1


def read_bits(read: Callable[[int, int], bytes], size_bytes: int) -> bytes:
    """Return the bitmap of an image that QEMU has closed: a bit a cluster, the lowest first.

    `read` returns bytes of the image: offset, length. Raises InvalidImage.
    """
    try:
        return _read_bits(read, -(-cluster_count(size_bytes) // 8))
    except (struct.error, IndexError) as error:
        raise InvalidImage(str(error)) from error


def _read_bits(read: Callable[[int, int], bytes], wanted: int) -> bytes:
    start = read(0, _HEADER_AND_EXTENSIONS)
    magic, *_, autoclear, _, at = _HEADER.unpack_from(start)
    if magic != _MAGIC or not autoclear & _BITMAPS_ARE_VALID:
        raise InvalidImage("its bitmaps are not valid")
    # QEMU writes others, too, and in its own order.
    while (kind := int.from_bytes(start[at : at + 4], "big")) != _BITMAPS_EXTENSION:
        if not kind:
            raise InvalidImage("it has no bitmap")
        length = int.from_bytes(start[at + 4 : at + 8], "big")
        at += 8 + length + -length % 8
    _, _, count, _, length, directory = _EXTENSION.unpack_from(start, at)
    if count != 1 or length > _MOST_DIRECTORY:
        raise InvalidImage("it has another bitmap")
    table, tables, flags, _, granularity, _, _ = _ENTRY.unpack(read(directory, _ENTRY.size))
    if flags & _IN_USE or granularity != _GRANULARITY_BITS or tables != -(-wanted // _CLUSTER):
        raise InvalidImage("its bitmap was not stored")
    bits = bytearray()
    for (word,) in struct.iter_unpack(">Q", read(table, 8 * tables)):
        length = min(_CLUSTER, wanted - len(bits))
        if word & _OFFSET:
            piece = read(word & _OFFSET, length)
        else:
            piece = (b"\xff" if word & _ALL_ONES else b"\0") * length
        if len(piece) != length:
            raise InvalidImage("its bitmap is cut short")
        bits += piece
    return bytes(bits)


def is_set(bits: bytes, cluster: int) -> bool:
    return bool(bits[cluster // 8] >> cluster % 8 & 1)
