# SPDX-License-Identifier: Apache-2.0
"""The producers of all jobs: whose messages are passed on to which archiver, and how many. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmapipe.archiver.service.instructions import Attach, Detach, Drop, Send
from vmapipe.archiver.service.jobs import ServiceJob
from vmapipe.protocol import jobs, limits
from vmapipe.protocol.packing import Part

# What may be under way to a job's archiver, from one producer, above what that
# has granted: twice the most that an archiver ever grants in advance, so that
# no honest producer meets it, even one that sends again after a reconnect.
SLACK_BYTES = 2 * (16 << 20)
# The least that a data message is counted with: its least charge (section 7 of
# the wire's page), so that tiny ones are bounded, too.
_LEAST_BYTES = limits.charge(1, 0)
# Control messages under way without an answer. An honest producer has three.
_MAX_UNANSWERED = 1000


@dataclass(slots=True)
class Producer:
    """One peer whose messages are passed on, and the bound on them.

    An archiver grants credit for what it has dealt with: so what lies between
    is at most what came, less what was granted since the beginning.
    """

    job: bytes
    client: str
    heard: float
    taken_bytes: int = 0
    dropped: int = 0
    #: When its connection ended; what it had sent may still come.
    gone: float = float("inf")
    _first_limit: int = -1
    _ceiling_bytes: int = SLACK_BYTES
    _unanswered: int = 0

    def admits(self, parts: int, size_bytes: int) -> bool:
        """Whether a message may be passed on; it is counted then."""
        if parts == 1:
            self._unanswered += 1
            return self._unanswered <= _MAX_UNANSWERED
        cost = max(size_bytes, _LEAST_BYTES)
        if self.taken_bytes + cost > self._ceiling_bytes:
            return False
        self.taken_bytes += cost
        return True

    def answered(self, limit: int | None) -> None:
        """The archiver has said something; `limit` if it was about credit."""
        self._unanswered = 0
        if limit is not None:
            if self._first_limit < 0:
                self._first_limit = limit
            self._ceiling_bytes = max(self._ceiling_bytes, limit - self._first_limit + SLACK_BYTES)


class Producers:
    """`by_peer`: those that are attached to an archiver."""

    def __init__(self) -> None:
        self.by_peer: dict[bytes, Producer] = {}

    def attach(
        self, job: ServiceJob, peer: bytes, client: str, now: float
    ) -> Iterator[Attach | Detach | Drop]:
        """A new one, or one of the job's over a new connection."""
        if len(job.producers) >= job.most_producers:
            # The one whose connection has been dead the longest.
            oldest = min(job.producers, key=lambda other: self.by_peer[other].heard)
            yield self._detach(job, oldest)
            yield Drop(oldest)
        job.producers.add(peer)
        producer = self.by_peer[peer] = Producer(job.id, client, now)
        producer.admits(1, 0)
        yield Attach(peer, job.id)

    def detach_all(self, job: ServiceJob) -> Iterator[Detach]:
        for peer in list(job.producers):
            yield self._detach(job, peer)

    def forget(self, job: ServiceJob, peer: bytes) -> None:
        """It could not be attached."""
        job.producers.discard(peer)
        self.by_peer.pop(peer, None)

    def detach_gone(self, job: ServiceJob, before: float) -> Iterator[Detach]:
        """Those whose connection ended before that."""
        for peer in [peer for peer in job.producers if self.by_peer[peer].gone < before]:
            yield self._detach(job, peer)

    def _detach(self, job: ServiceJob, peer: bytes) -> Detach:
        job.producers.discard(peer)
        del self.by_peer[peer]
        return Detach(peer)

    def answer(self, peer: bytes, parts: Sequence[Part]) -> Iterator[Send]:
        """A message from the archiver of this producer."""
        producer = self.by_peer.get(peer)
        if producer is None:
            return
        limit = None
        if len(parts) == 1:
            _, fields = jobs.unpack_control(parts)
            limit = fields.get("limit", fields.get("credit"))
        producer.answered(limit)
        yield Send(peer, list(parts))
