# SPDX-License-Identifier: Apache-2.0
"""The core of one backup job. Pure: an event in, a list of instructions out; no clock, no I/O.

The process around it (serve.py) carries out the instructions in order and
reports back, as events, what the store has written.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from vmapipe.archiver.admission import Admission
from vmapipe.archiver.device import DeviceState
from vmapipe.archiver.flow import Flow
from vmapipe.archiver.instructions import (
    Abandon,
    Begin,
    Event,
    Finish,
    GivenUp,
    Instruction,
    Notice,
    Received,
    Revoked,
    Send,
    Started,
    Stored,
    Ticked,
    Written,
)
from vmapipe.archiver.jobspec import JobSpec, uuid_of
from vmapipe.archiver.peers import Lost, Peer, Peers
from vmapipe.protocol.archiver_side import ArchiverSide, State
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.messages import (
    ClusterFrame,
    End,
    Fail,
    Hello,
    Message,
    Ping,
    Resume,
    RunFrame,
    Scattered,
    SharedRun,
)
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Device, Header, encode_header

# `Ticked` comes several times a second. After a longer gap this process itself
# was stopped (Ctrl-Z, a stalled machine), and nobody else's silence counts.
_STOPPED_S = 5.0


class Phase(enum.Enum):
    GATHERING = "waiting for producers"
    RUNNING = "receiving"
    FINISHING = "storing"
    DONE = "done"
    FAILED = "failed"


class Job:
    """One archive in the making. `now` is any monotonic clock, in seconds.

    `map_shared` maps the memory that a producer on this host offers, or
    returns None where that cannot be done; its data then comes in frames.
    """

    def __init__(
        self,
        spec: JobSpec,
        now: float,
        map_shared: Callable[[str], memoryview | None] = lambda offer: None,
    ) -> None:
        self.phase = Phase.GATHERING
        self.reason = ""
        self.uuid = spec.uuid
        self._spec = spec
        self._peers = Peers()
        self._admission = Admission(spec, self._peers)
        self._flow: Flow | None = None
        self._map_shared = map_shared
        self._started = self._ticked = now

    @property
    def devices(self) -> list[DeviceState]:
        """In the order of their dev_ids; none before all producers have come."""
        return self._flow.devices if self._flow else []

    @property
    def over(self) -> bool:
        """Nobody is to be told anything any more."""
        if self.phase is not Phase.DONE:
            return self.phase is Phase.FAILED
        return all(peer.side.state is State.CLOSED for peer in self._peers.all)

    def handle(self, event: Event) -> list[Instruction]:
        """The one door: whatever happens comes in here, and what is to be done goes out."""
        instructions: list[Instruction] = []
        match event:
            case Received():
                instructions = self._received(event)
            case Written(marks, dev_ids) if self._flow:
                instructions += self._flow.written(marks, dev_ids)
            case Ticked(now):
                instructions = self._ticked_to(now)
            case Started() if self._admission.complete:
                instructions = self._begin()
            case Stored() if self.phase is Phase.FINISHING:
                # Otherwise it was given up in the meantime, and nobody waits for DONE.
                self.phase = Phase.DONE
                instructions += (Send(peer, s.side.done(self.uuid)) for peer, s in self._peers)
            case GivenUp(reason):
                instructions = self._fail(reason)
            case Revoked(client):
                instructions = self._revoke(client)
        return instructions

    # --- what each event leads to ---

    def _received(self, event: Received) -> list[Instruction]:
        if self._peers.is_ignored(event.peer):
            return []
        state = self._peers.get(event.peer)
        side = state.side if state else ArchiverSide()
        try:
            message = side.receive(event.parts)
            if state is not None:
                state.heard = event.now
            return self._answer(event, side, message)
        except RemoteProtocolError as error:
            refusal = Send(event.peer, side.refuse(error.code, error.reason))
            return [refusal, *self._misbehaved(event.peer, error)]

    def _answer(self, event: Received, side: ArchiverSide, message: Message) -> list[Instruction]:
        """Raises RemoteProtocolError."""
        peer, _, now, client = event
        state = self._peers.get(peer)
        instructions: list[Instruction] = []
        match message:
            case Ping():
                instructions = [Send(peer, side.pong())]
            case Hello():
                newcomer = Peer(side, now, client, attempt=message.attempt)
                instructions = self._greet(peer, newcomer, message)
            case Resume():
                instructions += self._admission.resume(peer, message, client, now, self.uuid)
            case Fail(reason):
                instructions = self._producer_failed(peer, reason)
            case _ if self._flow and state and state.device:
                instructions = self._data(self._flow, state.device, message)
        return instructions

    def _data(self, flow: Flow, device: DeviceState, message: Message) -> list[Instruction]:
        """Raises RemoteProtocolError."""
        match message:
            case ClusterFrame() | RunFrame() | SharedRun() | Scattered():
                return list(flow.take(device, message))
            case End():
                return [*flow.end(device), *self._finish_if_complete(flow)]
        return []

    def _fail(self, reason: str) -> list[Instruction]:
        if self.phase in (Phase.DONE, Phase.FAILED):
            return []
        self.phase = Phase.FAILED
        self.reason = reason
        aborts = [
            Send(peer, state.side.abort(reason))
            for peer, state in self._peers
            if state.side.state is not State.CLOSED
        ]
        return [Abandon(reason), *aborts]

    def _revoke(self, client: str) -> list[Instruction]:
        for state in self._peers.all:
            if client and state.client == client:
                return self._fail(
                    f"device {state.side.device!r}: the key of client {client!r} was revoked"
                )
        return []

    def _ticked_to(self, now: float) -> list[Instruction]:
        gap, self._ticked = now - self._ticked, now
        if gap > _STOPPED_S:
            self._started += gap
            for state in self._peers.all:
                # Never move a last-heard time past `now`.
                state.heard = min(now, state.heard + gap)
        instructions: list[Instruction] = []
        gathering = self.phase is Phase.GATHERING
        if gathering and now - self._started > self._spec.start_timeout_s:
            instructions += self._fail(
                f"{self._admission.missing()} did not come within {self._spec.start_timeout_s} s"
            )
        for state in self._peers.all:
            missed = state.miss(now - state.heard, self._spec.heartbeat_s, gathering=gathering)
            if isinstance(missed, Lost):
                instructions += self._fail(missed.reason)
            elif missed:
                instructions.append(Notice(missed))
        return instructions

    # --- producers come, and all have sent everything ---

    def _greet(self, peer: bytes, newcomer: Peer, hello: Hello) -> list[Instruction]:
        gathering = self.phase is Phase.GATHERING
        answers = self._admission.greet(peer, newcomer, hello, gathering=gathering)
        if not (gathering and self._admission.complete):
            return list(answers)
        # From now on a shorter limit may hold: it counts from here.
        for state in self._peers.all:
            state.heard = newcomer.heard
        return [*answers, *self._begin()]

    def _begin(self) -> list[Instruction]:
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
        self.phase = Phase.RUNNING
        flow = self._flow = Flow(self._spec, header)
        instructions: list[Instruction] = [Begin(header, raw_header)]
        for (peer, state), device in zip(peers, devices, strict=True):
            offer = state.side.shared_at
            shared = self._map_shared(offer) if offer else None
            instructions.append(flow.welcome(peer, state, device, shared))
        return instructions + self._finish_if_complete(flow)

    def _finish_if_complete(self, flow: Flow) -> list[Instruction]:
        if not flow.complete:
            return []
        self.phase = Phase.FINISHING
        return [*flow.flush(), Finish()]

    # --- trouble ---

    def _producer_failed(self, peer: bytes, reason: str) -> list[Instruction]:
        state = self._peers.get(peer)
        if state is None:
            return []
        # The reason names the device: the producer wrote it for a reader.
        unsaid = f"device {state.side.device!r}: its producer failed and did not say why"
        return self._fail(reason or unsaid)

    def _misbehaved(self, peer: bytes, error: RemoteProtocolError) -> list[Instruction]:
        state = self._peers.get(peer)
        if state is not None:
            return self._fail(f"device {state.side.device!r}: {error}")
        return list(self._admission.refuse(peer, error))
