# SPDX-License-Identifier: Apache-2.0
"""The core of one backup job. Pure: messages and facts in, instructions out; no clock, no I/O.

The process around it (main.py) carries out the instructions in order and
reports back what the store has written. Methods are lazy iterators, because
one message can make a thousand extents: exhaust each before the next call.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence

from vmapipe.archiver.device import DeviceState, Mark
from vmapipe.archiver.instructions import (
    Abandon,
    Begin,
    Finish,
    Instruction,
    Notice,
    Put,
    Send,
)
from vmapipe.archiver.jobspec import JobSpec, uuid_of
from vmapipe.archiver.peers import Lost, Peer, Peers, check_newcomer
from vmapipe.protocol import limits
from vmapipe.protocol.archiver_side import ArchiverSide, State
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.frames import Part
from vmapipe.protocol.messages import (
    ClusterFrame,
    DataFrame,
    End,
    Fail,
    Hello,
    Ping,
    Resume,
    RunFrame,
    SharedRun,
)
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Device, Header, encode_header
from vmapipe.vma.packer import PackedExtent, Packer

# Data that may be under way or queued for writing, all devices together: room
# for a few of the largest frames. More did not make a local backup quicker.
WINDOW_TOTAL_BYTES = 16 << 20
# `tick` comes several times a second. After a longer gap this process itself
# was stopped (Ctrl-Z, a stalled machine), and nobody else's silence counts.
_STOPPED_S = 5.0
# Strangers that are told of: a log that one of them can fill is no log.
_MAX_TOLD = 100


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
        self.devices: list[DeviceState] = []
        self._spec = spec
        self._count = len(spec.devices) or spec.expect
        self._job = spec.job
        self._peers = Peers()
        #: Messages of those that do not belong here.
        self.refused = 0
        self._map_shared = map_shared
        self._started = self._ticked = now
        self.uuid = spec.uuid
        self._packer: Packer[Mark] | None = None

    # --- facts that come in ---

    def start(self) -> Iterator[Instruction]:
        """Call it first: an archive of configs only needs no producer."""
        if not self._count:
            yield from self._begin()

    def receive(
        self, peer: bytes, parts: Sequence[Part], now: float, client: str = ""
    ) -> Iterator[Instruction]:
        """A message from `peer`, whoever that is; `client` if it has proved to be that."""
        if self._peers.is_ignored(peer):
            return
        state = self._peers.get(peer)
        side = state.side if state else ArchiverSide()
        try:
            message = side.receive(parts)
            if state is not None:
                state.heard = now
            match message:
                case ClusterFrame() | RunFrame() | SharedRun() if state and state.device:
                    yield from self._take(state.device, message)
                case Ping():
                    yield Send(peer, side.pong())
                case Hello():
                    yield from self._greet(
                        peer, Peer(side, now, client, attempt=message.attempt), message
                    )
                case Resume():
                    yield from self._resume(peer, message, client, now)
                case End() if state and state.device:
                    yield from self._end(state.device)
                case Fail(reason):
                    yield from self._failed(peer, reason)
        except RemoteProtocolError as error:
            yield Send(peer, side.refuse(error.code, error.reason))
            yield from self._misbehaved(peer, error)

    def written(self, marks: dict[int, Mark], dev_ids: set[int]) -> Iterator[Instruction]:
        """An extent that held data of `dev_ids` was written; `marks` are its notes."""
        for device in self.devices:
            if device.dev_id in dev_ids:
                device.written(marks.get(device.dev_id))
                yield from self._grant(device)

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

    @property
    def over(self) -> bool:
        """Nobody is to be told anything any more."""
        if self.phase is not Phase.DONE:
            return self.phase is Phase.FAILED
        return all(peer.side.state is State.CLOSED for peer in self._peers.all)

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
                f"{self._missing_producers()} did not come within {self._spec.start_timeout_s} s"
            )
        for state in self._peers.all:
            missed = state.miss(now - state.heard, self._spec.heartbeat_s, gathering=gathering)
            if isinstance(missed, Lost):
                yield from self.fail(missed.reason)
            elif missed:
                yield Notice(missed)

    # --- producers come ---

    def _greet(self, peer: bytes, newcomer: Peer, hello: Hello) -> Iterator[Instruction]:
        if self._job is not None and hello.job != self._job:
            raise RemoteProtocolError("unknown-job", "another job is made here")
        before = self._peers.of_session(hello.session, newcomer.client)
        if before is not None:
            yield from self._greet_again(peer, before, hello, newcomer.heard)
            return
        gathering = self.phase is Phase.GATHERING
        check_newcomer(hello, self._peers, self._spec.devices, gathering=gathering)
        self._job = hello.job
        self._peers.add(peer, newcomer)
        if len(self._peers) == self._count:
            # From now on a shorter limit may hold: it counts from here.
            for state in self._peers.all:
                state.heard = newcomer.heard
            yield from self._begin()

    def _greet_again(
        self, peer: bytes, before: bytes, hello: Hello, now: float
    ) -> Iterator[Instruction]:
        """Its connection was lost before WELCOME came."""
        moved = self._peers.move(before, peer, hello.attempt, now)
        if moved is None:
            return
        side = moved[0].side
        if (side.device, side.size_bytes) != (hello.device, hello.size):
            raise RemoteProtocolError("sequence", "HELLO again, and it says something else")
        if side.state is not State.WAITING:
            yield Send(peer, side.welcome_again())

    def _resume(
        self, peer: bytes, message: Resume, client: str, now: float
    ) -> Iterator[Instruction]:
        before = self._peers.of_session(message.session, client)
        if before is None or message.job != self._job:
            raise RemoteProtocolError(
                "unknown-session",
                "this archiver has no such session; if it was started again, what it had "
                "received is lost: begin the backup anew",
            )
        moved = self._peers.move(before, peer, message.attempt, now)
        if moved is None:
            return
        state, silence_s = moved
        yield Send(peer, state.side.resumed())
        if state.side.state is State.TOLD:
            yield Send(peer, state.side.done(self.uuid))
        yield Notice(f"device {state.side.device!r}: connected again after {silence_s:.0f} s")

    def _missing_producers(self) -> str:
        here = {p.side.device for p in self._peers.all}
        missing = [name for name in self._spec.devices if name not in here]
        if missing:
            return "the producer of device " + ", ".join(repr(name) for name in missing)
        return f"{self._count - len(here)} of {self._count} producers"

    def _begin(self) -> Iterator[Instruction]:
        peers = list(self._peers)
        if self._spec.devices:
            peers.sort(key=lambda item: self._spec.devices.index(item[1].side.device))
        devices = tuple(
            Device(index, state.side.device, state.side.size_bytes)
            for index, (_, state) in enumerate(peers, start=1)
        )
        self.uuid = self._spec.uuid or uuid_of(self._spec, devices)
        self._packer = Packer(self.uuid)
        header = Header(self.uuid, self._spec.ctime_s, devices, self._spec.configs)
        try:
            raw_header = encode_header(header)
        except LimitError as error:
            yield from self.fail(str(error))
            return
        self.phase = Phase.RUNNING
        yield Begin(header, raw_header)
        window = max(limits.MIN_WINDOW_BYTES, WINDOW_TOTAL_BYTES // max(1, len(devices)))
        frame_bytes = max(window // 2, limits.charge(1, limits.CLUSTER_BYTES))
        for (peer, state), device in zip(peers, devices, strict=True):
            offer = state.side.shared_at
            shared = self._map_shared(offer) if offer else None
            state.device = DeviceState(peer, state.side, device, window, shared)
            self.devices.append(state.device)
            first = not self._spec.in_order or device is devices[0]
            credit = window if first else 0
            yield Send(
                peer,
                state.side.welcome(
                    device.dev_id,
                    credit,
                    frame_bytes,
                    self._spec.heartbeat_s,
                    shared=shared is not None,
                    reconnect_s=self._spec.reconnect_s,
                ),
            )
        yield from self._finish_if_complete()

    # --- data ---

    def _take(self, device: DeviceState, message: DataFrame) -> Iterator[Instruction]:
        run = device.take(message)
        if self._packer is not None:
            for extent in self._packer.add(
                device.dev_id, run.first, run.clusters, run.masks, run.payload, device.mark()
            ):
                yield self._put(extent)
        yield from self._grant(device)

    def _put(self, extent: PackedExtent[Mark]) -> Put:
        held = {cluster[0] for cluster in extent.clusters}
        for device in self.devices:
            if device.dev_id in held:
                device.queued_extents += 1
        return Put(extent)

    def _grant(self, device: DeviceState) -> Iterator[Instruction]:
        if self._spec.in_order and not device.complete and device is not self._current():
            return
        parts = device.grant()
        if parts is not None:
            yield Send(device.peer, parts)

    def _current(self) -> DeviceState | None:
        return next((device for device in self.devices if not device.complete), None)

    def _end(self, device: DeviceState) -> Iterator[Instruction]:
        device.end()
        following = self._current()
        if self._spec.in_order and following is not None:
            yield from self._grant(following)
        yield from self._finish_if_complete()

    def _finish_if_complete(self) -> Iterator[Instruction]:
        if self._packer and all(device.complete for device in self.devices):
            for extent in self._packer.flush():
                yield self._put(extent)
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
            return
        self._peers.ignore(peer)
        self.refused += 1
        if self.refused <= _MAX_TOLD:
            yield Notice(f"refused a stranger: {error}")
        if self.refused == _MAX_TOLD:
            yield Notice("more strangers are refused without a word")
