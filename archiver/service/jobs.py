# SPDX-License-Identifier: Apache-2.0
"""One job of the service: its archiver's life, and the messages to its coordinator. Pure.

A `ServiceJob` answers each event of its archiver or its coordinator with a list of instructions.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.protocol import limits, service, transfer
from vmapipe.protocol.schema import Part
from vmapipe.protocol.service import Open
from vmapipe.protocol.transfer import Abort
from vmapipe.runtime.events import Event
from vmapipe.runtime.text import one_line

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import (
        BaseChosenEvent,
        JobEndFields,
        ServiceJobFields,
        UsageFields,
    )


class SendAnswer(NamedTuple):
    peer: bytes
    parts: list[Part]


class StartArchiver(NamedTuple):
    """An archiver for this job, that makes the archive `path`."""

    job: bytes
    request: Open
    path: str


class StopArchiver(NamedTuple):
    """Ask the job's archiver to give up."""

    job: bytes


class KillArchiver(NamedTuple):
    """End the job's archiver at once: it was asked to stop and has not."""

    job: bytes


class ReleaseJob(NamedTuple):
    """Nothing of this job is needed any more: remove its folder and its process entry."""

    job: bytes


class AttachProducer(NamedTuple):
    """From now on what this peer sends is passed to the job's archiver, and its answers back."""

    peer: bytes
    job: bytes


class ForwardMessage(NamedTuple):
    """Pass on the message that has just come from this peer."""

    peer: bytes


class DetachProducer(NamedTuple):
    peer: bytes


class DropPeer(NamedTuple):
    """End this peer's connection; it may come again."""

    peer: bytes


class LogEvent(NamedTuple):
    event: Event


ServiceInstruction = (
    SendAnswer
    | StartArchiver
    | StopArchiver
    | KillArchiver
    | ReleaseJob
    | AttachProducer
    | ForwardMessage
    | DetachProducer
    | DropPeer
    | LogEvent
)


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
# The reasons why devices are sent in full, together: a message holds no more than MAX_TOLD_BYTES.
_MAX_REASONS_BYTES = 32 << 10
# What is said of a base, for the same reason: with longer names than any machine's disks have, nothing is.
_MAX_BASE_CHARS = 48 << 10
# Connections of a job's that are dead by now, beside each device's own.
_MOST_SPARE = 8


class ServicePhase(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


class ArchivePlace(NamedTuple):
    """Where a client's archive would go, and what stands against it."""

    path: str
    exists: bool = False
    #: Most jobs of this client; 0: no limit of its own.
    max_jobs: int = 0
    quota_bytes: int = 0
    used_bytes: int = 0
    #: Other clients that may come, for whom there has to be room.
    others: frozenset[str] = frozenset()
    #: Why no archive there may be a base; empty: one may.
    why_no_base: str = ""


class Need(NamedTuple):
    """Resources that a job may take of the service: TCP connections, and descriptors with those."""

    connections: int
    descriptors: int


def need_of(devices: int) -> Need:
    """Its process (2), its coordinator, and each producer: a connection, and a socket to the
    process (2)."""
    producers = devices + spare_of(devices)
    return Need(1 + producers, 3 + 3 * producers)


def spare_of(devices: int) -> int:
    return min(_MOST_SPARE, devices // 2)


@dataclass(slots=True)
class ServiceJob:
    """`coordinator` is the peer that spoke last for it; `heard` when."""

    id: bytes
    client: str
    name: str
    devices: tuple[str, ...]
    place: ArchivePlace
    #: A coordinator that is silent so long is dead.
    heartbeat_s: int
    coordinator: bytes
    heard: float
    started: float
    phase: ServicePhase = ServicePhase.STARTING
    opened: bool = False
    #: What its archiver, or we, say of its base, if it asks for one.
    base: BaseChosenEvent | None = None
    begun: service.JobBegun | None = None
    stored: service.JobStored | None = None
    #: Once it has ended.
    verdict: service.JobStored | service.JobFailed | service.JobRefused | None = None
    #: Why the service ends it; empty: the archiver's own reason counts.
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
    _full: tuple[str, ...] = ()
    _base_damaged: bool = False
    #: Bytes of data that have come, when that was last checked, and when it last grew.
    _done: service.JobProgress | None = None
    _looked: service.JobProgress | None = None
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

    def coordinator_seen(self, peer: bytes, now: float) -> list[ServiceInstruction]:
        """Its coordinator has spoken; over a new connection it hears the job's state again."""
        self.heard = now
        instructions: list[ServiceInstruction] = [SendAnswer(peer, service.encode(service.Alive()))]
        anew = self.coordinator != peer
        if (anew or self.verdict is not None) and not self._may_retell(now):
            return instructions
        self.coordinator = peer
        if anew and self.opened:
            instructions.append(SendAnswer(peer, self._opened()))
            if self.begun is not None:
                instructions.append(SendAnswer(peer, service.encode(self.begun)))
        if self.verdict is not None:
            instructions.append(SendAnswer(peer, service.encode(self.verdict)))
        return instructions

    def coordinator_gone(self, peer: bytes) -> None:
        """The connection of `peer` has ended: if it is the coordinator's, nothing is sent there."""
        if self.coordinator == peer:
            self.coordinator = b""

    def _may_retell(self, now: float) -> bool:
        left = min(_RETELLINGS, self._retellings + now - self._retold)
        self._retold = now
        self._retellings = left - 1.0 if left >= 1.0 else left
        return left >= 1.0

    def _tell(self, parts: list[Part]) -> list[ServiceInstruction]:
        return [SendAnswer(self.coordinator, parts)] if self.coordinator else []

    def _opened(self) -> list[Part]:
        opened = service.Opened(limits.VERSION, self.heartbeat_s)
        if self.base is not None and len(repr(self.base)) < _MAX_BASE_CHARS:
            opened = opened._replace(
                base=bytes.fromhex(self.base["uuid"]),
                name=transfer.sayable(os.path.basename(self.base["archive"])),
                disks=tuple((each["name"], each["bytes"]) for each in self.base["devices"]),
                compares=self.base["compares"],
                why=self._said(self.base["reason"]),
            )
        return service.encode(opened)

    def _said(self, reason: str) -> str:
        """A reason without the folder, which is no client's concern."""
        folder = os.path.dirname(self.place.path)
        return said_reason(reason.replace(folder + "/", "").replace(folder, "the client's folder"))

    # --- its archiver ---

    def listening(self) -> list[ServiceInstruction]:
        """Its archiver is ready for producers."""
        if self.phase is not ServicePhase.STARTING:
            return []
        self.phase = ServicePhase.RUNNING
        self.opened = True
        opened = LogEvent({"event": "job-opened", **self._whose(), "devices": list(self.devices)})
        return [opened, *self._tell(self._opened())]

    def archiver_event(self, event: Event) -> list[ServiceInstruction]:
        """Any other event of its archiver."""
        instructions: list[ServiceInstruction] = []
        message = message_of(event, self.name)
        if event["event"] == "base-chosen":
            self.base = event
        elif event["event"] == "base":
            most = _MAX_REASONS_BYTES // max(1, len(event["devices"]))
            self._full = tuple(
                self._said(each["reason"]).encode()[:most].decode(errors="ignore")
                for each in event["devices"]
            )
        elif event["event"] == "base-damaged":
            self._base_damaged = True
        match message:
            case service.JobBegun():
                message = self.begun = message._replace(full=self._full)
            case service.JobStored():
                # Its process may live on for a producer that has not heard DONE yet.
                self.stored = self.verdict = message
            case service.JobProgress():
                self._done = message
            case service.JobNotice(text):
                noticed = LogEvent({"event": "job-notice", **self._whose(), "text": text})
                instructions.append(noticed)
        if message is not None:
            instructions += self._tell(service.encode(message))
        return instructions

    def stop(self, reason: str, now: float) -> list[ServiceInstruction]:
        """Let its archiver give up, if it has not yet ended or been told so."""
        if self.phase not in (ServicePhase.STARTING, ServicePhase.RUNNING):
            return []
        self.phase = ServicePhase.STOPPING
        self.reason = reason
        self.kill_at = now + STOP_S
        # Its archiver would say to the producers only that it was told to end.
        aborts = self._aborts(said_reason(reason)) if self.stored is None else []
        return [*aborts, StopArchiver(self.id)]

    def end(self, failure: str, usage: UsageFields, now: float) -> list[ServiceInstruction]:
        """Its archiver is gone. `failure` say why if it failed; `usage` is for the log."""
        self.phase = ServicePhase.ENDED
        self.ended = now
        whose = self._whose()
        ended: JobEndFields = {**usage, "seconds": round(now - self.started, 3)}
        if self.stored is not None:
            size = self.stored.stored
            return [LogEvent({"event": "job-stored", **whose, "stored_bytes": size, **ended})]
        reason = self.reason or failure
        said = self._said(reason) if self._base_damaged else said_reason(reason)
        self.verdict = (
            service.JobFailed(said, self._base_damaged)
            if self.opened
            else service.JobRefused("failed", said)
        )
        return [
            LogEvent({"event": "job-failed", **whose, "text": reason, **ended}),
            *self._tell(service.encode(self.verdict)),
            # An archiver that was killed could not tell its producers itself.
            *self._aborts(said),
        ]

    def _aborts(self, said: str) -> list[ServiceInstruction]:
        return [SendAnswer(peer, transfer.encode_control(Abort(said))) for peer in self.producers]

    def _whose(self) -> ServiceJobFields:
        return {"job": self.id.hex(), "client": self.client, "archive": self.place.path}

    # --- time ---

    def extend_deadlines(self, gap_s: float, now: float) -> None:
        """This process itself was stopped for `gap_s` and received nothing meanwhile."""
        self.heard = min(now, self.heard + gap_s)
        self.started = min(now, self.started + gap_s)
        self._progressed = min(now, self._progressed + gap_s)

    def overdue(self, now: float) -> str:
        """Why it is to be ended now; empty: it is not."""
        if self.phase is ServicePhase.STARTING and now - self.started > START_S:
            return f"its archiver was not ready within {START_S:.0f} s"
        if self.phase is ServicePhase.RUNNING and now - self.heard > self.heartbeat_s:
            return f"its coordinator has been silent for {self.heartbeat_s} s"
        if self._done != self._looked:
            self._looked, self._progressed = self._done, now
        if self.idle_s and not self._has_all() and now - self._progressed > self.idle_s:
            return f"nothing has come from its producers for {self.idle_s} s"
        return ""

    def _has_all(self) -> bool:
        """True while only the archiver has work left: its output may be slow."""
        if self.begun is None or self._done is None:
            return self.phase is not ServicePhase.RUNNING
        return all(
            done >= size for done, size in zip(self._done.done, self.begun.sizes, strict=False)
        )


def said_reason(reason: str) -> str:
    """Return a text fit for a message, and short: it is kept for a peer that does not read it."""
    return transfer.sayable(one_line(reason, _REASON_CHARS))


def message_of(event: Event, name: str) -> service.FromService | None:
    """`name` is the archive's, as the client knows it. None: nothing for a coordinator."""
    match event["event"]:
        case "begun":
            sizes = tuple(device["bytes"] for device in event["devices"])
            return service.JobBegun(bytes.fromhex(event["uuid"]), sizes)
        case "progress" if "devices" in event:
            done = tuple(device["done_bytes"] for device in event["devices"])
            zero = tuple(device["zero_bytes"] for device in event["devices"])
            same = tuple(device.get("unchanged_bytes", 0) for device in event["devices"])
            return service.JobProgress(
                event["stored_bytes"], event["plain_bytes"], done, zero, same if any(same) else ()
            )
        case "notice":
            return service.JobNotice(transfer.sayable(event["text"]))
        case "stored":
            uuid = bytes.fromhex(event["uuid"])
            # A service that encrypts has put .age behind it.
            encrypted = str(event["archive"]).endswith(f"{name}.age")
            return service.JobStored(
                f"{name}.age" if encrypted else name,
                uuid,
                event["stored_bytes"],
                event["plain_bytes"],
                event.get("base_bytes", 0),
                event.get("shared_bytes", 0),
            )
    return None
