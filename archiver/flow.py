# SPDX-License-Identifier: Apache-2.0
"""The data of a running job: frames go in, extents and credit come out. Pure."""

from __future__ import annotations

from vmapipe.archiver.device import DeviceState, Mark
from vmapipe.archiver.instructions import Put, Send
from vmapipe.archiver.jobspec import JobSpec
from vmapipe.archiver.peers import Peer
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol import limits
from vmapipe.protocol.messages import DataFrame
from vmapipe.vma.header import Device, Header
from vmapipe.vma.packer import PackedExtent, Packer

# Data that may be under way or queued for writing, all devices together: room
# for a few of the largest frames. More did not make a local backup quicker.
WINDOW_TOTAL_BYTES = 16 << 20


class Flow:
    """All devices of a job, each with its share of the window."""

    def __init__(self, spec: JobSpec, header: Header) -> None:
        self.devices: list[DeviceState] = []
        self._spec = spec
        self._packer: Packer[Mark] = Packer(header.uuid)
        share_bytes = WINDOW_TOTAL_BYTES // max(1, len(header.devices))
        self._window_bytes = max(limits.MIN_WINDOW_BYTES, share_bytes)

    def welcome(self, at: bytes, peer: Peer, device: Device, shared: memoryview | None) -> Send:
        """One device more, in the header's order: tells its producer how much it may send."""
        may_send = not self._spec.in_order or not self.devices
        peer.device = DeviceState(at, peer.side, device, self._window_bytes, shared)
        self.devices.append(peer.device)
        return Send(
            at,
            peer.side.welcome(
                device.dev_id,
                self._window_bytes if may_send else 0,
                max(self._window_bytes // 2, limits.charge(1, CLUSTER_BYTES)),
                self._spec.heartbeat_s,
                shared=shared is not None,
                reconnect_s=self._spec.reconnect_s,
            ),
        )

    @property
    def complete(self) -> bool:
        """Every device has come to its end."""
        return all(device.complete for device in self.devices)

    def take(self, device: DeviceState, message: DataFrame) -> list[Put | Send]:
        """Raises RemoteProtocolError for a frame that cannot be."""
        puts = [
            self._put(extent)
            for run, mark in device.take(message)
            for extent in self._packer.add(device.dev_id, *run, mark)
        ]
        return [*puts, *self._grant(device)]

    def written(self, marks: dict[int, Mark], dev_ids: set[int]) -> list[Send]:
        """An extent that held data of `dev_ids` was written; `marks` are its notes."""
        grants: list[Send] = []
        for device in self.devices:
            if device.dev_id in dev_ids:
                device.written(marks.get(device.dev_id))
                grants += self._grant(device)
        return grants

    def end(self, device: DeviceState) -> list[Send]:
        """Its producer said END. Raises RemoteProtocolError when clusters are missing."""
        device.end()
        following = self._current()
        if self._spec.in_order and following is not None:
            return self._grant(following)
        return []

    def flush(self) -> list[Put]:
        """What is left, when all devices are complete."""
        return [self._put(extent) for extent in self._packer.flush()]

    def _put(self, extent: PackedExtent[Mark]) -> Put:
        held = {cluster[0] for cluster in extent.clusters}
        for device in self.devices:
            if device.dev_id in held:
                device.queued_extents += 1
        return Put(extent)

    def _grant(self, device: DeviceState) -> list[Send]:
        if self._spec.in_order and not device.complete and device is not self._current():
            return []
        parts = device.grant()
        return [] if parts is None else [Send(device.peer, parts)]

    def _current(self) -> DeviceState | None:
        return next((device for device in self.devices if not device.complete), None)
