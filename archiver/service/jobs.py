# SPDX-License-Identifier: Apache-2.0
"""One job of the service: its archiver's life, and what its coordinator is told of it. Pure.

Methods that give instructions are lazy iterators: exhaust each before the next call.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from vmapipe.archiver.service.instructions import Instruction, Log, Send, Stop
from vmapipe.archiver.service.telling import message_of
from vmapipe.protocol import frames, jobs, limits
from vmapipe.protocol.messages import Abort
from vmapipe.protocol.packing import Part
from vmapipe.runtime.events import Event

# An archiver's process is ready in a fraction of a second; when twenty are started
# at once on a machine that is busy already, in half a minute.
START_S = 60.0
# Asked to stop, it removes its partial file, and ends; as for any child of ours.
STOP_S = 10.0


class Phase(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


class Place(NamedTuple):
    """Where a client's archive would go, and what stands against it."""

    path: str
    exists: bool = False
    #: Of this client; 0: no limit of its own.
    max_jobs: int = 0
    quota_bytes: int = 0
    used_bytes: int = 0


class Room(NamedTuple):
    """What the host has left."""

    free_bytes: int
    memory_bytes: int


@dataclass(slots=True)
class ServiceJob:
    """`coordinator` is the peer that spoke last for it; `heard` when."""

    id: bytes
    client: str
    name: str
    devices: tuple[str, ...]
    place: Place
    #: A coordinator that is silent so long is dead.
    heartbeat_s: int
    coordinator: bytes
    heard: float
    started: float
    phase: Phase = Phase.STARTING
    opened: bool = False
    begun: jobs.Begun | None = None
    stored: jobs.Stored | None = None
    #: Once it has ended.
    verdict: jobs.Stored | jobs.Failed | jobs.Refused | None = None
    #: Why we end it; the archiver's own words otherwise.
    reason: str = ""
    kill_at: float = float("inf")
    ended: float = 0.0
    released: bool = False
    producers: set[bytes] = field(default_factory=set)

    @property
    def most_producers(self) -> int:
        """Each device's, and as many that came over connections that are dead by now."""
        return 2 * len(self.devices) + 8

    # --- its coordinator ---

    def meet(self, peer: bytes, now: float) -> Iterator[Instruction]:
        """Its coordinator has spoken; over a new connection it is told again what holds."""
        self.heard = now
        anew, self.coordinator = self.coordinator != peer, peer
        yield Send(peer, jobs.encode(jobs.Alive()))
        if anew and self.opened:
            yield Send(peer, self._opened())
            if self.begun is not None:
                yield Send(peer, jobs.encode(self.begun))
        if self.verdict is not None:
            yield Send(peer, jobs.encode(self.verdict))

    def _opened(self) -> list[Part]:
        return jobs.encode(jobs.Opened(limits.VERSION, self.heartbeat_s))

    # --- its archiver ---

    def listening(self) -> Iterator[Instruction]:
        """Its archiver is ready for producers."""
        if self.phase is Phase.STARTING:
            self.phase = Phase.RUNNING
            self.opened = True
            yield self._log("job-opened", devices=list(self.devices))
            yield Send(self.coordinator, self._opened())

    def told(self, event: Event) -> Iterator[Instruction]:
        """Any other event of its archiver."""
        told = message_of(event, self.name)
        match told:
            case jobs.Begun():
                self.begun = told
            case jobs.Stored():
                # Its process may live on for a producer that has to hear of it.
                self.stored = self.verdict = told
            case jobs.Notice(text):
                yield self._log("job-notice", text=text)
        if told is not None:
            yield Send(self.coordinator, jobs.encode(told))

    def stop(self, reason: str, now: float) -> Iterator[Instruction]:
        """Let its archiver give up, if it has not yet ended nor been told so."""
        if self.phase in (Phase.STARTING, Phase.RUNNING):
            self.phase = Phase.STOPPING
            self.reason = reason
            self.kill_at = now + STOP_S
            if self.stored is None:
                # Before its archiver tells them only that it was told to end.
                yield from self._abort(frames.sayable(reason))
            yield Stop(self.id)

    def end(self, words: str, usage: Event, now: float) -> Iterator[Instruction]:
        """Its archiver is gone. `words` say why if it failed; `usage` is for the log."""
        self.phase = Phase.ENDED
        self.ended = now
        usage = {**usage, "seconds": round(now - self.started, 3)}
        if self.stored is not None:
            yield self._log("job-stored", stored_bytes=self.stored.stored, **usage)
            return
        reason = self.reason or words
        yield self._log("job-failed", text=reason, **usage)
        said = frames.sayable(reason)
        self.verdict = jobs.Failed(said) if self.opened else jobs.Refused("failed", said)
        yield Send(self.coordinator, jobs.encode(self.verdict))
        # One that was killed could not tell them itself.
        yield from self._abort(said)

    def _abort(self, said: str) -> Iterator[Send]:
        for peer in self.producers:
            yield Send(peer, frames.encode_control(Abort(said)))

    def _log(self, event: str, **more: object) -> Log:
        whose = {"job": self.id.hex(), "client": self.client, "archive": self.place.path}
        return Log({"event": event, **whose, **more})

    # --- time ---

    def excuse(self, gap_s: float, now: float) -> None:
        """We ourselves were stopped for so long, and heard nobody."""
        self.heard = min(now, self.heard + gap_s)
        self.started = min(now, self.started + gap_s)

    def overdue(self, now: float) -> str:
        """Why it is to be ended now; empty: it is not."""
        if self.phase is Phase.STARTING and now - self.started > START_S:
            return f"its archiver was not ready within {START_S:.0f} s"
        if self.phase is Phase.RUNNING and now - self.heard > self.heartbeat_s:
            return f"its coordinator has been silent for {self.heartbeat_s} s"
        return ""
