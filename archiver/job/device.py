# SPDX-License-Identifier: Apache-2.0
"""State of one device in a job: its clusters, and how much more its producer may send."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.clusters.cluster_set import ClusterSet
from vmapipe.clusters.masks import cluster_masks, collect
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import (
    ClusterFrame,
    DataFrame,
    RunFrame,
    SharedCluster,
    SharedRun,
    UnchangedRun,
)
from vmapipe.protocol.transfer_state import ArchiverSide
from vmapipe.vma.coverage import mask_fits
from vmapipe.vma.header import Device

# A producer's memory is a few MiB, and it waits for acknowledgements to use
# it again: tell it at least so often, and when nothing more is being written.
_ACK_BYTES = 512 * 1024
_NOTHING = memoryview(b"")


class FrameMark(NamedTuple):
    """How far a device had come: its last frame, and the sum of its charges up to there."""

    seq: int
    charged: int


class PackedRun(NamedTuple):
    """Clusters in the packer's form."""

    first: int
    clusters: int
    masks: bytes
    #: None: they are as in the base.
    payload: memoryview | None


class FillRun(NamedTuple):
    """Clusters of a device that has a base: changed ones in the packer's form, or unchanged ones.

    `notes` and `dev_ids` as those of a PackedExtent: when it is done, so is everything up to there.
    """

    dev_id: int
    first: int
    clusters: int
    masks: bytes
    #: None: unchanged.
    payload: memoryview | None
    notes: dict[int, FrameMark]

    @property
    def dev_ids(self) -> set[int]:
        return {self.dev_id}


class DeviceState:
    """One device of a running job. Its window, in bytes, is what may be unwritten.

    Data counts as out of the way when its extent is written, or while it lies
    in the one extent that is still open: that one is bounded by itself, and
    waiting for it could wait for ever.
    """

    def __init__(
        self,
        peer: bytes,
        side: ArchiverSide,
        device: Device,
        window_bytes: int,
        shared: memoryview | None,
        *,
        base_dev_id: int = 0,
    ) -> None:
        self.peer = peer
        self.device = device
        self.dev_id = device.dev_id
        self.queued_extents = 0
        #: Its dev_id in an earlier archive, which unchanged clusters are filled from; 0: there is none.
        self.base_dev_id = base_dev_id
        #: Unchanged clusters are filled from an earlier archive.
        self.has_base = bool(base_dev_id)
        self.unchanged_clusters = 0
        self.clusters = 0
        self.data_bytes = 0
        self.complete = False
        self._side = side
        self._window_bytes = window_bytes
        self._shared = shared
        self._end = device.clusters
        self._is_vmstate = device.is_vmstate
        self._seen = ClusterSet(self._end)
        self._came = self._written = self._copied = FrameMark(0, 0)
        self._granted = 0
        self._acked = 0

    @property
    def done_bytes(self) -> int:
        """How much of the device is in the archive, zeroes included."""
        if self.device.is_vmstate:
            return self.clusters * CLUSTER_BYTES
        return min(self.clusters * CLUSTER_BYTES, self.device.size_bytes)

    @property
    def zero_bytes(self) -> int:
        """How much of that is zero, and takes no room in the archive."""
        # The last block is stored whole, and may reach beyond the device's end.
        return max(0, self.done_bytes - self.unchanged_bytes - self.data_bytes)

    @property
    def unchanged_bytes(self) -> int:
        """How much of it is as in the base, zeroes included."""
        return self.unchanged_clusters * CLUSTER_BYTES

    def take(self, message: DataFrame) -> list[tuple[PackedRun, FrameMark]]:
        """A frame as runs, and how far the device has come with each. Raises RemoteProtocolError."""
        before, self._came = self._came, FrameMark(self._side.received_frames, self._side.charged)
        match message:
            case SharedRun(_, _, first, clusters, masks, position, data_bytes):
                payload = self._shared_at(position, data_bytes)
                return [(self._check(PackedRun(first, clusters, masks, payload)), self._came)]
            case UnchangedRun(_, _, first, clusters):
                return [(self._check(PackedRun(first, clusters, b"", None)), self._came)]
            case RunFrame(_, _, first, clusters, masks, payload):
                return [(self._check(PackedRun(first, clusters, masks, payload)), self._came)]
            case ClusterFrame():
                return [(self._check(self._from_cluster(message)), self._came)]
        runs = [self._check(self._from_scattered(cluster)) for cluster in message.clusters]
        # The frame has come, and may be acknowledged, with the last of them.
        return [*((run, before) for run in runs[:-1]), (runs[-1], self._came)]

    def _check(self, run: PackedRun) -> PackedRun:
        end = run.first + run.clusters
        if self._is_vmstate:
            if run.first != self.clusters:
                raise RemoteProtocolError(
                    "coverage", f"non sequential vmstate write: {run.first}, not {self.clusters}"
                )
        else:
            if end > self._end:
                raise RemoteProtocolError("coverage", f"cluster number out of range: {end - 1}")
            if end == self._end and run.masks:
                last = int.from_bytes(run.masks[-2:], "big")
                if not mask_fits(self.device, last, cut_full=False):
                    raise RemoteProtocolError("coverage", "data beyond the device's end")
            double = self._seen.add(run.first, run.clusters)
            if double is not None:
                raise RemoteProtocolError("coverage", f"cluster {double} comes a second time")
        self.clusters += run.clusters
        if run.payload is None:
            self.unchanged_clusters += run.clusters
        else:
            self.data_bytes += len(run.payload)
        return run

    def _shared_at(self, position: int, length: int) -> memoryview:
        if self._shared is None:
            raise RemoteProtocolError("sequence", "no memory is shared")
        end = position + length
        if end > len(self._shared):
            raise RemoteProtocolError("malformed", f"the shared memory ends before {end}")
        return self._shared[position:end]

    def _from_scattered(self, cluster: SharedCluster) -> PackedRun:
        num, position, mask = cluster
        if not mask:
            return PackedRun(num, 1, b"", _NOTHING)
        payload = self._shared_at(position, mask.bit_count() * BLOCK_BYTES)
        return PackedRun(num, 1, mask.to_bytes(2, "big"), payload)

    def _from_cluster(self, frame: ClusterFrame) -> PackedRun:
        data = frame.data
        if not data:
            return PackedRun(frame.cluster_num, 1, b"", _NOTHING)
        expected = CLUSTER_BYTES
        if not self.device.is_vmstate:
            expected = min(expected, self.device.size_bytes - frame.cluster_num * CLUSTER_BYTES)
        if len(data) != expected:
            raise RemoteProtocolError(
                "coverage",
                f"cluster {frame.cluster_num} has {len(data)} bytes; {max(expected, 0)} must come",
            )
        padded = data + bytes(-len(data) % BLOCK_BYTES)
        masks = cluster_masks(padded, len(padded))
        return PackedRun(frame.cluster_num, 1, masks, memoryview(collect(padded, masks)))

    def written(self, mark: FrameMark | None) -> None:
        """One of its queued extents was written; `mark` tells how far that brings it."""
        self.queued_extents -= 1
        if mark is not None:
            self._written = mark

    def copied(self, mark: FrameMark) -> None:
        """All up to `mark` lies in memory of our own, or in extents that are queued."""
        self._copied = mark

    def grant(self) -> list[Part] | None:
        """A message with more credit, when there is enough news for one.

        As long as extents of it are queued, only that one of them was written is news.
        """
        # With nothing in the queue its producer must hear of all that was copied: it may wait for it.
        if not self.queued_extents and self._copied.seq > self._written.seq:
            self._written = self._copied
        disposed = self._written.charged if self.queued_extents else self._side.charged
        limit = self._window_bytes + disposed
        # A quarter of the window a message: few messages, and the producer,
        # whose frames are at most half a window, never runs dry.
        more = limit - self._granted >= self._window_bytes // 4
        news = self._written.charged - self._acked
        # Blocks that are zero cost us nothing, and the producer memory: where most
        # are, little news is all of its memory, and it would wait for ever.
        freed = news >= _ACK_BYTES or (news > 0 and not self.queued_extents)
        if not (more or freed or self.complete):
            return None
        self._granted = limit
        self._acked = self._written.charged
        return self._side.grant(limit, self._written.seq)

    def end(self) -> None:
        """The producer said END. Raises RemoteProtocolError when clusters are missing."""
        if not self.device.is_vmstate:
            missing = next(self._seen.missing(), None)
            if missing is not None:
                raise RemoteProtocolError(
                    "coverage",
                    f"incomplete: cluster {missing[0]} never came "
                    f"({self.clusters} of {self.device.clusters} did)",
                )
        self.complete = True
