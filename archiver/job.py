# SPDX-License-Identifier: Apache-2.0
"""The core of one backup job. Pure: messages and facts in, instructions out; no clock, no I/O.

The process around it (serve.py) carries out the instructions in order and
reports back what the store has written. Methods are lazy iterators, because
one message can make a thousand extents: exhaust each before the next call.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence

from vmapipe.archiver.admission import Admission
from vmapipe.archiver.device import DeviceState, Mark
from vmapipe.archiver.flow import Flow
from vmapipe.archiver.instructions import Abandon, Begin, Finish, Instruction, Notice, Send
from vmapipe.archiver.jobspec import JobSpec, uuid_of
from vmapipe.archiver.peers import Lost, Peer, Peers
from vmapipe.protocol.archiver_side import ArchiverSide, State
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.messages import (
    ClusterFrame,
    End,
    Fail,
    Hello,
    Ping,
    Resume,
    RunFrame,
    Scattered,
    SharedRun,
)
from vmapipe.protocol.packing import Part
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Device, Header, encode_header

# `tick` comes several times a second. After a longer gap this process itself
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

    # --- facts that come in ---

    def start(self) -> Iterator[Instruction]:
        """Call it first: an archive of configs only needs no producer."""
        if self._admission.complete:
            yield from self._begin()

    def receive(
        self, peer: bytes, parts: Sequence[Part], now: float, client: str = ""
    ) -> Iterator[Instruction]:
        """A message from `peer`, whoever that is; `client` if it has proved to be that."""
        if self._peers.is_ignored(peer):
            return
        state, flow = self._peers.get(peer), self._flow
        side = state.side if state else ArchiverSide()
        try:
            message = side.receive(parts)
            if state is not None:
                state.heard = now
            match message:
                case ClusterFrame() | RunFrame() | SharedRun() | Scattered() if (
                    flow and state and state.device
                ):
                    yield from flow.take(state.device, message)
                case Ping():
                    yield Send(peer, side.pong())
                case Hello():
                    yield from self._greet(
                        peer, Peer(side, now, client, attempt=message.attempt), message
                    )
                case Resume():
                    yield from self._admission.resume(peer, message, client, now, self.uuid)
                case End() if flow and state and state.device:
                    yield from flow.end(state.device)
                    yield from self._finish_if_complete(flow)
                case Fail(reason):
                    yield from self._failed(peer, reason)
        except RemoteProtocolError as error:
            yield Send(peer, side.refuse(error.code, error.reason))
            yield from self._misbehaved(peer, error)

    def written(self, marks: dict[int, Mark], dev_ids: set[int]) -> Iterator[Instruction]:
        """An extent that held data of `dev_ids` was written; `marks` are its notes."""
        if self._flow:
            yield from self._flow.written(marks, dev_ids)

    def stored(self) -> Iterator[Instruction]:
        """The archive is complete, on disk, under its name."""
        if self.phase is not Phase.FINISHING:
            return  # it was given up in the meantime, and nobody waits for DONE
        self.phase = Phase.DONE
        for peer, state in self._peers:
            yield Send(peer, state.side.done(self.uuid))

    def fail(self, reason: str) -> Iterator[Instruction]:
        """The output failed, or somebody cancelled. The first reason counts."""
        if self.phase in (Phase.DONE, Phase.FAILED):
            return
        self.phase = Phase.FAILED
        self.reason = reason
        yield Abandon(reason)
        for peer, state in self._peers:
            if state.side.state is not State.CLOSED:
                yield Send(peer, state.side.abort(reason))

    def revoke(self, client: str) -> Iterator[Instruction]:
        """A client may no longer come: what it was sending is given up."""
        for state in self._peers.all:
            if client and state.client == client:
                yield from self.fail(
                    f"device {state.side.device!r}: the key of client {client!r} was revoked"
                )
                return

    def tick(self, now: float) -> Iterator[Instruction]:
        """Time has passed: call it about once a second."""
        gap, self._ticked = now - self._ticked, now
        if gap > _STOPPED_S:
            self._started += gap
            for state in self._peers.all:
                # Who has spoken since then is not heard from the future.
                state.heard = min(now, state.heard + gap)
        gathering = self.phase is Phase.GATHERING
        if gathering and now - self._started > self._spec.start_timeout_s:
            yield from self.fail(
                f"{self._admission.missing()} did not come within {self._spec.start_timeout_s} s"
            )
        for state in self._peers.all:
            missed = state.miss(now - state.heard, self._spec.heartbeat_s, gathering=gathering)
            if isinstance(missed, Lost):
                yield from self.fail(missed.reason)
            elif missed:
                yield Notice(missed)

    # --- producers come, and all have sent everything ---

    def _greet(self, peer: bytes, newcomer: Peer, hello: Hello) -> Iterator[Instruction]:
        gathering = self.phase is Phase.GATHERING
        yield from self._admission.greet(peer, newcomer, hello, gathering=gathering)
        if gathering and self._admission.complete:
            # From now on a shorter limit may hold: it counts from here.
            for state in self._peers.all:
                state.heard = newcomer.heard
            yield from self._begin()

    def _begin(self) -> Iterator[Instruction]:
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
            yield from self.fail(str(error))
            return
        self.phase = Phase.RUNNING
        flow = self._flow = Flow(self._spec, header)
        yield Begin(header, raw_header)
        for (peer, state), device in zip(peers, devices, strict=True):
            offer = state.side.shared_at
            yield flow.welcome(peer, state, device, self._map_shared(offer) if offer else None)
        yield from self._finish_if_complete(flow)

    def _finish_if_complete(self, flow: Flow) -> Iterator[Instruction]:
        if flow.complete:
            yield from flow.flush()
            self.phase = Phase.FINISHING
            yield Finish()

    # --- trouble ---

    def _failed(self, peer: bytes, reason: str) -> Iterator[Instruction]:
        state = self._peers.get(peer)
        if state:
            # The reason names the device: the producer wrote it for a reader.
            unsaid = f"device {state.side.device!r}: its producer failed and did not say why"
            yield from self.fail(reason or unsaid)

    def _misbehaved(self, peer: bytes, error: RemoteProtocolError) -> Iterator[Instruction]:
        state = self._peers.get(peer)
        if state is not None:
            yield from self.fail(f"device {state.side.device!r}: {error}")
        else:
            yield from self._admission.refuse(peer, error)
