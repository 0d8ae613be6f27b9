# SPDX-License-Identifier: Apache-2.0
"""The core of the service. Pure: messages and facts in, instructions out; no clock, no I/O.

It opens jobs, knows whose they are, and says to which archiver a producer's
messages go. What is in them it does not know. Methods are lazy iterators:
exhaust each before the next call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    ServiceLimits,
    ServicePhase,
    ServiceStorage,
    StartArchiver,
    admit,
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
from vmapipe.protocol import jobs
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.packing import Part
from vmapipe.runtime.events import Event
from vmapipe.runtime.text import one_line

# Last answers of an archiver that has ended may still be under way to us.
DRAIN_S = 2.0
# Of a refusal; a name that a job can have has 200 bytes at most.
_LOGGED_NAME_CHARS = 200
_LOGGED_REASON_CHARS = 300
# Ended jobs that are remembered, for coordinators that ask again.
_MAX_REMEMBERED = 1024
# See archiver/job/job.py: after a longer gap we ourselves were stopped.
_STOPPED_S = 5.0


class Front:
    """All jobs of a service. `now` is any monotonic clock, in seconds."""

    def __init__(self, bounds: ServiceLimits, facts: ServiceStorage, now: float) -> None:
        self.jobs: dict[bytes, ServiceJob] = {}
        self.producers = ForwardedProducers()
        self._limits = bounds
        self._facts = facts
        self._stopping = ""
        self._ticked = now
        self._strangers = RejectedPeers()
        self._visitors = UnassignedPeers(bounds.most_visitors)
        self._log_limit = LogLimit()
        self._openings = Openings()

    @property
    def running(self) -> list[ServiceJob]:
        return [job for job in self.jobs.values() if job.phase is not ServicePhase.ENDED]

    @property
    def idle(self) -> bool:
        """No archiver runs, and nobody waits for its last words."""
        return all(job.released for job in self.jobs.values())

    # --- messages ---

    def receive(
        self, peer: bytes, client: str, parts: Sequence[Part], now: float
    ) -> Iterator[ServiceInstruction]:
        """A message from `peer`, who has proved to be `client` (empty: nobody has to)."""
        producer = self.producers.by_peer.get(peer)
        if producer is not None:
            if producer.client == client:
                producer.heard = now
                yield from self._pass_on(peer, producer, parts, now)
            return
        gone = self._visitors.met(peer, client)
        if gone is not None:
            yield DropPeer(gone)
        try:
            name, fields = jobs.unpack_control(parts)
            message = jobs.read_of_coordinator(name, fields)
            match message:
                case jobs.Open():
                    yield from self._open(peer, client, message, now)
                case jobs.Beat(job_id):
                    yield from self._meet(self._job_of(job_id, client), peer, now)
                case jobs.Cancel(job_id, reason):
                    job = self._job_of(job_id, client)
                    yield from self._meet(job, peer, now)
                    yield from job.stop(reason, now)
                case None:
                    yield from self._attach(peer, client, name, fields.get("job"), now)
        except RemoteProtocolError as error:
            yield from self._refuse_stranger(peer, client, error, now)

    def left(self, peer: bytes, now: float) -> None:
        """This peer's connection has ended; what it had sent may still come."""
        self._visitors.left(peer)
        producer = self.producers.by_peer.get(peer)
        if producer is not None:
            producer.gone = now
        for job in self.jobs.values():
            job.left(peer)

    def unattached(self, peer: bytes, job_id: bytes) -> Iterator[ServiceInstruction]:
        """There was no descriptor for this producer."""
        self.producers.forget(self.jobs[job_id], peer)
        error = RemoteProtocolError("busy", "the service has no open files left; try later")
        yield SendAnswer(peer, _refusal(error))

    def answer(self, peer: bytes, parts: Sequence[Part]) -> Iterator[ServiceInstruction]:
        """A message from the archiver of this producer."""
        yield from self.producers.answer(peer, parts)

    # --- archivers ---

    def listening(self, job_id: bytes) -> Iterator[ServiceInstruction]:
        """A job's archiver is ready for producers."""
        yield from self.jobs[job_id].listening()

    def told(self, job_id: bytes, event: Event) -> Iterator[ServiceInstruction]:
        """Any other event of a job's archiver."""
        job = self.jobs[job_id]
        for instruction in job.hear(event):
            if isinstance(instruction, LogEvent) and not self._log_limit.may_say(
                job.client, self._ticked
            ):
                continue
            yield instruction

    def ended(
        self, job_id: bytes, words: str, usage: Event, now: float
    ) -> Iterator[ServiceInstruction]:
        """A job's archiver is gone. `words` say why if it failed; `usage` is for the log."""
        job = self.jobs[job_id]
        if job.stored is not None:
            self._openings.stored(job.client)
        yield from job.end(words, usage, now)

    # --- time, and the end ---

    def tick(self, now: float) -> Iterator[ServiceInstruction]:
        """Time has passed: call it about once a second."""
        gap, self._ticked = now - self._ticked, now
        for job in list(self.jobs.values()):
            if gap > _STOPPED_S:
                job.excuse(gap, now)
            yield from self._look_at(job, now)
        yield from self._hold_quotas(now)
        yield from map(_notice, self._strangers.more(now))
        yield from map(_notice, self._log_limit.more(now))

    def stop(self, reason: str) -> None:
        """No new jobs from now on."""
        self._stopping = reason

    def fail_all(self, reason: str, now: float) -> Iterator[ServiceInstruction]:
        for job in self.running:
            yield from job.stop(reason, now)

    def revoke(self, client: str, now: float) -> Iterator[ServiceInstruction]:
        """A client may no longer come: what it was sending is given up."""
        for job in self.running:
            if job.client == client:
                yield from job.stop(f"the key of client {client!r} was revoked", now)
        for peer in self._visitors.of(client):
            self._visitors.left(peer)
            yield DropPeer(peer)

    # --- coordinators ---

    def _open(
        self, peer: bytes, client: str, request: jobs.Open, now: float
    ) -> Iterator[ServiceInstruction]:
        known = self.jobs.get(request.job)
        if known is not None:
            yield from self._meet(self._job_of(request.job, client), peer, now)
            return
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
            if self._log_limit.may_say(client, now):
                yield LogEvent(
                    {
                        "event": "job-refused",
                        "client": client,
                        "archive": one_line(request.name, _LOGGED_NAME_CHARS),
                        "code": error.code,
                        "text": one_line(error.reason, _LOGGED_REASON_CHARS),
                    }
                )
            if self._visitors.may_hear(peer):
                yield SendAnswer(peer, _refusal(error))
            else:
                yield DropPeer(peer)
            return
        self._visitors.left(peer)
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
        )
        yield StartArchiver(request.job, request, place.path)

    def _meet(self, job: ServiceJob, peer: bytes, now: float) -> Iterator[ServiceInstruction]:
        before = job.coordinator
        yield from job.meet(peer, now)
        if job.coordinator == peer:
            self._visitors.left(peer)
            if before not in (b"", peer):
                yield DropPeer(before)

    # --- producers ---

    def _attach(
        self, peer: bytes, client: str, name: str, job_id: object, now: float
    ) -> Iterator[ServiceInstruction]:
        if name not in ("HELLO", "RESUME"):
            raise RemoteProtocolError("unknown-job", "no session of this peer is known here")
        try:
            job = self._job_of(job_id, client)
        except RemoteProtocolError as error:
            code = "unknown-session" if name == "RESUME" else error.code
            raise RemoteProtocolError(code, error.reason) from error
        if job.phase is not ServicePhase.RUNNING:
            raise RemoteProtocolError("unknown-job", f"the job is {job.phase.value}")
        self._visitors.left(peer)
        yield from self.producers.attach(job, peer, client, now)
        yield ForwardMessage(peer)

    def _job_of(self, job_id: object, client: str) -> ServiceJob:
        """Raises RemoteProtocolError, in the same words for no job and somebody else's."""
        job = self.jobs.get(job_id) if isinstance(job_id, bytes) else None
        if job is None or job.client != client:
            raise RemoteProtocolError(
                "unknown-job", "there is no such job here; was the service started again?"
            )
        return job

    def _pass_on(
        self, peer: bytes, producer: ForwardedProducer, parts: Sequence[Part], now: float
    ) -> Iterator[ServiceInstruction]:
        """What is not passed on is lost, and its job with it where that was data."""
        if producer.admits(len(parts), sum(memoryview(part).nbytes for part in parts)):
            yield ForwardMessage(peer)
            return
        producer.dropped += 1
        job = self.jobs[producer.job]
        if len(parts) == 1 or job.phase is not ServicePhase.RUNNING:
            return
        error = RemoteProtocolError("credit", "a producer's data exceeds the credit by far")
        yield SendAnswer(peer, _refusal(error))
        yield from job.stop(error.reason, now)

    def _refuse_stranger(
        self, peer: bytes, client: str, error: RemoteProtocolError, now: float
    ) -> Iterator[ServiceInstruction]:
        if self._strangers.is_new(peer):
            yield SendAnswer(peer, _refusal(error))
            yield from map(_notice, self._strangers.refused(client, one_line(str(error)), now))
        elif not self._visitors.may_hear(peer):
            yield DropPeer(peer)

    # --- time ---

    def _look_at(self, job: ServiceJob, now: float) -> Iterator[ServiceInstruction]:
        yield from self.producers.detach_gone(job, now - DRAIN_S)
        overdue = job.overdue(now)
        if overdue:
            yield from job.stop(overdue, now)
        elif job.phase is ServicePhase.STOPPING and now > job.kill_at:
            job.kill_at = now + STOP_S
            yield KillArchiver(job.id)
        elif job.phase is ServicePhase.ENDED:
            if not job.released and now - job.ended > DRAIN_S:
                job.released = True
                yield from self.producers.detach_all(job)
                yield ReleaseJob(job.id)
            forget = now - job.ended > self._limits.heartbeat_s or len(self.jobs) > _MAX_REMEMBERED
            if job.released and forget:
                del self.jobs[job.id]

    def _hold_quotas(self, now: float) -> Iterator[ServiceInstruction]:
        """A client above its quota loses its youngest job, and in a second the next."""
        running = [
            job
            for job in self.running
            if job.place.quota_bytes and job.phase is ServicePhase.RUNNING
        ]
        for job in {job.client: job for job in running}.values():
            if self._facts.used_bytes(job.client) > job.place.quota_bytes:
                yield from job.stop(
                    f"the client's quota of {job.place.quota_bytes} bytes is used up", now
                )


def _refusal(error: RemoteProtocolError) -> list[Part]:
    return jobs.encode(jobs.Refused(error.code, said_reason(error.reason)))


def _notice(text: str) -> LogEvent:
    return LogEvent({"event": "notice", "text": text})
