# SPDX-License-Identifier: Apache-2.0
"""Makes archives, and their manifests, out of disk images. Pure: bytes in, bytes out."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from xxhash import xxh3_128

from vmapipe.clusters.sizes import (
    BLOCK_BYTES,
    BLOCKS_PER_CLUSTER,
    CLUSTER_BYTES,
    EXTENT_CLUSTERS,
    EXTENT_HEADER_BYTES,
    cluster_count,
)
from vmapipe.vma.header import (
    MAX_HEADER_BYTES,
    Config,
    Device,
    Header,
    encode_header,
    parse_header,
)
from vmapipe.vma.manifest import (
    DeviceTotals,
    ExtentDigest,
    Opening,
    Totals,
    extent_line,
    opening_line,
    totals_line,
)
from vmapipe.vma.packer import Packer
from vmapipe.vma.scanner import ExtentRead, HeaderRead, Scanner
from vmapipe.vma.seektable import Frame, seek_table_ends

UUID = bytes(range(16))
CTIME_S = 1353949200
_ZERO_BLOCK = bytes(BLOCK_BYTES)


class ClusterAt(NamedTuple):
    """One cluster of one disk, by the disk's name."""

    name: str
    cluster: int


def archive(
    disks: Mapping[str, bytes],
    configs: Mapping[str, bytes] | None = None,
    *,
    order: Sequence[ClusterAt] | None = None,
    slots: int = EXTENT_CLUSTERS,
    uuid: bytes = UUID,
) -> bytes:
    """The archive of these disks: dev_ids 1, 2, … in the mapping's order.

    `order`: the clusters as they come, by default disk after disk. It is not
    checked: leave some out, or name them twice, and the archive is wrong.
    """
    header = archive_header(disks, configs, uuid)
    ids = {device.name: device.dev_id for device in header.devices}
    clusters = in_order(disks) if order is None else order
    parts = [encode_header(header)]
    parts += _extents(disks, ids, clusters, slots, uuid)
    return b"".join(parts)


def archive_header(
    disks: Mapping[str, bytes], configs: Mapping[str, bytes] | None = None, uuid: bytes = UUID
) -> Header:
    return Header(
        uuid,
        CTIME_S,
        tuple(Device(n, name, len(data)) for n, (name, data) in enumerate(disks.items(), 1)),
        tuple(Config(name, data) for name, data in (configs or {}).items()),
    )


def in_order(disks: Mapping[str, bytes]) -> list[ClusterAt]:
    """All clusters, disk after disk."""
    return [
        ClusterAt(name, cluster)
        for name, data in disks.items()
        for cluster in range(cluster_count(len(data)))
    ]


def split_cluster(data: bytes, cluster: int) -> tuple[int, bytes]:
    """The mask and the stored blocks of one cluster of a disk."""
    mask = 0
    stored = []
    for bit in range(BLOCKS_PER_CLUSTER):
        at = cluster * CLUSTER_BYTES + bit * BLOCK_BYTES
        block = data[at : at + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
        if block != _ZERO_BLOCK:
            mask |= 1 << bit
            stored.append(block)
    return mask, b"".join(stored)


def _extents(
    disks: Mapping[str, bytes],
    ids: Mapping[str, int],
    clusters: Iterable[ClusterAt],
    slots: int,
    uuid: bytes,
) -> Iterator[bytes]:
    packer: Packer[None] = Packer(uuid, slots)
    for name, cluster in clusters:
        mask, stored = split_cluster(disks[name], cluster)
        masks = struct.pack(">H", mask) if mask else b""
        for extent in packer.add(ids[name], cluster, 1, masks, stored, None):
            yield b"".join(extent.buffers)
    for extent in packer.flush():
        yield b"".join(extent.buffers)


class ExtentAt(NamedTuple):
    """Where an extent stands in an archive, in bytes, header included."""

    offset: int
    total_bytes: int


def extents_of(raw: bytes) -> list[ExtentAt]:
    """All extents of a sound archive."""
    return [
        ExtentAt(event.extent.offset, event.extent.total_bytes)
        for event in Scanner().feed(raw)
        if isinstance(event, ExtentRead)
    ]


def manifest(raw: bytes, stored: bytes | None = None) -> bytes:
    """The manifest of a sound archive; `stored`: the file's bytes where it is compressed."""
    header: Header | None = None
    lines: list[str] = []
    clusters: dict[int, list[tuple[int, bytes]]] = {}
    for event in Scanner().feed(raw):
        if isinstance(event, HeaderRead):
            header = event.header
            digest = ExtentDigest(len(event.raw), _digest(event.raw))
            lines.append(opening_line(Opening(header.uuid, header.ctime_s, digest)))
        else:
            whole = event.raw_header + bytes(event.data)
            lines.append(extent_line(len(lines) - 1, ExtentDigest(len(whole), _digest(whole))))
            for run in event.extent.runs:
                at = run.data_at
                for number, mask in enumerate(run.masks, run.first_cluster):
                    end = at + mask.bit_count() * BLOCK_BYTES
                    data = mask.to_bytes(2, "big") + bytes(event.data[at:end])
                    clusters.setdefault(run.dev_id, []).append((number, data))
                    at = end
    if header is None:
        raise ValueError("no archive")
    file = raw if stored is None else stored
    devices = tuple(
        DeviceTotals(
            d.dev_id,
            d.name,
            d.size_bytes,
            len(clusters.get(d.dev_id, [])),
            0,
            _device_digest(clusters.get(d.dev_id, [])),
        )
        for d in header.devices
    )
    totals = Totals(len(lines) - 1, len(raw), len(file), xxh3_128(file).digest(), devices)
    return "".join([*lines, totals_line(totals)]).encode("ascii")


def _device_digest(clusters: list[tuple[int, bytes]]) -> bytes | None:
    """Only of clusters that came in order."""
    if [number for number, _ in clusters] != list(range(len(clusters))):
        return None
    return _digest(b"".join(data for _, data in clusters))


def _digest(data: bytes) -> bytes:
    return xxh3_128(data).digest()


def resealed(raw: bytes, offset: int) -> bytes:
    """The archive with a right checksum in the extent header at `offset`, whatever it says."""
    import hashlib

    fixed = bytearray(raw)
    fixed[offset + 24 : offset + 40] = bytes(16)
    header = bytes(fixed[offset : offset + EXTENT_HEADER_BYTES])
    fixed[offset + 24 : offset + 40] = hashlib.md5(header, usedforsecurity=False).digest()
    return bytes(fixed)


def renamed(raw: bytes, names: Mapping[bytes, bytes]) -> bytes:
    """The archive with other names of the same lengths, which our writer would refuse."""
    head = bytearray(raw[: parse_header(raw[:MAX_HEADER_BYTES]).header_bytes])
    for old, new in names.items():
        assert head.count(old + b"\0") == 1
        assert len(old) == len(new)
        head = head.replace(old + b"\0", new + b"\0")
    head[32:48] = bytes(16)
    head[32:48] = hashlib.md5(head, usedforsecurity=False).digest()
    return bytes(head) + raw[len(head) :]


def encode_seek_table(frames: Sequence[Frame]) -> bytes:
    """The seek table to append to a zstd file of these frames, without checksums."""
    head, foot = seek_table_ends(len(frames))
    return head + b"".join(struct.pack("<II", *frame) for frame in frames) + foot
