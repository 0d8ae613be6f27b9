# SPDX-License-Identifier: Apache-2.0
"""Packs clusters into extents: a header and views of the data that was given, no copy."""

from __future__ import annotations

import struct
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from vmapipe.clusters.sizes import (
    BLOCK_BYTES,
    CLUSTER_BYTES,
    EXTENT_CLUSTERS,
    EXTENT_HEADER_BYTES,
    FULL_MASK,
    MAX_CLUSTERS,
    MAX_EXTENT_CLUSTERS,
)
from vmapipe.vma.errors import LimitError
from vmapipe.vma.extent import encode_extent_header, encode_zero_extents, slot_word
from vmapipe.vma.header import MAX_DEVICES, UUID_BYTES

#: Of extents that wait for more of their clusters (groups.py), of all devices together. Backups of a
#: database that was written to all the time held 15 MiB.
HOLD_BYTES = 64 << 20
_FULL = FULL_MASK.to_bytes(2, "big")
# Extents of zeroes that are handed on as one: each is only a header, and what is
# done with each of them costs more than making it. 32 KiB, so that writes are
# still cut finely.
ZERO_EXTENTS = 64
_NOTHING = memoryview(b"")
Note = TypeVar("Note")
# dev_id, first cluster, count, masks and payload, the last two as in `Packer.add`.
PackedRun: TypeAlias = tuple[int, int, int, bytes, memoryview]


class PackedExtent(NamedTuple, Generic[Note]):
    """One extent, ready to be written: `buffers` in order, `total_bytes` long together.

    Or `extents` of them that hold only zeroes; then there is one buffer, with
    their headers.

    `clusters` lists what it holds, of the devices `dev_ids`, so that digests can be kept
    per device.
    `notes` has, per dev_id, the last note given with a run that ends in this
    extent: when the extent is on disk, so is everything up to that note.
    """

    buffers: list[bytes | memoryview]
    total_bytes: int
    clusters: list[PackedRun]
    notes: dict[int, Note]
    dev_ids: set[int]
    extents: int = 1


class Packer(Generic[Note]):
    """Packs runs of clusters, in any order and of any devices, into full extents."""

    def __init__(self, uuid: bytes, slots_per_extent: int = EXTENT_CLUSTERS) -> None:
        if not 1 <= slots_per_extent <= MAX_EXTENT_CLUSTERS:
            raise LimitError(
                f"an extent has 1..{MAX_EXTENT_CLUSTERS} slots, not {slots_per_extent}"
            )
        if len(uuid) != UUID_BYTES:
            raise LimitError(f"an archive's uuid has {UUID_BYTES} bytes, not {len(uuid)}")
        self._uuid = uuid
        self._limit = slots_per_extent
        self._closed = 0
        self._start()

    def _start(self) -> None:
        self._slots: list[int] = []
        self._buffers: list[bytes | memoryview] = [b""]
        self._data_bytes = 0
        self._clusters: list[PackedRun] = []
        self._dev_ids: set[int] = set()
        self._notes: dict[int, Note] = {}

    def add(
        self,
        dev_id: int,
        first_cluster: int,
        count: int,
        masks: bytes,
        payload: bytes | memoryview,
        note: Note,
    ) -> list[PackedExtent[Note]]:
        """Add `count` consecutive clusters; return the extents that this has filled.

        `masks`: one big-endian 16-bit mask a cluster, or empty when all are
        zero. `payload`: their non-zero blocks, 4096 bytes each, back to back.
        The payload is kept by reference until its extent is returned. Extents of
        zeroes come many to an item: a run of 2^20 clusters, the longest of the wire,
        gives less than 300. Raises LimitError, and has changed nothing then.
        """
        view = memoryview(payload)
        check_run(dev_id, first_cluster, count, masks, view)
        full = bool(masks) and masks == _FULL * count
        words = b"" if full else masks
        extents: list[PackedExtent[Note]] = []
        done = data_at = 0
        while done < count:
            if not masks and not self._slots and count - done >= self._limit:
                zeroes = min(ZERO_EXTENTS, (count - done) // self._limit)
                first = first_cluster + done
                done += zeroes * self._limit
                self._closed += zeroes
                extents.append(pack_zeroes(self._uuid, dev_id, first, self._limit, zeroes))
                if done == count:
                    extents[-1].notes[dev_id] = note
                continue
            take = min(self._limit - len(self._slots), count - done)
            base = dev_id << 32 | first_cluster + done
            if full:
                size = take * CLUSTER_BYTES
                self._slots.extend(range(FULL_MASK << 48 | base, (FULL_MASK << 48 | base) + take))
            elif not masks:
                size = 0
                self._slots.extend(range(base, base + take))
            else:
                part = struct.unpack_from(f">{take}H", words, done * 2)
                size = BLOCK_BYTES * sum(mask.bit_count() for mask in part)
                self._slots.extend(mask << 48 | base + i for i, mask in enumerate(part))
            piece = view[data_at : data_at + size]
            if size:
                self._buffers.append(piece)
                self._data_bytes += size
            self._clusters.append(
                (dev_id, first_cluster + done, take, masks[done * 2 : (done + take) * 2], piece)
            )
            self._dev_ids.add(dev_id)
            data_at += size
            done += take
            if done == count:
                self._notes[dev_id] = note
            if len(self._slots) == self._limit:
                extents.append(self._close())
        return extents

    def flush(self) -> list[PackedExtent[Note]]:
        """The last extent, if it holds anything; an archive without clusters has one empty one.

        So does the reference tool's (an archive of configs only).
        """
        return [self._close()] if self._slots or not self._closed else []

    def _close(self) -> PackedExtent[Note]:
        self._buffers[0] = encode_extent_header(
            self._uuid, self._slots, self._data_bytes // BLOCK_BYTES
        )
        size_bytes = EXTENT_HEADER_BYTES + self._data_bytes
        extent = PackedExtent(self._buffers, size_bytes, self._clusters, self._notes, self._dev_ids)
        self._closed += 1
        self._start()
        return extent


def pack_zeroes(
    uuid: bytes, dev_id: int, first: int, slots: int, extents: int
) -> PackedExtent[Note]:
    """Return `extents` extents of `slots` consecutive zero clusters each, as one."""
    raw = encode_zero_extents(uuid, slot_word(0, dev_id, first), slots, extents)
    run: PackedRun = (dev_id, first, extents * slots, b"", _NOTHING)
    return PackedExtent([raw], len(raw), [run], {}, {dev_id}, extents)


def check_run(dev_id: int, first: int, count: int, masks: bytes, payload: memoryview) -> None:
    """Raise LimitError for what cannot be packed. See `Packer.add`."""
    if not 1 <= dev_id <= MAX_DEVICES:
        raise LimitError(f"dev_id {dev_id} is not 1..{MAX_DEVICES}")
    if first < 0 or count < 1 or first + count > MAX_CLUSTERS:
        raise LimitError(f"cluster number out of range: {first} + {count}")
    if masks and len(masks) != 2 * count:
        raise LimitError(f"{len(masks)} bytes of masks for {count} clusters")
    if payload.itemsize != 1:
        raise LimitError("the payload is not a view of bytes")
    expected = int.from_bytes(masks, "big").bit_count() * BLOCK_BYTES
    if payload.nbytes != expected:
        raise LimitError(f"{payload.nbytes} bytes of data where the masks say {expected}")
