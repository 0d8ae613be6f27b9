# SPDX-License-Identifier: Apache-2.0
"""The extent header: which clusters follow, and which of their blocks are non-zero."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from typing import NamedTuple

from vmapipe.clusters.masks import mask_runs
from vmapipe.clusters.sizes import (
    BLOCK_BYTES,
    BLOCKS_PER_CLUSTER,
    CLUSTER_BYTES,
    EXTENT_HEADER_BYTES,
    FULL_MASK,
    MAX_EXTENT_CLUSTERS,
)
from vmapipe.vma.errors import ExtentError
from vmapipe.vma.header import UUID_BYTES

EXTENT_MAGIC = b"VMAE"
# magic, reserved, block_count, uuid, md5, 59 x blockinfo
_EXTENT = struct.Struct(f">4sHH16s16s{MAX_EXTENT_CLUSTERS}Q")
_UUID_AT = 8
_MD5_AT = 24
_NO_MD5 = bytes(16)
_MASK_SHIFT = 48
_DEV_SHIFT = 32
# Bits 40..47 of a slot are reserved; a reader ignores them, as the reference does.
_DEV_BITS = 0xFF
_NUM_BITS = 0xFFFFFFFF


class ClusterRun(NamedTuple):
    """Consecutive clusters of one device inside one extent.

    `masks` has one entry a cluster (bit 0: its first block is stored).
    `data_at` is the position of the first stored block, in bytes, counted from
    the end of the extent's header.
    """

    dev_id: int
    first_cluster: int
    masks: tuple[int, ...]
    data_at: int

    @property
    def count(self) -> int:  # type: ignore[override]  # of clusters; hides tuple.count
        return len(self.masks)

    @property
    def data_bytes(self) -> int:
        if self.is_full:  # most are, and counting takes longer than all else of a header
            return CLUSTER_BYTES * len(self.masks)
        return BLOCK_BYTES * sum(mask.bit_count() for mask in self.masks)

    @property
    def is_full(self) -> bool:
        return self.masks.count(FULL_MASK) == len(self.masks)

    @property
    def is_zero(self) -> bool:
        return self.masks.count(0) == len(self.masks)


class Extent(NamedTuple):
    """A parsed extent header. `offset` is its place in the archive, in bytes."""

    offset: int
    data_bytes: int
    runs: tuple[ClusterRun, ...]

    @property
    def total_bytes(self) -> int:
        return EXTENT_HEADER_BYTES + self.data_bytes


def encode_extent_header(uuid: bytes, slots: list[int], block_count: int) -> bytes:
    """512 bytes. `slots` are blockinfo words (`slot_word`), at most 59."""
    padded = slots + [0] * (MAX_EXTENT_CLUSTERS - len(slots))
    raw = bytearray(_EXTENT.pack(EXTENT_MAGIC, 0, block_count, uuid, _NO_MD5, *padded))
    raw[_MD5_AT : _MD5_AT + 16] = hashlib.md5(raw, usedforsecurity=False).digest()
    return bytes(raw)


def encode_zero_extents(uuid: bytes, first_word: int, slots: int, count: int) -> bytes:
    """The headers of `count` extents of `slots` zero clusters each, all of them consecutive.

    A disk of 1 TiB has 289,000. A whole extent's words are one long number, and
    the next extent's differ from it by the same number each time.
    """
    ones = sum(1 << 64 * lane for lane in range(slots))
    words = first_word * ones + sum(slot << 64 * (slots - 1 - slot) for slot in range(slots))
    head = _EXTENT.pack(EXTENT_MAGIC, 0, 0, uuid, _NO_MD5, *[0] * MAX_EXTENT_CLUSTERS)[:_MD5_AT]
    unsummed = head + _NO_MD5
    unused = bytes(8 * (MAX_EXTENT_CLUSTERS - slots))
    out: list[bytes] = []
    for _ in range(count):
        body = words.to_bytes(8 * slots, "big") + unused
        out += head, hashlib.md5(unsummed + body, usedforsecurity=False).digest(), body
        words += slots * ones
    return b"".join(out)


def slot_word(mask: int, dev_id: int, cluster_num: int) -> int:
    return mask << _MASK_SHIFT | dev_id << _DEV_SHIFT | cluster_num


def parse_extent_header(
    raw: bytes | bytearray | memoryview, uuid: bytes, offset: int = 0
) -> Extent:
    """Read the 512 bytes at archive position `offset`. Raises ExtentError."""
    if len(raw) < EXTENT_HEADER_BYTES:
        raise ExtentError(
            f"the archive ends inside an extent header ({len(raw)} of 512 bytes)",
            offset=offset,
            reference_text=f"read short extent ({len(raw)} bytes)",
        )
    magic, reserved, block_count, extent_uuid, md5, *slots = _EXTENT.unpack_from(raw)
    if magic != EXTENT_MAGIC or reserved:
        raise ExtentError(
            "no extent header where one must be: the archive is damaged",
            offset=offset,
            reference_text="wrong vma extent header magic",
        )
    if extent_uuid != uuid:
        raise ExtentError(
            "the extent belongs to another archive (its uuid differs)",
            offset=offset,
            reference_text="wrong vma extent uuid",
        )
    body = bytearray(raw[:EXTENT_HEADER_BYTES])
    body[_MD5_AT : _MD5_AT + 16] = _NO_MD5
    if hashlib.md5(body, usedforsecurity=False).digest() != md5:
        raise ExtentError(
            "the extent header's checksum is wrong: it is damaged",
            offset=offset,
            reference_text="wrong vma extent header chechsum",
        )
    runs, data_bytes = _runs(slots)
    blocks = data_bytes // BLOCK_BYTES
    if blocks != block_count:
        raise ExtentError(
            f"the extent announces {block_count} blocks, its masks {blocks}",
            offset=offset,
            reference_text=(
                "short vma extent - too many blocks"
                if blocks > block_count
                else "vma extent error - missing blocks"
            ),
        )
    return Extent(offset, data_bytes, runs)


def _alike(slots: list[int]) -> ClusterRun | None:
    """The run that all slots in use are, where they follow one another and have one mask.

    So are most extents of a disk that is read in order. It is seen in one
    comparison: a word is then by one larger than the word before it.
    """
    first = slots[0]
    count = slots.index(0) if 0 in slots else MAX_EXTENT_CLUSTERS
    dev_id, num = first >> _DEV_SHIFT & _DEV_BITS, first & _NUM_BITS
    in_order = slots[:count] == list(range(first, first + count))
    # Beyond the number's bits the next word is another device's.
    if not dev_id or not in_order or num + count - 1 > _NUM_BITS or any(slots[count:]):
        return None
    return ClusterRun(dev_id, num, (first >> _MASK_SHIFT,) * count, 0)


def _runs(slots: list[int]) -> tuple[tuple[ClusterRun, ...], int]:
    """Group consecutive clusters: what reads or writes them handles runs; and their data, in bytes."""
    alike = _alike(slots)
    if alike is not None:
        return (alike,), len(alike.masks) * alike.masks[0].bit_count() * BLOCK_BYTES
    runs: list[ClusterRun] = []
    masks: list[int] = []
    first = device = expected = run_at = data_at = 0
    for word in slots:
        dev_id = word >> _DEV_SHIFT & _DEV_BITS
        if not dev_id:
            continue  # an empty slot; the reference takes them between used ones
        mask = word >> _MASK_SHIFT
        num = word & _NUM_BITS
        if masks and (num != expected or dev_id != device):
            runs.append(ClusterRun(device, first, tuple(masks), run_at))
            masks = []
        if not masks:
            first, device, run_at = num, dev_id, data_at
        masks.append(mask)
        expected = num + 1
        data_at += mask.bit_count() * BLOCK_BYTES
    if masks:
        runs.append(ClusterRun(device, first, tuple(masks), run_at))
    return tuple(runs), data_at


def without(runs: tuple[ClusterRun, ...], left_out: Collection[int]) -> tuple[ClusterRun, ...]:
    """The runs without some of their clusters, which are counted through all runs from 0."""
    kept: list[ClusterRun] = []
    number = 0
    for run in runs:
        data_at = run.data_at
        first = run.first_cluster
        masks: list[int] = []
        start_at = data_at
        for index, mask in enumerate(run.masks):
            if number in left_out:
                if masks:
                    kept.append(ClusterRun(run.dev_id, first, tuple(masks), start_at))
                masks = []
            else:
                if not masks:
                    first, start_at = run.first_cluster + index, data_at
                masks.append(mask)
            data_at += mask.bit_count() * BLOCK_BYTES
            number += 1
        if masks:
            kept.append(ClusterRun(run.dev_id, first, tuple(masks), start_at))
    return tuple(kept)


def find_extent_header(data: bytes | memoryview, uuid: bytes | None, start: int = 0) -> int:
    """Where in `data`, from `start` on, a sound extent header begins; -1: nowhere.

    `uuid`: the archive's; None: any. Uuid and checksum keep a guest's data from being taken
    for a header. Whoever cut bytes out need not have kept to any alignment.
    """
    raw = bytes(data)
    at = raw.find(EXTENT_MAGIC, start)
    while 0 <= at <= len(raw) - EXTENT_HEADER_BYTES:
        # The uuid first: it is the quickest to tell, and guests have such bytes too.
        found = raw[at + _UUID_AT : at + _UUID_AT + UUID_BYTES] if uuid is None else uuid
        if raw.startswith(found, at + _UUID_AT):
            try:
                parse_extent_header(raw[at : at + EXTENT_HEADER_BYTES], found)
                return at
            except ExtentError:
                pass
        at = raw.find(EXTENT_MAGIC, at + 1)
    return -1


def extent_uuid(raw: bytes) -> bytes:
    """The uuid in an extent's header."""
    return raw[_UUID_AT : _UUID_AT + UUID_BYTES]


def block_pieces(run: ClusterRun, size_bytes: int) -> list[tuple[int, int, int]]:
    """Return the pieces that a run stores: (device offset, data offset, length) in bytes, merged, in order.

    `size_bytes` is the device's end: the last block is cut there. Data offsets
    count from the end of the extent header.
    """
    start = run.first_cluster * BLOCKS_PER_CLUSTER * BLOCK_BYTES
    if start >= size_bytes:
        return []
    if run.is_full:
        length = len(run.masks) * BLOCKS_PER_CLUSTER * BLOCK_BYTES
        return [(start, run.data_at, min(length, size_bytes - start))]
    pieces: list[tuple[int, int, int]] = []
    data_at = run.data_at
    for index, mask in enumerate(run.masks):
        cluster_at = start + index * BLOCKS_PER_CLUSTER * BLOCK_BYTES
        for first, count in mask_runs(mask):
            at = cluster_at + first * BLOCK_BYTES
            length = count * BLOCK_BYTES
            if pieces and pieces[-1][0] + pieces[-1][2] == at:
                last = pieces[-1]
                pieces[-1] = (last[0], last[1], last[2] + length)
            else:
                pieces.append((at, data_at, length))
            data_at += length
    return [(at, data, min(n, size_bytes - at)) for at, data, n in pieces if at < size_bytes]
