# SPDX-License-Identifier: Apache-2.0
"""The disk's order, made of clusters that come in any order. Pure.

Device after device, the machine's memory last (its length is known only at its end), each from
its first cluster to its last. What comes too early is kept by whoever asks, and asked for again in its turn.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from vmapipe.clusters.masks import cluster_masks, nonzero_pieces
from vmapipe.clusters.sizes import (
    BLOCK_BYTES,
    BLOCKS_PER_CLUSTER,
    CLUSTER_BYTES,
    MAX_CLUSTERS,
)
from vmapipe.vma.header import Device

# A run of the packer, at the most.
_MOST_CLUSTERS = 1 << 20
_NOTHING = memoryview(b"")


class DiskRun(NamedTuple):
    """Consecutive clusters of one device in the packer's form: no masks where all are zero."""

    dev_id: int
    first: int
    clusters: int
    masks: bytes
    data: memoryview


class _Kept(NamedTuple):
    """A run that came too early; `place`: where its data is, in the words of who keeps it."""

    first: int
    clusters: int
    masks: bytes
    place: int
    length: int


#: Keeps data and says where; and gives so many bytes from there back.
Keep = Callable[[memoryview, int], int]
Recall = Callable[[int, int], memoryview]


class Ordering:
    """Takes runs as they come; yields them in order.

    `keep` is given data, and where in the archive it stands, and says a place; `recall` gives the bytes at a place.
    """

    def __init__(self, devices: Sequence[Device], keep: Keep, recall: Recall) -> None:
        self._keep = keep
        self._recall = recall
        self._order = [d for d in devices if not d.is_vmstate] + [
            d for d in devices if d.is_vmstate
        ]
        self._kept: dict[int, dict[int, _Kept]] = {d.dev_id: {} for d in devices}
        # Where the last run of zeroes of a device that is kept ends: the next one often follows it.
        self._zeroes: dict[int, tuple[int, int]] = {}
        self._next = 0

    def add(self, run: DiskRun, at: int) -> Iterator[DiskRun]:
        """A run whose data stands at `at` in the archive; yields what is in its turn now."""
        if not self._order:
            return
        current = self._order[0]
        if run.dev_id != current.dev_id or run.first != self._next:
            self._put_aside(run, at)
            return
        self._next += run.clusters
        yield run
        yield from self._followers()

    def finish(self) -> Iterator[DiskRun]:
        """Yield what is left, in order."""
        while self._order:
            yield from self._followers()
            if self._order:
                self._go_on()

    def _put_aside(self, run: DiskRun, at: int) -> None:
        kept = self._kept[run.dev_id]
        if run.masks:
            place = self._keep(run.data, at)
            kept[run.first] = _Kept(run.first, run.clusters, run.masks, place, len(run.data))
            return
        first, end = self._zeroes.get(run.dev_id, (-1, -1))
        if end == run.first and first in kept:
            kept[first] = kept[first]._replace(clusters=kept[first].clusters + run.clusters)
        else:
            first = run.first
            kept[first] = _Kept(first, run.clusters, b"", 0, 0)
        self._zeroes[run.dev_id] = first, run.first + run.clusters

    def _followers(self) -> Iterator[DiskRun]:
        while self._order:
            device = self._order[0]
            kept = self._kept[device.dev_id].pop(self._next, None)
            if kept is not None:
                data = self._recall(kept.place, kept.length) if kept.length else _NOTHING
                yield DiskRun(device.dev_id, kept.first, kept.clusters, kept.masks, data)
                self._next += kept.clusters
            elif device.is_vmstate or self._next < device.clusters:
                return
            else:
                self._go_on()

    def _go_on(self) -> None:
        self._order.pop(0)
        self._next = 0


def zeroes_together(runs: Iterable[DiskRun]) -> Iterator[DiskRun]:
    """The runs in their order; zeroes that follow one another are one, so that a hole costs little."""
    held: DiskRun | None = None
    for run in runs:
        if held is not None:
            if (
                not run.masks
                and run.dev_id == held.dev_id
                and run.first == held.first + held.clusters
                and held.clusters < _MOST_CLUSTERS
            ):
                held = held._replace(clusters=held.clusters + run.clusters)
                continue
            yield held
            held = None
        if run.masks:
            yield run
        else:
            held = run
    if held is not None:
        yield held


def pieces(run: DiskRun) -> Iterator[DiskRun]:
    """The run in pieces that a packer takes: of zeroes there may be any number."""
    if run.clusters <= _MOST_CLUSTERS:
        yield run
        return
    for at in range(0, run.clusters, _MOST_CLUSTERS):
        yield run._replace(first=run.first + at, clusters=min(_MOST_CLUSTERS, run.clusters - at))


def normal(run: DiskRun, size_bytes: int) -> DiskRun:
    """The run with no block stored that is zero, and nothing behind the device's end.

    So what different writers made of the same disk is the same. `size_bytes`: the device's; of a
    machine's memory MAX_DEVICE_BYTES.
    """
    if not run.masks:
        return run
    run = _cut(run, size_bytes)
    masks = cluster_masks(run.data, len(run.data))
    if nonzero_pieces(masks) == [(0, len(run.data))]:
        return run
    blocks = struct.unpack(f">{len(masks) // 2}H", masks) if masks else ()
    words: list[int] = []
    number = 0
    for word in struct.unpack(f">{run.clusters}H", run.masks):
        kept = 0
        for bit in range(BLOCKS_PER_CLUSTER):
            if word >> bit & 1:
                index, within = divmod(number, BLOCKS_PER_CLUSTER)
                if index < len(blocks) and blocks[index] >> within & 1:
                    kept |= 1 << bit
                number += 1
        words.append(kept)
    if not any(words):
        return run._replace(masks=b"", data=_NOTHING)
    parts = [run.data[at : at + length] for at, length in nonzero_pieces(masks)]
    data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
    return run._replace(masks=struct.pack(f">{run.clusters}H", *words), data=data)


def _cut(run: DiskRun, size_bytes: int) -> DiskRun:
    """Without the bytes behind the device's end, which a reader drops."""
    tail_bytes = size_bytes % CLUSTER_BYTES
    last = size_bytes // CLUSTER_BYTES
    if not tail_bytes or run.first + run.clusters - 1 != last or last >= MAX_CLUSTERS:
        return run
    mask = int.from_bytes(run.masks[-2:], "big")
    kept = mask & ((1 << -(-tail_bytes // BLOCK_BYTES)) - 1)
    gone = (mask.bit_count() - kept.bit_count()) * BLOCK_BYTES
    data = run.data[: len(run.data) - gone]
    rest = tail_bytes % BLOCK_BYTES
    if rest and kept >> (tail_bytes // BLOCK_BYTES) & 1:
        copy = bytearray(data)
        copy[len(copy) - BLOCK_BYTES + rest :] = bytes(BLOCK_BYTES - rest)
        data = memoryview(copy)
    return run._replace(masks=run.masks[:-2] + kept.to_bytes(2, "big"), data=data)


def without(devices: Sequence[Device], dropped: Collection[str]) -> tuple[Device, ...]:
    """The devices that are left."""
    return tuple(device for device in devices if device.name not in dropped)
