# SPDX-License-Identifier: Apache-2.0
"""The core of one backup job. Pure: an event in, a list of instructions out; no clock, no I/O.

The process around it (serve.py) carries out the instructions in order and
reports back, as events, what the store has written.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmapipe.archiver.job.device import DeviceState, FillRun, FrameMark
from vmapipe.archiver.job.producers import Admission, JobProducer, JobProducers, Lost
from vmapipe.archiver.job.spec import (
    AbandonArchive,
    ArchiveStored,
    BaseUse,
    BeginArchive,
    ExtentWritten,
    FillClusters,
    FinishArchive,
    JobAborted,
    JobEvent,
    JobInstruction,
    JobSpec,
    JobStarted,
    KeyRevoked,
    LogNotice,
    MessageReceived,
    Send,
    StoreExtent,
    TimePassed,
    base_use,
    uuid_of,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.transfer import (
    ClusterFrame,
    DataFrame,
    End,
    Fail,
    Hello,
    Message,
    Ping,
    Resume,
    RunFrame,
    Scattered,
    SharedRun,
    UnchangedRun,
    Want,
)
from vmapipe.protocol.transfer_state import ArchiverSide, ArchiverState
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Device, Header, encode_header
from vmapipe.vma.packer import PackedExtent, Packer

if TYPE_CHECKING:
    from vmapipe.archiver.outputs.cluster_digests import BaseDigests
    from vmapipe.vma.groups import GroupPacker

# `Ticked` comes several times a second. After a longer gap this process itself
# was stopped (Ctrl-Z, a stalled machine), and the silence of peers does not count.
_STOPPED_S = 5.0


class JobPhase(enum.Enum):
    GATHERING = "waiting for producers"
    RUNNING = "receiving"
    FINISHING = "storing"
    DONE = "done"
    FAILED = "failed"


class Job:
    """One archive in the making. `now` is any monotonic clock, in seconds.

    `map_shared` maps the memory that a producer on this host offers, or
    returns None where that cannot be done; its data then comes in frames. `base_digests`: those
    of the base's clusters, where it has some.
    """

    def __init__(
        self,
        spec: JobSpec,
        now: float,
        map_shared: Callable[[str], memoryview | None] = lambda offer: None,
        base_digests: BaseDigests | None = None,
    ) -> None:
        self.phase = JobPhase.GATHERING
        self.reason = ""
        self.uuid = spec.uuid
        self._spec = spec
        self._peers = JobProducers()
        self._admission = Admission(spec, self._peers)
        self._flow: JobDevices | None = None
        self._map_shared = map_shared
        self._base_digests = base_digests
        self._started = self._ticked = now

    @property
    def devices(self) -> list[DeviceState]:
        """In the order of their dev_ids; none before all producers have come."""
        return self._flow.devices if self._flow else []

    @property
    def over(self) -> bool:
        """True when no peer is to be told anything any more."""
        if self.phase is not JobPhase.DONE:
            return self.phase is JobPhase.FAILED
        return all(peer.side.state is ArchiverState.CLOSED for peer in self._peers.all)

    def handle(self, event: JobEvent) -> list[JobInstruction]:
        """The one door: whatever happens comes in here, and what is to be done goes out."""
        instructions: list[JobInstruction] = []
        match event:
            case MessageReceived():
                instructions = self._received(event)
            case ExtentWritten(marks, dev_ids) if self._flow:
                instructions += self._flow.written(marks, dev_ids)
            case TimePassed(now):
                instructions = self._ticked_to(now)
            case JobStarted() if self._admission.complete:
                instructions = self._begin()
            case ArchiveStored() if self.phase is JobPhase.FINISHING:
                # Otherwise it was abandoned in the meantime, and no producer waits for DONE.
                self.phase = JobPhase.DONE
                instructions += (Send(peer, s.side.done(self.uuid)) for peer, s in self._peers)
            case JobAborted(reason):
                instructions = self._fail(reason)
            case KeyRevoked(client):
                instructions = self._revoke(client)
        return instructions

    # --- what each event leads to ---

    def _received(self, event: MessageReceived) -> list[JobInstruction]:
        state = self._peers.by_connection.get(event.peer)
        if state is None and self._peers.is_ignored(event.peer):
            return []
        side = state.side if state else ArchiverSide()
        if side.state is ArchiverState.CLOSED:
            return []
        try:
            message = side.receive(event.parts)
            if state is not None:
                state.heard = event.now
            return self._answer(event, side, state, message)
        except RemoteProtocolError as error:
            refusal = Send(event.peer, side.refuse(error.code, error.reason))
            return [refusal, *self._misbehaved(event.peer, error)]

    def _answer(
        self,
        event: MessageReceived,
        side: ArchiverSide,
        state: JobProducer | None,
        message: Message,
    ) -> list[JobInstruction]:
        """Raises RemoteProtocolError. Only a producer that was accepted, `state`, sends data."""
        peer, _, now, client = event
        flow, device = self._flow, state.device if state else None
        instructions: list[JobInstruction] = []
        match message:
            case ClusterFrame() | RunFrame() | SharedRun() | Scattered() | UnchangedRun() if (
                flow and device
            ):
                instructions += flow.take(device, message)
            case End() if flow and device:
                instructions += flow.end(device)
                instructions += self._finish_if_complete(flow)
            case Want(first, clusters) if device and self._base_digests:
                digests = self._base_digests.read(device.base_dev_id, first, clusters)
                instructions = [Send(peer, side.have(first, digests))]
            case Ping():
                instructions = [Send(peer, side.pong())]
            case Hello():
                newcomer = JobProducer(side, now, client, message.attempt)
                instructions = self._greet(peer, newcomer, message)
            case Resume():
                instructions += self._admission.resume(peer, message, client, now, self.uuid)
            case Fail(reason):
                instructions = self._producer_failed(peer, reason)
        return instructions

    def _fail(self, reason: str) -> list[JobInstruction]:
        if self.phase in (JobPhase.DONE, JobPhase.FAILED):
            return []
        self.phase = JobPhase.FAILED
        self.reason = reason
        aborts = [
            Send(peer, state.side.abort(reason))
            for peer, state in self._peers
            if state.side.state is not ArchiverState.CLOSED
        ]
        return [AbandonArchive(reason), *aborts]

    def _revoke(self, client: str) -> list[JobInstruction]:
        for state in self._peers.all:
            if client and state.client == client:
                return self._fail(
                    f"device {state.side.device!r}: the key of client {client!r} was revoked"
                )
        return []

    def _ticked_to(self, now: float) -> list[JobInstruction]:
        gap, self._ticked = now - self._ticked, now
        if gap > _STOPPED_S:
            self._started += gap
            for state in self._peers.all:
                # Never move a last-heard time past `now`.
                state.heard = min(now, state.heard + gap)
        instructions: list[JobInstruction] = []
        gathering = self.phase is JobPhase.GATHERING
        if gathering and now - self._started > self._spec.start_timeout_s:
            instructions += self._fail(
                f"{self._admission.missing()} did not come within {self._spec.start_timeout_s} s"
            )
        for state in self._peers.all:
            missed = state.check_silence(
                now - state.heard, self._spec.heartbeat_s, gathering=gathering
            )
            if isinstance(missed, Lost):
                instructions += self._fail(missed.reason)
            elif missed:
                instructions.append(LogNotice(missed))
        return instructions

    # --- producers come, and all have sent everything ---

    def _greet(self, peer: bytes, newcomer: JobProducer, hello: Hello) -> list[JobInstruction]:
        gathering = self.phase is JobPhase.GATHERING
        answers = self._admission.greet(peer, newcomer, hello, gathering=gathering)
        if not (gathering and self._admission.complete):
            return list(answers)
        # From now on a shorter limit may hold: it counts from here.
        for state in self._peers.all:
            state.heard = newcomer.heard
        return [*answers, *self._begin()]

    def _begin(self) -> list[JobInstruction]:
        peers = list(self._peers)
        if self._spec.devices:
            peers.sort(key=lambda item: self._spec.devices.index(item[1].side.device))
        devices = tuple(
            Device(index, state.side.device, state.side.size_bytes)
            for index, (_, state) in enumerate(peers, start=1)
        )
        self.uuid = self._spec.uuid or uuid_of(self._spec, devices)
        header = Header(self.uuid, self._spec.ctime_s, devices, self._spec.configs)
        try:
            raw_header = encode_header(header)
        except LimitError as error:
            return self._fail(str(error))
        self.phase = JobPhase.RUNNING
        flow = self._flow = JobDevices(self._spec, header)
        base = self._spec.base
        uses = [base_use(base, device) for device in devices]
        key = self._base_digests.key if self._base_digests else b""
        told = () if base is None else tuple(uses)
        instructions: list[JobInstruction] = [BeginArchive(header, raw_header, told)]
        for (peer, state), use in zip(peers, uses, strict=True):
            offer = state.side.shared_at
            shared = self._map_shared(offer) if offer else None
            instructions.append(flow.welcome(peer, state, use, shared, key))
        return instructions + self._finish_if_complete(flow)

    def _finish_if_complete(self, flow: JobDevices) -> list[JobInstruction]:
        if not flow.complete:
            return []
        self.phase = JobPhase.FINISHING
        return [*flow.flush(), FinishArchive()]

    # --- trouble ---

    def _producer_failed(self, peer: bytes, reason: str) -> list[JobInstruction]:
        state = self._peers.by_connection.get(peer)
        if state is None:
            return []
        # The reason names the device: the producer wrote it for a reader.
        unsaid = f"device {state.side.device!r}: its producer failed and did not say why"
        return self._fail(reason or unsaid)

    def _misbehaved(self, peer: bytes, error: RemoteProtocolError) -> list[JobInstruction]:
        state = self._peers.by_connection.get(peer)
        if state is not None:
            return self._fail(f"device {state.side.device!r}: {error}")
        return list(self._admission.refuse(peer, error))


# Data that may be under way or queued for writing, all devices together: room
# for a few of the largest frames. More did not make a local backup quicker.
WINDOW_TOTAL_BYTES = 16 << 20
# Data in memory that its producer shares takes none here, however many devices there are. Of 32
# disks of 16 MiB, frames of 2 clusters (a 32nd of the total) took twice the CPU time of all processes
# that frames of 1 MiB do. A producer reads half of a frame's limit at a time, so this is that of one frame,
# and of the window, too: the other disks keep us busy meanwhile, and each frame more that may be under way
# makes a producer touch more of its memory for the first time (windows of 4 MiB: 1.15 of the CPU time).
SHARED_FRAME_BYTES = 9 << 18


class JobDevices:
    """All devices of a job, each with its share of the window."""

    def __init__(self, spec: JobSpec, header: Header) -> None:
        self.devices: list[DeviceState] = []
        self._spec = spec
        self._packer: Packer[FrameMark] | GroupPacker[FrameMark]
        if spec.stable:
            # Imported here: other backups start sooner without.
            from vmapipe.vma.groups import GroupPacker

            self._packer = GroupPacker(header, spec.hold_bytes, whole=True)
        else:
            self._packer = Packer(header.uuid)
        share_bytes = WINDOW_TOTAL_BYTES // max(1, len(header.devices))
        self._share_bytes = max(limits.MIN_WINDOW_BYTES, share_bytes)

    def welcome(
        self,
        at: bytes,
        peer: JobProducer,
        use: BaseUse,
        shared: memoryview | None,
        digest_key: bytes,
    ) -> Send:
        """One device more, in the header's order: tells its producer how much it may send."""
        may_send = not self._spec.in_order or not self.devices
        device, base_dev_id = use.device, use.base_dev_id
        shared_bytes = SHARED_FRAME_BYTES if shared is not None else 0
        window_bytes = max(self._share_bytes, shared_bytes)
        peer.device = DeviceState(
            at, peer.side, device, window_bytes, shared, base_dev_id=base_dev_id
        )
        self.devices.append(peer.device)
        return Send(
            at,
            peer.side.welcome(
                device.dev_id,
                window_bytes if may_send else 0,
                max(window_bytes // 2, shared_bytes, limits.charge(1, CLUSTER_BYTES)),
                self._spec.heartbeat_s,
                shared=shared is not None,
                reconnect_s=self._spec.reconnect_s,
                base=digest_key if base_dev_id else None,
            ),
        )

    @property
    def complete(self) -> bool:
        """Every device has come to its end."""
        return all(device.complete for device in self.devices)

    def take(
        self, device: DeviceState, message: DataFrame
    ) -> list[StoreExtent | FillClusters | Send]:
        """Raises RemoteProtocolError for a frame that cannot be."""
        instructions: list[StoreExtent | FillClusters | Send] = []
        for (first, count, masks, payload), mark in device.take(message):
            dev_id = device.dev_id
            if device.has_base or payload is None:
                device.queued_extents += 1
                fill = FillRun(dev_id, first, count, masks, payload, {dev_id: mark})
                instructions.append(FillClusters(fill))
            else:
                packed = self._packer.add(dev_id, first, count, masks, payload, mark)
                instructions += map(self._put, packed)
                if self._spec.stable and not any(dev_id in each.notes for each in packed):
                    device.copied(mark)
        return instructions if device.queued_extents else [*instructions, *self._grant(device)]

    def written(self, marks: dict[int, FrameMark], dev_ids: set[int]) -> list[Send]:
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

    def flush(self) -> list[StoreExtent]:
        """Return the last extents, when all devices are complete."""
        if self.devices and all(device.has_base for device in self.devices):
            return []
        return [self._put(extent) for extent in self._packer.flush()]

    def _put(self, extent: PackedExtent[FrameMark]) -> StoreExtent:
        for device in self.devices:
            if device.dev_id in extent.dev_ids:
                device.queued_extents += 1
        return StoreExtent(extent)

    def _grant(self, device: DeviceState) -> list[Send]:
        if self._spec.in_order and not device.complete and device is not self._current():
            return []
        parts = device.grant()
        return [] if parts is None else [Send(device.peer, parts)]

    def _current(self) -> DeviceState | None:
        return next((device for device in self.devices if not device.complete), None)
