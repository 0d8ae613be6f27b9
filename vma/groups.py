# SPDX-License-Identifier: Apache-2.0
"""Packs clusters into extents whose content does not depend on the order in which they come.

Extent k of a device holds its clusters 58k to 58k+57, in order. A group that has not come whole is
held, as a copy, so that nobody waits for the memory that it came in. When more is held than may be,
what there is of the fullest groups goes out together before its time: such an extent is like no
other backup's, and nothing else is lost by it.
"""

from __future__ import annotations

import struct
from typing import Generic, NamedTuple

from vmapipe.clusters.sizes import (
    BLOCK_BYTES,
    BLOCKS_PER_CLUSTER,
    CLUSTER_BYTES,
    EXTENT_CLUSTERS,
    EXTENT_HEADER_BYTES,
    FULL_MASK,
)
from vmapipe.vma.extent import encode_extent_header, slot_word
from vmapipe.vma.header import Header
from vmapipe.vma.packer import (
    ZERO_EXTENTS,
    Note,
    PackedExtent,
    PackedRun,
    check_run,
    pack_zeroes,
)

# Of all devices together. Backups of a database that was written to all the time held 15 MiB.
HOLD_BYTES = 64 << 20
# What a held part takes beside its data, roughly: a disk of zeroes that come one by one is bounded, too.
_PART_BYTES = 512
# A cluster with so many of its 16 blocks is stored whole where that is asked for: a block that is
# zero in one backup and not in the next moves all data behind it. Of disks of programs and
# databases this costs 1 % of their data; of one that is sparse in each cluster at most as much again.
WHOLE_FROM_BLOCKS = 8
_FULL = FULL_MASK.to_bytes(2, "big")
_NOTHING = memoryview(b"")


class _Part(NamedTuple):
    """Consecutive clusters of one group: masks, or none where all are zero, and their blocks."""

    first: int
    clusters: int
    masks: bytes
    payload: memoryview


class _Group:
    """Clusters of an extent to come."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.clusters = 0


_Key = tuple[int, int]


class GroupPacker(Generic[Note]):
    """Packs runs of clusters, in any order and of any devices, each of which comes once.

    `hold_bytes`: of incomplete groups. `whole`: nearly full clusters are stored whole.
    """

    def __init__(self, header: Header, hold_bytes: int = HOLD_BYTES, *, whole: bool) -> None:
        self._uuid = header.uuid
        self._hold_bytes = hold_bytes
        self._whole = whole
        # A machine's memory takes as much as comes.
        self._ends = {d.dev_id: None if d.is_vmstate else d.clusters for d in header.devices}
        # How many clusters of each group have come, held or not: a byte for 3.6 MiB of a disk.
        self._came = {d.dev_id: bytearray() for d in header.devices}
        self._groups: dict[_Key, _Group] = {}
        # The groups by how many clusters of them are held. Dicts, for their order.
        self._by_size: list[dict[_Key, None]] = [{} for _ in range(EXTENT_CLUSTERS + 1)]
        self._closed = 0
        #: Of groups that are not whole, in bytes.
        self.held_bytes = 0

    def add(
        self,
        dev_id: int,
        first_cluster: int,
        count: int,
        masks: bytes,
        payload: bytes | memoryview,
        note: Note,
    ) -> list[PackedExtent[Note]]:
        """As `Packer.add`, but the note comes with the last extent that holds clusters of the device.

        Where none is returned that does, nothing of `payload` is needed any more: it was copied.
        """
        view = memoryview(payload)
        check_run(dev_id, first_cluster, count, masks, view)
        extents: list[PackedExtent[Note]] = []
        done = data_at = 0
        while done < count:
            cluster = first_cluster + done
            zeroes = 0 if masks else self._whole_groups(dev_id, cluster, count - done)
            if zeroes:
                self._closed += zeroes
                extents.append(pack_zeroes(self._uuid, dev_id, cluster, EXTENT_CLUSTERS, zeroes))
                self._count(dev_id, cluster // EXTENT_CLUSTERS, EXTENT_CLUSTERS, zeroes)
                done += zeroes * EXTENT_CLUSTERS
                continue
            take = min(EXTENT_CLUSTERS - cluster % EXTENT_CLUSTERS, count - done)
            part_masks = masks[2 * done : 2 * (done + take)]
            size = int.from_bytes(part_masks, "big").bit_count() * BLOCK_BYTES
            part = _Part(cluster, take, part_masks, view[data_at : data_at + size])
            extents += self._put(dev_id, part)
            data_at += size
            done += take
        for extent in reversed(extents):
            if dev_id in extent.dev_ids:
                extent.notes[dev_id] = note
                break
        return extents

    def _whole_groups(self, dev_id: int, cluster: int, count: int) -> int:
        """How many whole groups of which nothing has come begin here; as many as go out as one."""
        number, within = divmod(cluster, EXTENT_CLUSTERS)
        groups = 0 if within else min(ZERO_EXTENTS, count // EXTENT_CLUSTERS)
        came = self._came[dev_id]
        return 0 if any(came[number : number + groups]) else groups

    def _count(self, dev_id: int, group: int, clusters: int, groups: int = 1) -> int:
        """Add clusters that have come to each of these groups; return how many of the last there are."""
        came = self._came[dev_id]
        came.extend(bytes(max(0, group + groups - len(came))))
        for number in range(group, group + groups):
            came[number] += clusters
        return came[group + groups - 1]

    def _put(self, dev_id: int, part: _Part) -> list[PackedExtent[Note]]:
        number = part.first // EXTENT_CLUSTERS
        end = self._ends[dev_id]
        clusters = EXTENT_CLUSTERS
        if end is not None:
            clusters = min(clusters, end - number * EXTENT_CLUSTERS)
        key = (dev_id, number)
        if self._count(dev_id, number, part.clusters) == clusters:
            return [self._close([(dev_id, held) for held in [*self._take(key), part]])]
        # Its memory is somebody else's, who waits for it.
        part = part._replace(payload=memoryview(bytes(part.payload)))
        group = self._groups.setdefault(key, _Group())
        self._by_size[group.clusters].pop(key, None)
        group.parts.append(part)
        group.clusters += part.clusters
        self._by_size[group.clusters][key] = None
        self.held_bytes += len(part.payload) + _PART_BYTES
        return self._make_room()

    def _take(self, key: _Key) -> list[_Part]:
        group = self._groups.pop(key, None)
        if group is None:
            return []
        del self._by_size[group.clusters][key]
        self.held_bytes -= sum(len(part.payload) + _PART_BYTES for part in group.parts)
        return group.parts

    def _make_room(self) -> list[PackedExtent[Note]]:
        extents = []
        while self.held_bytes > self._hold_bytes:
            extents.append(self._close(self._fullest()))
        return extents

    def _fullest(self) -> list[tuple[int, _Part]]:
        """Take as many of the fullest groups as one extent can hold."""
        parts: list[tuple[int, _Part]] = []
        room = EXTENT_CLUSTERS
        while True:
            size = next((n for n in range(room, 0, -1) if self._by_size[n]), 0)
            if not size:
                return parts
            key = next(iter(self._by_size[size]))
            parts += [(key[0], part) for part in self._take(key)]
            room -= size

    def flush(self) -> list[PackedExtent[Note]]:
        """What is left: the end of a machine's memory; an archive without clusters has one empty extent."""
        extents = []
        while self._groups:
            extents.append(self._close(self._fullest()))
        return extents if extents or self._closed else [self._close([])]

    def _close(self, parts: list[tuple[int, _Part]]) -> PackedExtent[Note]:
        slots: list[int] = []
        buffers: list[bytes | memoryview] = [b""]
        clusters: list[PackedRun] = []
        for dev_id, part in sorted(parts, key=lambda each: (each[0], each[1].first)):
            for first, count, masks, payload in self._widened(dev_id, part):
                if not masks:
                    base = slot_word(0, dev_id, first)
                    slots += range(base, base + count)
                elif masks == _FULL * count:
                    base = slot_word(FULL_MASK, dev_id, first)
                    slots += range(base, base + count)
                else:
                    words = struct.unpack(f">{count}H", masks)
                    slots += [slot_word(m, dev_id, n) for n, m in enumerate(words, first)]
                if len(payload):
                    buffers.append(payload)
                clusters.append((dev_id, first, count, masks, payload))
        size_bytes = sum(map(len, buffers))
        buffers[0] = encode_extent_header(self._uuid, slots, size_bytes // BLOCK_BYTES)
        self._closed += 1
        dev_ids = {dev_id for dev_id, _ in parts}
        return PackedExtent(buffers, EXTENT_HEADER_BYTES + size_bytes, clusters, {}, dev_ids)

    def _widened(self, dev_id: int, part: _Part) -> list[_Part]:
        """The part, with nearly full clusters made full: a part of its own each."""
        if not self._whole or not part.masks or part.masks == _FULL * part.clusters:
            return [part]
        words = struct.unpack(f">{part.clusters}H", part.masks)
        end = self._ends[dev_id]
        parts: list[_Part] = []
        start = start_at = at = 0

        def pass_on(stop: int) -> None:
            if stop > start:
                masks = part.masks[2 * start : 2 * stop]
                parts.append(
                    _Part(part.first + start, stop - start, masks, part.payload[start_at:at])
                )

        for index, mask in enumerate(words):
            after = at + mask.bit_count() * BLOCK_BYTES
            # The last cluster may end before its blocks do.
            is_last = end is not None and part.first + index == end - 1
            if mask != FULL_MASK and mask.bit_count() >= WHOLE_FROM_BLOCKS and not is_last:
                pass_on(index)
                whole = _spread(mask, part.payload[at:after])
                parts.append(_Part(part.first + index, 1, _FULL, whole))
                start, start_at = index + 1, after
            at = after
        pass_on(part.clusters)
        return parts


def _spread(mask: int, blocks: memoryview) -> memoryview:
    """The whole cluster, zeroes included."""
    cluster = memoryview(bytearray(CLUSTER_BYTES))
    at = 0
    for block in range(BLOCKS_PER_CLUSTER):
        if mask >> block & 1:
            place = block * BLOCK_BYTES
            cluster[place : place + BLOCK_BYTES] = blocks[at : at + BLOCK_BYTES]
            at += BLOCK_BYTES
    return cluster
