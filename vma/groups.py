# SPDX-License-Identifier: Apache-2.0
"""Packs clusters into extents that do not depend on the order in which they come.

Extent k of a device holds its clusters 58k to 58k+57, in order, and comes behind extent k-1. What
cannot leave yet is held, as a copy, so that nobody waits for the memory that it came in. When more
is held than may be, the first group leaves as it is: a disk is read from its start to its end, so
that what it lacks is far away, or comes last of all, as what was never allocated in a QEMU's image.
Its extent is as good as any, and only perhaps not like the next backup's.
"""

from __future__ import annotations

import heapq
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
from vmapipe.vma.header import Device, Header
from vmapipe.vma.packer import (
    HOLD_BYTES,
    ZERO_EXTENTS,
    Note,
    PackedExtent,
    PackedRun,
    check_run,
    pack_zeroes,
)

# What a held part takes beside its data, roughly: a disk of zeroes that come one by one is bounded, too.
_PART_BYTES = 512
# A cluster with so many of its 16 blocks is stored whole where that is asked for: a block that is
# zero in one backup and not in the next moves all data behind it. Of a disk of programs and a
# database that made the archive 0.3 % larger (0.2 % with 8); a cluster costs four times its data at most.
WHOLE_FROM_BLOCKS = 4
_FULL = FULL_MASK.to_bytes(2, "big")
_NOTHING = memoryview(b"")


class _GroupRun(NamedTuple):
    """Consecutive clusters of one group: masks, or none where all are zero, and their blocks."""

    first: int
    clusters: int
    masks: bytes
    payload: memoryview


class _Groups:
    """Of one device: what has come of each group of clusters that will be an extent."""

    def __init__(self, device: Device) -> None:
        self.dev_id = device.dev_id
        # A machine's memory takes as much as comes.
        self.end = None if device.is_vmstate else device.clusters
        # How many clusters of each group have come, held or not: a byte for 3.6 MiB of a disk.
        self._came = bytearray()
        self._held: dict[int, list[_GroupRun]] = {}
        # The numbers of those that are held, the lowest first; some have left already.
        self._order: list[int] = []
        #: All groups before this one have left.
        self.next = 0
        self.held_bytes = 0

    def count(self, group: int, clusters: int, groups: int = 1) -> None:
        """Add clusters that have come to each of these groups."""
        self._came.extend(bytes(max(0, group + groups - len(self._came))))
        for number in range(group, group + groups):
            self._came[number] += clusters

    def is_untouched(self, group: int, groups: int) -> bool:
        return not any(self._came[group : group + groups])

    def is_whole(self, group: int) -> bool:
        clusters = EXTENT_CLUSTERS
        if self.end is not None:
            clusters = min(clusters, self.end - group * EXTENT_CLUSTERS)
        return group < len(self._came) and self._came[group] == clusters

    def hold(self, group: int, part: _GroupRun) -> None:
        """A copy: its memory is somebody else's, who waits for it."""
        part = part._replace(payload=memoryview(bytes(part.payload)))
        if group not in self._held:
            heapq.heappush(self._order, group)
        self._held.setdefault(group, []).append(part)
        self.held_bytes += len(part.payload) + _PART_BYTES

    def take(self, group: int) -> list[_GroupRun]:
        """Take what is held of it; empty: nothing is."""
        parts = self._held.pop(group, [])
        self.held_bytes -= sum(len(part.payload) + _PART_BYTES for part in parts)
        return parts

    def lowest(self) -> int | None:
        while self._order and self._order[0] not in self._held:
            heapq.heappop(self._order)
        return self._order[0] if self._order else None

    def clusters_of(self, group: int) -> int:
        return sum(part.clusters for part in self._held[group])


class GroupPacker(Generic[Note]):
    """Packs runs of clusters, in any order and of any devices, each of which comes once.

    `hold_bytes`: of incomplete groups. `whole`: nearly full clusters are stored whole.
    """

    def __init__(self, header: Header, hold_bytes: int = HOLD_BYTES, *, whole: bool) -> None:
        self._uuid = header.uuid
        self._hold_bytes = hold_bytes
        self._whole = whole
        self._devices = {device.dev_id: _Groups(device) for device in header.devices}
        self._closed = 0

    @property
    def held_bytes(self) -> int:
        """Of groups that cannot leave yet, in bytes."""
        return sum(groups.held_bytes for groups in self._devices.values())

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
        groups = self._devices[dev_id]
        extents: list[PackedExtent[Note]] = []
        done = data_at = 0
        while done < count:
            cluster = first_cluster + done
            number, within = divmod(cluster, EXTENT_CLUSTERS)
            zeroes = 0
            if not masks and not within and number <= groups.next:
                zeroes = min(ZERO_EXTENTS, (count - done) // EXTENT_CLUSTERS)
            if zeroes and groups.is_untouched(number, zeroes):
                extents.append(pack_zeroes(self._uuid, dev_id, cluster, EXTENT_CLUSTERS, zeroes))
                self._closed += zeroes
                groups.count(number, EXTENT_CLUSTERS, zeroes)
                groups.next = max(groups.next, number + zeroes)
                done += zeroes * EXTENT_CLUSTERS
            else:
                take = min(EXTENT_CLUSTERS - within, count - done)
                part_masks = masks[2 * done : 2 * (done + take)]
                size = int.from_bytes(part_masks, "big").bit_count() * BLOCK_BYTES
                part = _GroupRun(cluster, take, part_masks, view[data_at : data_at + size])
                extents += self._put(groups, number, part)
                data_at += size
                done += take
            extents += self._followers(groups)
        for extent in reversed(extents):
            if dev_id in extent.dev_ids:
                extent.notes[dev_id] = note
                break
        return extents

    def _put(self, groups: _Groups, number: int, part: _GroupRun) -> list[PackedExtent[Note]]:
        groups.count(number, part.clusters)
        if number <= groups.next and groups.is_whole(number):
            groups.next = max(groups.next, number + 1)
            return [self._close([*groups.take(number), part], groups)]
        groups.hold(number, part)
        extents = []
        while self.held_bytes > self._hold_bytes:
            extents.append(self._lowest())
        return extents

    def _followers(self, groups: _Groups) -> list[PackedExtent[Note]]:
        """The groups behind the last that has left, as far as they are whole."""
        extents = []
        while groups.is_whole(groups.next):
            parts = groups.take(groups.next)
            groups.next += 1
            if parts:
                extents.append(self._close(parts, groups))
        return extents

    def _lowest(self) -> PackedExtent[Note]:
        """The first group that is held, of the device of which most is; small ones together."""
        groups = max(self._devices.values(), key=lambda each: each.held_bytes)
        parts: list[_GroupRun] = []
        taken = 0
        while (number := groups.lowest()) is not None:
            clusters = groups.clusters_of(number)
            if taken + clusters > EXTENT_CLUSTERS or taken > EXTENT_CLUSTERS // 2:
                break
            taken += clusters
            parts += groups.take(number)
            groups.next = max(groups.next, number + 1)
        return self._close(parts, groups)

    def flush(self) -> list[PackedExtent[Note]]:
        """What is left: the end of a machine's memory; an archive without clusters has one empty extent."""
        extents = []
        while self.held_bytes:
            extents.append(self._lowest())
        if not extents and not self._closed:
            slots: list[int] = []
            raw = encode_extent_header(self._uuid, slots, 0)
            extents.append(PackedExtent([raw], len(raw), [], {}, set()))
        return extents

    def _close(self, parts: list[_GroupRun], groups: _Groups) -> PackedExtent[Note]:
        dev_id = groups.dev_id
        slots: list[int] = []
        buffers: list[bytes | memoryview] = [b""]
        clusters: list[PackedRun] = []
        for part in sorted(parts, key=lambda part: part.first):
            for first, count, masks, payload in self._widened(part, groups.end):
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
        return PackedExtent(buffers, EXTENT_HEADER_BYTES + size_bytes, clusters, {}, {dev_id})

    def _widened(self, part: _GroupRun, end: int | None) -> list[_GroupRun]:
        """The part, with nearly full clusters made full: a part of its own each."""
        if not self._whole or not part.masks or part.masks == _FULL * part.clusters:
            return [part]
        words = struct.unpack(f">{part.clusters}H", part.masks)
        parts: list[_GroupRun] = []
        start = start_at = at = 0

        def pass_on(stop: int) -> None:
            if stop > start:
                masks = part.masks[2 * start : 2 * stop]
                parts.append(
                    _GroupRun(part.first + start, stop - start, masks, part.payload[start_at:at])
                )

        for index, mask in enumerate(words):
            after = at + mask.bit_count() * BLOCK_BYTES
            # The last cluster may end before its blocks do.
            is_last = end is not None and part.first + index == end - 1
            if mask != FULL_MASK and mask.bit_count() >= WHOLE_FROM_BLOCKS and not is_last:
                pass_on(index)
                whole = _spread(mask, part.payload[at:after])
                parts.append(_GroupRun(part.first + index, 1, _FULL, whole))
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
