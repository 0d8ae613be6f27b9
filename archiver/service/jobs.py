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
from vmapipe.runtime.text import one_line

# An archiver's process is ready in a fraction of a second; when twenty are started
# at once on a machine that is busy already, in half a minute.
START_S = 60.0
# Asked to stop, it removes its partial file, and ends; as for any child of ours.
STOP_S = 10.0
# So often a coordinator is told everything again, and then once a second: it may not be
# reading, and a bad network brings it over a new connection again and again.
_RETELLINGS = 8.0
# What a client is told of a reason, and hears again and again.
_REASON_CHARS = 1000
# Connections of a job's that are dead by now, beside each device's own.
_MOST_SPARE = 8


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
    #: Other clients may come, for whom there has to be room.
    shared: bool = False


class Need(NamedTuple):
    """What a job may take of the service: TCP connections, and descriptors with those."""

    connections: int
    descriptors: int


def need_of(devices: int) -> Need:
    """Its process (2), its coordinator, and each producer: a connection, and a socket to the
    process (2)."""
    producers = devices + spare_of(devices)
    return Need(1 + producers, 3 + 3 * producers)


def spare_of(devices: int) -> int:
    return min(_MOST_SPARE, devices // 2)


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
    #: Nothing may come from its producers for so long; 0: for ever.
    idle_s: int = 0
    #: How often its coordinator may be told everything again, and when that was so.
    _retellings: float = _RETELLINGS
    _retold: float = 0.0
    #: What of its data has come, when it was looked at last, and when it was more.
    _done: jobs.Progress | None = None
    _looked: jobs.Progress | None = None
    _progressed: float = 0.0

    def __post_init__(self) -> None:
        self._progressed = self._retold = self.started

    @property
    def need(self) -> Need:
        return need_of(len(self.devices))

    @property
    def most_producers(self) -> int:
        """Each device's, and some that came over connections that are dead by now."""
        return len(self.devices) + spare_of(len(self.devices))

    # --- its coordinator ---

    def meet(self, peer: bytes, now: float) -> Iterator[Instruction]:
        """Its coordinator has spoken; over a new connection it is told again what holds."""
        self.heard = now
        yield Send(peer, jobs.encode(jobs.Alive()))
        anew = self.coordinator != peer
        if (anew or self.verdict is not None) and not self._may_retell(now):
            return
        self.coordinator = peer
        if anew and self.opened:
            yield Send(peer, self._opened())
            if self.begun is not None:
                yield Send(peer, jobs.encode(self.begun))
        if self.verdict is not None:
            yield Send(peer, jobs.encode(self.verdict))

    def left(self, peer: bytes) -> None:
        """Its coordinator's connection has ended: nobody hears what is said there."""
        if self.coordinator == peer:
            self.coordinator = b""

    def _may_retell(self, now: float) -> bool:
        left = min(_RETELLINGS, self._retellings + now - self._retold)
        self._retold = now
        self._retellings = left - 1.0 if left >= 1.0 else left
        return left >= 1.0

    def _tell(self, parts: list[Part]) -> Iterator[Send]:
        if self.coordinator:
            yield Send(self.coordinator, parts)

    def _opened(self) -> list[Part]:
        return jobs.encode(jobs.Opened(limits.VERSION, self.heartbeat_s))

    # --- its archiver ---

    def listening(self) -> Iterator[Instruction]:
        """Its archiver is ready for producers."""
        if self.phase is Phase.STARTING:
            self.phase = Phase.RUNNING
            self.opened = True
            yield self._log("job-opened", devices=list(self.devices))
            yield from self._tell(self._opened())

    def hear(self, event: Event) -> Iterator[Instruction]:
        """Any other event of its archiver."""
        told = message_of(event, self.name)
        match told:
            case jobs.Begun():
                self.begun = told
            case jobs.Stored():
                # Its process may live on for a producer that has to hear of it.
                self.stored = self.verdict = told
            case jobs.Progress():
                self._done = told
            case jobs.Notice(text):
                yield self._log("job-notice", text=text)
        if told is not None:
            yield from self._tell(jobs.encode(told))

    def stop(self, reason: str, now: float) -> Iterator[Instruction]:
        """Let its archiver give up, if it has not yet ended nor been told so."""
        if self.phase in (Phase.STARTING, Phase.RUNNING):
            self.phase = Phase.STOPPING
            self.reason = reason
            self.kill_at = now + STOP_S
            if self.stored is None:
                # Before its archiver tells them only that it was told to end.
                yield from self._abort(said_reason(reason))
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
        said = said_reason(reason)
        self.verdict = jobs.Failed(said) if self.opened else jobs.Refused("failed", said)
        yield from self._tell(jobs.encode(self.verdict))
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
        self._progressed = min(now, self._progressed + gap_s)

    def overdue(self, now: float) -> str:
        """Why it is to be ended now; empty: it is not."""
        if self.phase is Phase.STARTING and now - self.started > START_S:
            return f"its archiver was not ready within {START_S:.0f} s"
        if self.phase is Phase.RUNNING and now - self.heard > self.heartbeat_s:
            return f"its coordinator has been silent for {self.heartbeat_s} s"
        if self._done != self._looked:
            self._looked, self._progressed = self._done, now
        if self.idle_s and not self._has_all() and now - self._progressed > self.idle_s:
            return f"nothing has come from its producers for {self.idle_s} s"
        return ""

    def _has_all(self) -> bool:
        """What is still to be done is the archiver's: its output may be slow."""
        if self.begun is None or self._done is None:
            return self.phase is not Phase.RUNNING
        return all(
            done >= size for done, size in zip(self._done.done, self.begun.sizes, strict=False)
        )


def said_reason(reason: str) -> str:
    """As a message has it, and short: it is kept for whoever does not read it."""
    return frames.sayable(one_line(reason, _REASON_CHARS))
