# SPDX-License-Identifier: Apache-2.0
"""Makes extents out of clusters that have changed and a base that has the rest. Pure.

The base's extents are passed through in their own order, each as soon as it is known of all its
clusters whether they have changed. So an extent in which nothing has changed keeps its data and
its neighbours, and a new archive shares them with the base (reflink, parts of an object, chunks
of a store). What has changed waits for its extent, at most `hold_bytes` of it: then the fullest
group goes out in an extent of its own, before its time. That costs sharing, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from vmapipe.clusters.cluster_set import ClusterSet
from vmapipe.clusters.sizes import BLOCK_BYTES, EXTENT_CLUSTERS, EXTENT_HEADER_BYTES
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.extent import ClusterRun, Extent, encode_extent_header, slot_word
from vmapipe.vma.header import Device, Header
from vmapipe.vma.packer import PackedExtent, PackedRun

# Of all devices together: what a disk of 64 MiB, changed from end to end in the wrong order,
# may need; seldom reached, since disks and bases are read in the same order.
HOLD_BYTES = 64 << 20
_NOTHING = memoryview(b"")


class _Held(NamedTuple):
    """A cluster that has changed and waits for its extent: its mask, and its stored blocks."""

    mask: int
    data: bytes


class _BaseDevice:
    """What is known of a device's clusters so far: 3 bits a cluster where they are scattered."""

    def __init__(self, device: Device) -> None:
        self.device = device
        #: Whether it has changed is known.
        self.known = ClusterSet(device.clusters)
        self.unchanged = ClusterSet(device.clusters)
        #: It has become zero, or still is.
        self.zero = ClusterSet(device.clusters)
        self.held: dict[int, _Held] = {}
        #: How many are held of each group of clusters that make an extent.
        self.groups: dict[int, int] = {}

    def hold(self, cluster: int, held: _Held) -> None:
        self.held[cluster] = held
        group = cluster // EXTENT_CLUSTERS
        self.groups[group] = self.groups.get(group, 0) + 1

    def release(self, cluster: int) -> _Held | None:
        """Take a held cluster out; None: it is not held (it has left before its time)."""
        held = self.held.pop(cluster, None)
        if held is not None:
            group = cluster // EXTENT_CLUSTERS
            left = self.groups[group] - 1
            if left:
                self.groups[group] = left
            else:
                del self.groups[group]
        return held


class _NewCluster(NamedTuple):
    """One cluster of the extent to come: its mask, and its data, which lies in the base or here."""

    dev_id: int
    cluster: int
    mask: int
    #: Where it lies in the base's extent, in bytes behind its header; -1: it is `held`.
    data_at: int
    held: bytes


class Keep(NamedTuple):
    """The base's extent, of which nothing has changed: its data as it is, behind a new header."""

    runs: tuple[ClusterRun, ...]


class Mix(NamedTuple):
    """The clusters of an extent that is partly, or not at all, the base's."""

    pieces: tuple[_NewCluster, ...]

    @property
    def needs_base(self) -> bool:
        """Return whether any of its data lies in the base."""
        return any(piece.data_at >= 0 and piece.mask for piece in self.pieces)

    def changed(self, packed: PackedExtent[None]) -> list[PackedRun]:
        """Those clusters of the extent, packed of this, that are not as in the base."""
        both = zip(self.pieces, packed.clusters, strict=True)
        return [run for piece, run in both if piece.data_at < 0]


class Synthesized(NamedTuple):
    """An extent that was made, and for each of its buffers where that lies in the base's data (-1: nowhere)."""

    extent: PackedExtent[None]
    places: list[int]


class Synthesis:
    """Clusters come with `add` and `add_unchanged`, each once; the base's extents are asked for with `plan`.

    `devices`: the new archive's, by their dev_ids in the base. Others of the base are left out.
    """

    def __init__(
        self,
        uuid: bytes,
        base: Header,
        devices: Mapping[int, Device],
        hold_bytes: int = HOLD_BYTES,
    ) -> None:
        self._uuid = uuid
        self._coverage = Coverage(base)
        self._of_base = {number: _BaseDevice(device) for number, device in devices.items()}
        self._by_dev_id = {state.device.dev_id: state for state in self._of_base.values()}
        self._hold_bytes = hold_bytes
        self.held_bytes = 0
        #: Data that was taken from the base so far, in bytes.
        self.kept_bytes = 0

    def add_unchanged(self, dev_id: int, first: int, count: int) -> None:
        state = self._by_dev_id[dev_id]
        state.known.add(first, count)
        state.unchanged.add(first, count)

    def add(
        self, dev_id: int, first: int, count: int, masks: bytes, payload: memoryview
    ) -> list[Synthesized]:
        """Add clusters in the packer's form; their data is copied. Return what has to leave at once."""
        state = self._by_dev_id[dev_id]
        state.known.add(first, count)
        if not masks:
            state.zero.add(first, count)
            return []
        at = 0
        for cluster, mask in enumerate(struct.unpack(f">{count}H", masks), first):
            if not mask:
                state.zero.add(cluster, 1)
                continue
            stop = at + mask.bit_count() * BLOCK_BYTES
            state.hold(cluster, _Held(mask, bytes(payload[at:stop])))
            at = stop
        self.held_bytes += at
        return self._make_room()

    def _make_room(self) -> list[Synthesized]:
        extents = []
        while self.held_bytes > self._hold_bytes:
            state = max(
                self._by_dev_id.values(), key=lambda each: max(each.groups.values(), default=0)
            )
            group = max(state.groups, key=lambda each: (state.groups[each], -each))
            first = group * EXTENT_CLUSTERS
            held = [
                (cluster, self._release(state, cluster))
                for cluster in range(first, first + EXTENT_CLUSTERS)
            ]
            dev_id = state.device.dev_id
            pieces = [
                _NewCluster(dev_id, at, each.mask, -1, each.data) for at, each in held if each
            ]
            extents.append(self._packed(pieces, _NOTHING))
        return extents

    def _release(self, state: _BaseDevice, cluster: int) -> _Held | None:
        held = state.release(cluster)
        if held is not None:
            self.held_bytes -= len(held.data)
        return held

    def plan(self, extent: Extent) -> Keep | Mix | None:
        """Return what becomes of the base's next extent; None: not all is known of its clusters yet.

        The same extent comes again after None. Raises CoverageError where the base has a
        cluster twice, or none that it should have.
        """
        states = [self._of_base.get(run.dev_id) for run in extent.runs]
        for run, state in zip(extent.runs, states, strict=True):
            if state is not None and not state.known.has_all(run.first_cluster, run.count):
                if run.first_cluster + run.count > state.device.clusters:
                    break  # which the coverage refuses
                return None
        self._coverage.add(extent)
        if extent.runs and all(
            state is not None and state.unchanged.has_all(run.first_cluster, run.count)
            for run, state in zip(extent.runs, states, strict=True)
        ):
            return Keep(extent.runs)
        pieces: list[_NewCluster] = []
        changed = False
        for run, state in zip(extent.runs, states, strict=True):
            if state is None:
                changed = True
                continue
            data_at = run.data_at
            for cluster, mask in enumerate(run.masks, run.first_cluster):
                piece, is_base = self._piece(state, cluster, mask, data_at)
                changed = changed or not is_base
                if piece is not None:
                    pieces.append(piece)
                data_at += mask.bit_count() * BLOCK_BYTES
        return Mix(tuple(pieces)) if changed or not pieces else Keep(extent.runs)

    def _piece(
        self, state: _BaseDevice, cluster: int, mask: int, data_at: int
    ) -> tuple[_NewCluster | None, bool]:
        """A cluster of the base as it is to be stored, and whether that is as it was."""
        dev_id = state.device.dev_id
        if state.unchanged.has(cluster) or (not mask and state.zero.has(cluster)):
            return _NewCluster(dev_id, cluster, mask, data_at, b""), True
        if state.zero.has(cluster):
            return _NewCluster(dev_id, cluster, 0, -1, b""), False
        held = self._release(state, cluster)
        if held is None:
            return None, False
        return _NewCluster(dev_id, cluster, held.mask, -1, held.data), False

    def pack(self, plan: Keep | Mix, data: memoryview) -> Synthesized | None:
        """Return the extent that was planned, out of the `data` of the base's; None: it has no clusters."""
        if isinstance(plan, Keep):
            return self._kept(plan.runs, data)
        return self._packed(plan.pieces, data) if plan.pieces else None

    def _kept(self, runs: tuple[ClusterRun, ...], data: memoryview) -> Synthesized:
        slots: list[int] = []
        clusters: list[PackedRun] = []
        dev_ids = set()
        for run in runs:
            dev_id = self._of_base[run.dev_id].device.dev_id
            first, count = run.first_cluster, run.count
            slots += [
                slot_word(mask, dev_id, cluster) for cluster, mask in enumerate(run.masks, first)
            ]
            masks = b"" if run.is_zero else struct.pack(f">{count}H", *run.masks)
            piece = data[run.data_at : run.data_at + run.data_bytes]
            clusters.append((dev_id, first, count, masks, piece))
            dev_ids.add(dev_id)
        self.kept_bytes += len(data)
        header = encode_extent_header(self._uuid, slots, len(data) // BLOCK_BYTES)
        buffers: list[bytes | memoryview] = [header, data] if len(data) else [header]
        size_bytes = len(header) + len(data)
        extent: PackedExtent[None] = PackedExtent(buffers, size_bytes, clusters, {}, dev_ids)
        return Synthesized(extent, [-1, 0][: len(buffers)])

    def _packed(
        self, pieces: list[_NewCluster] | tuple[_NewCluster, ...], data: memoryview
    ) -> Synthesized:
        slots: list[int] = []
        places = [-1]
        buffers: list[bytes | memoryview] = [b""]
        clusters: list[PackedRun] = []
        dev_ids = set()
        size_bytes = base_from = base_to = 0
        for dev_id, cluster, mask, data_at, held in pieces:
            length = mask.bit_count() * BLOCK_BYTES
            piece = memoryview(held) if data_at < 0 else data[data_at : data_at + length]
            if length and data_at >= 0:
                self.kept_bytes += length
                # Neighbours in the base stay one piece: what is shared with it is shared by ranges.
                if base_to == data_at and base_to > base_from:
                    buffers[-1] = data[base_from : data_at + length]
                else:
                    base_from = data_at
                    buffers.append(piece)
                    places.append(data_at)
                base_to = data_at + length
            elif length:
                base_from = base_to = 0
                buffers.append(piece)
                places.append(-1)
            slots.append(slot_word(mask, dev_id, cluster))
            masks = mask.to_bytes(2, "big") if mask else b""
            clusters.append((dev_id, cluster, 1, masks, piece))
            dev_ids.add(dev_id)
            size_bytes += length
        buffers[0] = encode_extent_header(self._uuid, slots, size_bytes // BLOCK_BYTES)
        extent: PackedExtent[None] = PackedExtent(
            buffers, EXTENT_HEADER_BYTES + size_bytes, clusters, {}, dev_ids
        )
        return Synthesized(extent, places)

    def finish(self) -> None:
        """The base has ended. Raises CoverageError where clusters were not in it."""
        self._coverage.finish()
