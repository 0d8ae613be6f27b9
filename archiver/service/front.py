# SPDX-License-Identifier: Apache-2.0
"""The core of the service. Pure: an event in, a list of instructions out; no clock, no I/O.

It opens jobs, knows which client owns each, and says to which archiver a
producer's messages go. It does not look into these messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.archiver.service.admission import ServiceLimits, ServiceStorage, admit
from vmapipe.archiver.service.jobs import (
    STOP_S,
    DropPeer,
    ForwardMessage,
    KillArchiver,
    LogEvent,
    ReleaseJob,
    SendAnswer,
    ServiceInstruction,
    ServiceJob,
    ServicePhase,
    StartArchiver,
    said_reason,
)
from vmapipe.archiver.service.peers import (
    ForwardedProducer,
    ForwardedProducers,
    LogLimit,
    Openings,
    RejectedPeers,
    UnassignedPeers,
)
from vmapipe.protocol import service
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.schema import Part
from vmapipe.runtime.events import Event
from vmapipe.runtime.text import one_line

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import BaseChosenEvent, JobRefusedEvent, UsageFields

# How long the last answers of an archiver that has ended may take to arrive.
DRAIN_S = 2.0
# What the log has of a refused name and of the reason; a valid name has 200 bytes at most.
_LOGGED_NAME_CHARS = 200
_LOGGED_REASON_CHARS = 300
# How many ended jobs are remembered, for coordinators that ask again.
_MAX_REMEMBERED = 1024
# After a longer gap between two `ServiceTicked` this process itself was stopped: see job/job.py.
_STOPPED_S = 5.0


class PeerMessage(NamedTuple):
    """A message from `peer`, which has proved to be `client` (empty: no keys are asked for)."""

    peer: bytes
    client: str
    parts: Sequence[Part]
    now: float


class PeerGone(NamedTuple):
    """The connection of `peer` has ended; what it had sent may still come."""

    peer: bytes
    now: float


class AttachFailed(NamedTuple):
    """No descriptor was left to attach this producer to its job's archiver."""

    peer: bytes
    job: bytes


class ArchiverAnswer(NamedTuple):
    """A message from an archiver to one of its producers."""

    peer: bytes
    parts: Sequence[Part]


class ArchiverEvent(NamedTuple):
    """An event of a job's archiver, as it reports them to its parent."""

    job: bytes
    event: Event


class ArchiverEnded(NamedTuple):
    """A job's archiver is gone. `reason` say why if it failed; `usage` is for the log."""

    job: bytes
    reason: str
    usage: UsageFields
    now: float


class ServiceTicked(NamedTuple):
    """Sent about once a second. `now`, as everywhere: a monotonic clock's seconds."""

    now: float


class StopAsked(NamedTuple):
    """No new job is opened from now on."""

    reason: str


class StopNow(NamedTuple):
    """All running jobs are ended."""

    reason: str
    now: float


class ClientRevoked(NamedTuple):
    """The key of a client is no longer accepted: its jobs are ended."""

    client: str
    now: float


FrontEvent = (
    PeerMessage
    | PeerGone
    | AttachFailed
    | ArchiverAnswer
    | ArchiverEvent
    | ArchiverEnded
    | ServiceTicked
    | StopAsked
    | StopNow
    | ClientRevoked
)


class Front:
    """All jobs of a service. `now` is any monotonic clock, in seconds."""

    def __init__(self, bounds: ServiceLimits, facts: ServiceStorage, now: float) -> None:
        self.jobs: dict[bytes, ServiceJob] = {}
        self.producers = ForwardedProducers()
        self._limits = bounds
        self._facts = facts
        self._stopping = ""
        self._ticked = now
        self._rejected = RejectedPeers()
        self._unassigned = UnassignedPeers(bounds.most_unassigned)
        self._log_limit = LogLimit()
        self._openings = Openings()

    @property
    def running(self) -> list[ServiceJob]:
        return [job for job in self.jobs.values() if job.phase is not ServicePhase.ENDED]

    @property
    def idle(self) -> bool:
        """No archiver runs, and no last answer of one is under way."""
        return all(job.released for job in self.jobs.values())

    def handle(self, event: FrontEvent) -> list[ServiceInstruction]:
        """The one door: each event comes in here; the result is to be carried out in order."""
        instructions: list[ServiceInstruction] = []
        match event:
            case PeerMessage():
                instructions = self._received(event)
            case ArchiverAnswer(peer, parts):
                instructions = self.producers.answer(peer, parts)
            case ArchiverEvent(job_id, {"event": "listening"}):
                instructions = self.jobs[job_id].listening()
            case ArchiverEvent(job_id, report):
                instructions = self._reported(self.jobs[job_id], report)
            case ArchiverEnded(job_id, reason, usage, now):
                job = self.jobs[job_id]
                if job.stored is not None:
                    self._openings.stored(job.client)
                instructions = job.end(reason, usage, now)
            case ServiceTicked(now):
                instructions = self._pass_time(now)
            case PeerGone(peer, now):
                self._gone(peer, now)
            case AttachFailed(peer, job_id):
                self.producers.forget(self.jobs[job_id], peer)
                error = RemoteProtocolError("busy", "the service has no open files left; try later")
                instructions = [SendAnswer(peer, _refusal(error))]
            case StopAsked(reason):
                self._stopping = reason
            case StopNow(reason, now):
                instructions = [each for job in self.running for each in job.stop(reason, now)]
            case ClientRevoked(client, now):
                instructions = self._revoke(client, now)
        return instructions

    # --- peers ---

    def _received(self, message: PeerMessage) -> list[ServiceInstruction]:
        peer, client, parts, now = message
        producer = self.producers.by_peer.get(peer)
        if producer is not None:
            if producer.client != client:
                return []
            producer.heard = now
            return self._forward(peer, producer, parts, now)
        excess = self._unassigned.add(peer, client)
        instructions: list[ServiceInstruction] = [] if excess is None else [DropPeer(excess)]
        try:
            return instructions + self._answer(peer, client, parts, now)
        except RemoteProtocolError as error:
            return instructions + self._reject(peer, client, error, now)

    def _answer(
        self, peer: bytes, client: str, parts: Sequence[Part], now: float
    ) -> list[ServiceInstruction]:
        """Raises RemoteProtocolError before anything has changed."""
        name, fields = service.unpack_control(parts)
        match service.read_of_coordinator(name, fields):
            case service.Open() as request:
                return self._open(peer, client, request, now)
            case service.Beat(job_id):
                return self._coordinator_seen(self._job_of(job_id, client), peer, now)
            case service.JobCancel(job_id, reason):
                job = self._job_of(job_id, client)
                return [*self._coordinator_seen(job, peer, now), *job.stop(reason, now)]
            case None:
                return self._attach(peer, client, name, fields.get("job"), now)

    def _gone(self, peer: bytes, now: float) -> None:
        self._unassigned.remove(peer)
        producer = self.producers.by_peer.get(peer)
        if producer is not None:
            producer.gone = now
        for job in self.jobs.values():
            job.coordinator_gone(peer)

    def _revoke(self, client: str, now: float) -> list[ServiceInstruction]:
        reason = f"the key of client {client!r} was revoked"
        instructions = [
            each for job in self.running if job.client == client for each in job.stop(reason, now)
        ]
        for peer in self._unassigned.of(client):
            self._unassigned.remove(peer)
            instructions.append(DropPeer(peer))
        return instructions

    def _reject(
        self, peer: bytes, client: str, error: RemoteProtocolError, now: float
    ) -> list[ServiceInstruction]:
        if self._rejected.add(peer):
            lines = self._rejected.report(client, one_line(str(error)), now)
            return [SendAnswer(peer, _refusal(error)), *map(_notice, lines)]
        return [] if self._unassigned.may_be_refused(peer) else [DropPeer(peer)]

    # --- coordinators ---

    def _open(
        self, peer: bytes, client: str, request: service.Open, now: float
    ) -> list[ServiceInstruction]:
        if request.job in self.jobs:
            return self._coordinator_seen(self._job_of(request.job, client), peer, now)
        try:
            if self._stopping:
                raise RemoteProtocolError("stopping", self._stopping)
            place = admit(client, request, self.running, self._limits, self._facts)
            wait_s = self._openings.wait_s(client, now)
            if wait_s:
                raise RemoteProtocolError(
                    "too-often",
                    "this client has opened many jobs that stored nothing; the next one may be "
                    f"opened in {wait_s} s",
                )
        except RemoteProtocolError as error:
            return self._refuse_job(peer, client, request.name, error, now)
        self._unassigned.remove(peer)
        self.jobs[request.job] = ServiceJob(
            request.job,
            client,
            request.name,
            request.devices,
            place,
            self._limits.heartbeat_s,
            coordinator=peer,
            heard=now,
            started=now,
            idle_s=self._limits.idle_s,
            base=_no_base(place.why_no_base) if request.base and place.why_no_base else None,
        )
        if place.why_no_base:
            request = request._replace(base=False)
        return [StartArchiver(request.job, request, place.path)]

    def _refuse_job(
        self, peer: bytes, client: str, name: str, error: RemoteProtocolError, now: float
    ) -> list[ServiceInstruction]:
        instructions: list[ServiceInstruction] = []
        if self._log_limit.allows(client, now):
            event: JobRefusedEvent = {
                "event": "job-refused",
                "client": client,
                "archive": one_line(name, _LOGGED_NAME_CHARS),
                "code": error.code,
                "text": one_line(error.reason, _LOGGED_REASON_CHARS),
            }
            instructions.append(LogEvent(event))
        may_hear = self._unassigned.may_be_refused(peer)
        instructions.append(SendAnswer(peer, _refusal(error)) if may_hear else DropPeer(peer))
        return instructions

    def _coordinator_seen(
        self, job: ServiceJob, peer: bytes, now: float
    ) -> list[ServiceInstruction]:
        before = job.coordinator
        instructions = job.coordinator_seen(peer, now)
        if job.coordinator == peer:
            self._unassigned.remove(peer)
            if before not in (b"", peer):
                instructions.append(DropPeer(before))
        return instructions

    def _job_of(self, job_id: object, client: str) -> ServiceJob:
        """Raises RemoteProtocolError; another client's job gets the same text as none at all."""
        job = self.jobs.get(job_id) if isinstance(job_id, bytes) else None
        if job is None or job.client != client:
            raise RemoteProtocolError(
                "unknown-job", "there is no such job here; was the service started again?"
            )
        return job

    # --- producers ---

    def _attach(
        self, peer: bytes, client: str, name: str, job_id: object, now: float
    ) -> list[ServiceInstruction]:
        if name not in ("HELLO", "RESUME"):
            raise RemoteProtocolError("unknown-job", "no session of this peer is known here")
        try:
            job = self._job_of(job_id, client)
        except RemoteProtocolError as error:
            code = "unknown-session" if name == "RESUME" else error.code
            raise RemoteProtocolError(code, error.reason) from error
        if job.phase is not ServicePhase.RUNNING:
            raise RemoteProtocolError("unknown-job", f"the job is {job.phase.value}")
        self._unassigned.remove(peer)
        return [*self.producers.attach(job, peer, client, now), ForwardMessage(peer)]

    def _forward(
        self, peer: bytes, producer: ForwardedProducer, parts: Sequence[Part], now: float
    ) -> list[ServiceInstruction]:
        """A message that is not passed on is lost, and its job with it if that was data."""
        if producer.admits(len(parts), sum(memoryview(part).nbytes for part in parts)):
            return [ForwardMessage(peer)]
        job = self.jobs[producer.job]
        if len(parts) == 1 or job.phase is not ServicePhase.RUNNING:
            return []
        error = RemoteProtocolError("credit", "a producer's data exceeds the credit by far")
        return [SendAnswer(peer, _refusal(error)), *job.stop(error.reason, now)]

    # --- archivers ---

    def _reported(self, job: ServiceJob, event: Event) -> list[ServiceInstruction]:
        return [
            each
            for each in job.archiver_event(event)
            if not isinstance(each, LogEvent) or self._log_limit.allows(job.client, self._ticked)
        ]

    # --- time ---

    def _pass_time(self, now: float) -> list[ServiceInstruction]:
        gap_s, self._ticked = now - self._ticked, now
        instructions: list[ServiceInstruction] = []
        for job in list(self.jobs.values()):
            if gap_s > _STOPPED_S:
                job.extend_deadlines(gap_s, now)
            instructions += self._poll(job, now)
        instructions += self._enforce_quotas(now)
        instructions += map(_notice, self._rejected.report_rest(now))
        instructions += map(_notice, self._log_limit.report_rest(now))
        return instructions

    def _poll(self, job: ServiceJob, now: float) -> list[ServiceInstruction]:
        instructions: list[ServiceInstruction] = [*self.producers.detach_gone(job, now - DRAIN_S)]
        overdue = job.overdue(now)
        if overdue:
            instructions += job.stop(overdue, now)
        elif job.phase is ServicePhase.STOPPING and now > job.kill_at:
            job.kill_at = now + STOP_S
            instructions.append(KillArchiver(job.id))
        elif job.phase is ServicePhase.ENDED:
            if not job.released and now - job.ended > DRAIN_S:
                job.released = True
                instructions += [*self.producers.detach_all(job), ReleaseJob(job.id)]
            forget = now - job.ended > self._limits.heartbeat_s or len(self.jobs) > _MAX_REMEMBERED
            if job.released and forget:
                del self.jobs[job.id]
        return instructions

    def _enforce_quotas(self, now: float) -> list[ServiceInstruction]:
        """A client above its quota loses its youngest job, and in a second the next."""
        running = [
            job
            for job in self.running
            if job.place.quota_bytes and job.phase is ServicePhase.RUNNING
        ]
        return [
            each
            for job in {job.client: job for job in running}.values()
            if self._facts.used_bytes(job.client) > job.place.quota_bytes
            for each in job.stop(
                f"the client's quota of {job.place.quota_bytes} bytes is used up", now
            )
        ]


def _refusal(error: RemoteProtocolError) -> list[Part]:
    return service.encode(service.JobRefused(error.code, said_reason(error.reason)))


def _no_base(reason: str) -> BaseChosenEvent:
    return {
        "event": "base-chosen",
        "archive": "",
        "uuid": "",
        "devices": [],
        "compares": False,
        "reason": reason,
    }


def _notice(text: str) -> LogEvent:
    return LogEvent({"event": "notice", "text": text})
