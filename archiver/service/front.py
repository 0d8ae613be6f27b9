# SPDX-License-Identifier: Apache-2.0
"""The core of the service. Pure: messages and facts in, instructions out; no clock, no I/O.

It opens jobs, knows whose they are, and says to which archiver a producer's
messages go. What is in them it does not know. Methods are lazy iterators:
exhaust each before the next call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmapipe.archiver.service.admission import Facts, Limits, admit
from vmapipe.archiver.service.instructions import (
    Attach,
    Detach,
    Forward,
    Instruction,
    Kill,
    Log,
    Release,
    Send,
    Start,
    Stop,
)
from vmapipe.archiver.service.jobs import Phase, Producer, ServiceJob
from vmapipe.archiver.service.strangers import Strangers
from vmapipe.archiver.service.telling import message_of
from vmapipe.protocol import frames, jobs, limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.frames import Part
from vmapipe.protocol.messages import Abort
from vmapipe.runtime.events import Event

# Asked to stop, it removes its partial file, and ends; as for any child of ours.
STOP_S = 10.0
# Last answers of an archiver that has ended may still be under way to us.
DRAIN_S = 2.0
# Ended jobs that are remembered, for coordinators that ask again.
_MAX_REMEMBERED = 1024
# See archiver/job.py: after a longer gap we ourselves were stopped.
_STOPPED_S = 5.0


class Front:
    """All jobs of a service. `now` is any monotonic clock, in seconds."""

    def __init__(self, bounds: Limits, facts: Facts, now: float) -> None:
        self.jobs: dict[bytes, ServiceJob] = {}
        self.producers: dict[bytes, Producer] = {}
        self._limits = bounds
        self._facts = facts
        self._stopping = ""
        self._ticked = now
        self._strangers = Strangers()

    @property
    def running(self) -> list[ServiceJob]:
        return [job for job in self.jobs.values() if job.phase is not Phase.ENDED]

    @property
    def idle(self) -> bool:
        """No archiver runs, and nobody waits for its last words."""
        return all(job.released for job in self.jobs.values())

    # --- messages ---

    def receive(
        self, peer: bytes, client: str, parts: Sequence[Part], now: float
    ) -> Iterator[Instruction]:
        """A message from `peer`, who has proved to be `client` (empty: nobody has to)."""
        producer = self.producers.get(peer)
        if producer is not None:
            if producer.client == client:
                producer.heard = now
                if producer.admits(len(parts), sum(memoryview(part).nbytes for part in parts)):
                    yield Forward(peer)
                else:
                    yield from self._refuse_flood(peer, producer, len(parts), now)
            return
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
                    yield from self._stop(job, reason, now)
                case None:
                    yield from self._attach(peer, client, name, fields.get("job"), now)
        except RemoteProtocolError as error:
            yield from self._refuse_stranger(peer, client, error, now)

    def answer(self, peer: bytes, parts: Sequence[Part]) -> Iterator[Instruction]:
        """A message from the archiver of this producer."""
        producer = self.producers.get(peer)
        if producer is None:
            return
        limit = None
        if len(parts) == 1:
            _, fields = jobs.unpack_control(parts)
            limit = fields.get("limit", fields.get("credit"))
        producer.answered(limit)
        yield Send(peer, list(parts))

    # --- archivers ---

    def listening(self, job_id: bytes) -> Iterator[Instruction]:
        """A job's archiver is ready for producers."""
        job = self.jobs[job_id]
        if job.phase is Phase.STARTING:
            job.phase = Phase.RUNNING
            job.opened = True
            yield _log(job, "job-opened", devices=list(job.devices))
            yield Send(job.coordinator, self._opened())

    def told(self, job_id: bytes, event: Event) -> Iterator[Instruction]:
        """Any other event of a job's archiver."""
        job = self.jobs[job_id]
        told = message_of(event, job.name)
        match told:
            case jobs.Begun():
                job.begun = told
            case jobs.Stored():
                # Its process may live on for a producer that has to hear of it.
                job.stored = job.verdict = told
            case jobs.Notice(text):
                yield _log(job, "job-notice", text=text)
        if told is not None:
            yield Send(job.coordinator, jobs.encode(told))

    def ended(self, job_id: bytes, words: str, usage: Event, now: float) -> Iterator[Instruction]:
        """A job's archiver is gone. `words` say why if it failed; `usage` is for the log."""
        job = self.jobs[job_id]
        job.phase = Phase.ENDED
        job.ended = now
        usage = {**usage, "seconds": round(now - job.started, 3)}
        if job.stored is not None:
            yield _log(job, "job-stored", stored_bytes=job.stored.stored, **usage)
            return
        reason = job.reason or words
        yield _log(job, "job-failed", text=reason, **usage)
        said = frames.sayable(reason)
        job.verdict = jobs.Failed(said) if job.opened else jobs.Refused("failed", said)
        yield Send(job.coordinator, jobs.encode(job.verdict))
        # One that was killed could not tell them itself.
        for peer in job.producers:
            yield Send(peer, frames.encode_control(Abort(said)))

    # --- time, and the end ---

    def tick(self, now: float) -> Iterator[Instruction]:
        """Time has passed: call it about once a second."""
        gap, self._ticked = now - self._ticked, now
        for job in list(self.jobs.values()):
            if gap > _STOPPED_S:
                job.heard = min(now, job.heard + gap)
                job.started = min(now, job.started + gap)
            yield from self._look_at(job, now)
        yield from self._hold_quotas(now)
        yield from map(_notice, self._strangers.more(now))

    def stop(self, reason: str) -> None:
        """No new jobs from now on."""
        self._stopping = reason

    def fail_all(self, reason: str, now: float) -> Iterator[Instruction]:
        for job in self.running:
            yield from self._stop(job, reason, now)

    def revoke(self, client: str, now: float) -> Iterator[Instruction]:
        """A client may no longer come: what it was sending is given up."""
        for job in self.running:
            if job.client == client:
                yield from self._stop(job, f"the key of client {client!r} was revoked", now)

    # --- coordinators ---

    def _open(
        self, peer: bytes, client: str, request: jobs.Open, now: float
    ) -> Iterator[Instruction]:
        known = self.jobs.get(request.job)
        if known is not None:
            yield from self._meet(self._job_of(request.job, client), peer, now)
            return
        try:
            if self._stopping:
                raise RemoteProtocolError("stopping", self._stopping)
            place = admit(client, request, self.running, self._limits, self._facts)
        except RemoteProtocolError as error:
            yield Log(
                {
                    "event": "job-refused",
                    "client": client,
                    "archive": request.name,
                    "code": error.code,
                    "text": error.reason,
                }
            )
            yield Send(peer, _refusal(error))
            return
        self.jobs[request.job] = ServiceJob(
            request.job, client, request.name, request.devices, place, peer, now, now
        )
        yield Start(request.job, request, place.path)

    def _meet(self, job: ServiceJob, peer: bytes, now: float) -> Iterator[Instruction]:
        """Its coordinator has spoken; over a new connection it is told again what holds."""
        job.heard = now
        anew, job.coordinator = job.coordinator != peer, peer
        yield Send(peer, jobs.encode(jobs.Alive()))
        if anew and job.opened:
            yield Send(peer, self._opened())
            if job.begun is not None:
                yield Send(peer, jobs.encode(job.begun))
        if job.verdict is not None:
            yield Send(peer, jobs.encode(job.verdict))

    def _opened(self) -> list[Part]:
        return jobs.encode(jobs.Opened(limits.VERSION, self._limits.heartbeat_s))

    def _stop(self, job: ServiceJob, reason: str, now: float) -> Iterator[Instruction]:
        if job.phase in (Phase.STARTING, Phase.RUNNING):
            job.phase = Phase.STOPPING
            job.reason = reason
            job.kill_at = now + STOP_S
            if job.stored is None:
                # Before its archiver tells them only that it was told to end.
                abort = frames.encode_control(Abort(frames.sayable(reason)))
                yield from (Send(peer, abort) for peer in job.producers)
            yield Stop(job.id)

    # --- producers ---

    def _attach(
        self, peer: bytes, client: str, name: str, job_id: object, now: float
    ) -> Iterator[Instruction]:
        if name not in ("HELLO", "RESUME"):
            raise RemoteProtocolError("unknown-job", "no session of this peer is known here")
        try:
            job = self._job_of(job_id, client)
        except RemoteProtocolError as error:
            code = "unknown-session" if name == "RESUME" else error.code
            raise RemoteProtocolError(code, error.reason) from error
        if job.phase is not Phase.RUNNING:
            raise RemoteProtocolError("unknown-job", f"the job is {job.phase.value}")
        if len(job.producers) >= job.most_producers:
            # The one whose connection has been dead the longest.
            oldest = min(job.producers, key=lambda other: self.producers[other].heard)
            yield from self._detach(job, oldest)
        job.producers.add(peer)
        producer = self.producers[peer] = Producer(job.id, client, now)
        producer.admits(1, 0)
        yield Attach(peer, job.id)
        yield Forward(peer)

    def _detach(self, job: ServiceJob, peer: bytes) -> Iterator[Instruction]:
        job.producers.discard(peer)
        del self.producers[peer]
        yield Detach(peer)

    def _job_of(self, job_id: object, client: str) -> ServiceJob:
        """Raises RemoteProtocolError, in the same words for no job and somebody else's."""
        job = self.jobs.get(job_id) if isinstance(job_id, bytes) else None
        if job is None or job.client != client:
            raise RemoteProtocolError(
                "unknown-job", "there is no such job here; was the service started again?"
            )
        return job

    def _refuse_flood(
        self, peer: bytes, producer: Producer, parts: int, now: float
    ) -> Iterator[Instruction]:
        """What is not passed on is lost, and its job with it where that was data."""
        producer.dropped += 1
        job = self.jobs[producer.job]
        if parts == 1 or job.phase is not Phase.RUNNING:
            return
        error = RemoteProtocolError("credit", "a producer's data exceeds the credit by far")
        yield Send(peer, _refusal(error))
        yield from self._stop(job, error.reason, now)

    def _refuse_stranger(
        self, peer: bytes, client: str, error: RemoteProtocolError, now: float
    ) -> Iterator[Instruction]:
        if self._strangers.is_new(peer):
            yield Send(peer, _refusal(error))
            yield from map(_notice, self._strangers.refused(client, str(error), now))

    # --- time ---

    def _look_at(self, job: ServiceJob, now: float) -> Iterator[Instruction]:
        overdue = job.overdue(now, self._limits.heartbeat_s)
        if overdue:
            yield from self._stop(job, overdue, now)
        elif job.phase is Phase.STOPPING and now > job.kill_at:
            job.kill_at = now + STOP_S
            yield Kill(job.id)
        elif job.phase is Phase.ENDED:
            if not job.released and now - job.ended > DRAIN_S:
                job.released = True
                for peer in list(job.producers):
                    yield from self._detach(job, peer)
                yield Release(job.id)
            forget = now - job.ended > self._limits.heartbeat_s or len(self.jobs) > _MAX_REMEMBERED
            if job.released and forget:
                del self.jobs[job.id]

    def _hold_quotas(self, now: float) -> Iterator[Instruction]:
        """A client above its quota loses its youngest job, and in a second the next."""
        running = [
            job for job in self.running if job.place.quota_bytes and job.phase is Phase.RUNNING
        ]
        for job in {job.client: job for job in running}.values():
            if self._facts.used_bytes(job.client) > job.place.quota_bytes:
                yield from self._stop(
                    job, f"the client's quota of {job.place.quota_bytes} bytes is used up", now
                )


def _refusal(error: RemoteProtocolError) -> list[Part]:
    return jobs.encode(jobs.Refused(error.code, frames.sayable(error.reason)))


def _log(job: ServiceJob, event: str, **more: object) -> Log:
    whose = {"job": job.id.hex(), "client": job.client, "archive": job.place.path}
    return Log({"event": event, **whose, **more})


def _notice(text: str) -> Log:
    return Log({"event": "notice", "text": text})
