# SPDX-License-Identifier: Apache-2.0
"""The producers of all jobs: whose messages are passed on to which archiver, and how many. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vmapipe.archiver.service.jobs import (
    AttachProducer,
    DetachProducer,
    DropPeer,
    SendAnswer,
    ServiceInstruction,
    ServiceJob,
)
from vmapipe.protocol import limits, service
from vmapipe.protocol.schema import Part

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
class ForwardedProducer:
    """One peer whose messages are passed on, and the bound on them.

    An archiver grants credit for what it has dealt with: so what lies between
    is at most what came, less what was granted since the beginning.
    """

    job: bytes
    client: str
    heard: float
    taken_bytes: int = 0
    #: When its connection ended; what it had sent may still come.
    gone: float = float("inf")
    _first_limit: int = -1
    _ceiling_bytes: int = SLACK_BYTES
    _unanswered: int = 0

    def admits(self, parts: int, size_bytes: int) -> bool:
        """Return whether a message may be passed on; it is counted then."""
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


class ForwardedProducers:
    """`by_peer`: those that are attached to an archiver."""

    def __init__(self) -> None:
        self.by_peer: dict[bytes, ForwardedProducer] = {}

    def attach(
        self, job: ServiceJob, peer: bytes, client: str, now: float
    ) -> list[ServiceInstruction]:
        """A new one, or one of the job's over a new connection."""
        instructions: list[ServiceInstruction] = []
        if len(job.producers) >= job.most_producers:
            # The one whose connection has been dead the longest.
            oldest = min(job.producers, key=lambda other: self.by_peer[other].heard)
            instructions += [self._detach(job, oldest), DropPeer(oldest)]
        job.producers.add(peer)
        producer = self.by_peer[peer] = ForwardedProducer(job.id, client, now)
        producer.admits(1, 0)
        return [*instructions, AttachProducer(peer, job.id)]

    def detach_all(self, job: ServiceJob) -> list[DetachProducer]:
        return [self._detach(job, peer) for peer in list(job.producers)]

    def forget(self, job: ServiceJob, peer: bytes) -> None:
        """It could not be attached."""
        job.producers.discard(peer)
        self.by_peer.pop(peer, None)

    def detach_gone(self, job: ServiceJob, before: float) -> list[DetachProducer]:
        """Detach the producers whose connection ended before that time."""
        gone = [peer for peer in job.producers if self.by_peer[peer].gone < before]
        return [self._detach(job, peer) for peer in gone]

    def _detach(self, job: ServiceJob, peer: bytes) -> DetachProducer:
        job.producers.discard(peer)
        del self.by_peer[peer]
        return DetachProducer(peer)

    def answer(self, peer: bytes, parts: Sequence[Part]) -> list[ServiceInstruction]:
        """A message from the archiver of this producer."""
        producer = self.by_peer.get(peer)
        if producer is None:
            return []
        limit = None
        if len(parts) == 1:
            _, fields = service.unpack_control(parts)
            limit = fields.get("limit", fields.get("credit"))
        producer.answered(limit)
        return [SendAnswer(peer, list(parts))]


# How many refusals one connection is sent before it is closed. An honest client needs one.
MAX_REFUSALS = 16
# Lines of a client's in the log at once, and one more in so many seconds: a log that
# one client can fill is no log.
_LINES = 10
_LINE_S = 10.0
# Clients that are counted; more than any service has.
_MAX_CLIENTS = 4096


class UnassignedPeers:
    """`most`: of all clients together; one client may have a quarter of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        # In the order of their coming.
        self._clients: dict[bytes, str] = {}
        self._refusals: Counter[bytes] = Counter()

    def add(self, peer: bytes, client: str) -> bytes | None:
        """Add a peer that belongs to no job; return the peer that has to be dropped for it."""
        if peer in self._clients:
            return None
        self._clients[peer] = client
        counts = Counter(self._clients.values())
        most_own = max(1, self._most // 4) if client else self._most
        if counts[client] > most_own:
            crowd = client
        elif len(self._clients) > self._most:
            crowd = counts.most_common(1)[0][0]
        else:
            return None
        oldest = next(other for other, its in self._clients.items() if its == crowd)
        self.remove(oldest)
        return oldest

    def remove(self, peer: bytes) -> None:
        """Forget a peer that is gone, or belongs to a job now."""
        self._clients.pop(peer, None)
        self._refusals.pop(peer, None)

    def of(self, client: str) -> list[bytes]:
        return [peer for peer, its in self._clients.items() if its == client]

    def may_be_refused(self, peer: bytes) -> bool:
        """Count a refusal, and say whether it may be sent: the peer may not be reading them."""
        self._refusals[peer] += 1
        if len(self._refusals) > _MAX_CLIENTS:
            del self._refusals[next(iter(self._refusals))]
        return self._refusals[peer] <= MAX_REFUSALS


# Jobs of a client that store nothing, at once: as many as a service usually has places, so that a host with many machines may
# lose all its jobs to a cut and open them again.
_BURST = 64
# And one more in so many seconds: each is the start of a process, a tenth of a second's work.
_OPENING_S = 2.0


class Openings:
    """Count the jobs that each client opens, less those that are stored."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}
        self._at: dict[str, float] = {}

    def wait_s(self, client: str, now: float) -> int:
        """Return 0 and count a job, or the seconds after which one may be opened."""
        left = self._left.get(client, float(_BURST))
        left = min(float(_BURST), left + (now - self._at.pop(client, now)) / _OPENING_S)
        may = left >= 1.0
        # The last one who came is the last one to be forgotten.
        self._left[client] = left - 1.0 if may else left
        self._at[client] = now
        if len(self._at) > _MAX_CLIENTS:
            oldest = next(iter(self._at))
            del self._at[oldest], self._left[oldest]
        return 0 if may else math.ceil((1.0 - left) * _OPENING_S)

    def stored(self, client: str) -> None:
        """One of its jobs was stored: it counts no more."""
        if client in self._left:
            self._left[client] = min(float(_BURST), self._left[client] + 1.0)


class LogLimit:
    """Limits the lines of each client in the log."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}
        self._at: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def allows(self, client: str, now: float) -> bool:
        left = self._left.get(client, float(_LINES))
        left = min(float(_LINES), left + (now - self._at.get(client, now)) / _LINE_S)
        self._at[client] = now
        self._left[client] = left
        if left < 1.0:
            self._unsaid[client] += 1
            return False
        self._left[client] = left - 1.0
        if len(self._at) > _MAX_CLIENTS:
            oldest = next(iter(self._at))
            del self._at[oldest], self._left[oldest]
        return True

    def report_rest(self, now: float) -> list[str]:
        """Return how many lines were left out, when there is room for a line about it."""
        lines = []
        for client in list(self._unsaid):
            if now - self._at[client] < _LINE_S and self._left[client] < 0.5:
                continue
            count = self._unsaid.pop(client)
            who = f"client {client!r}" if client else "clients"
            lines.append(f"{count} more lines about {who} were left out")
        return lines


# Remembered, so that each is answered once; a peer's name has some ten bytes.
_MAX_REMEMBERED = 4096
# One is logged with its reason only so often; of the others, their number is.
_LOG_S = 60.0


class RejectedPeers:
    """`refused` and `more` give lines for the log."""

    def __init__(self) -> None:
        self.count = 0
        self._peers: dict[bytes, None] = {}
        self._unsaid = 0
        self._said = float("-inf")

    def add(self, peer: bytes) -> bool:
        """Return whether it is refused for the first time, and remember it."""
        if peer in self._peers:
            return False
        if len(self._peers) >= _MAX_REMEMBERED:
            del self._peers[next(iter(self._peers))]
        self._peers[peer] = None
        return True

    def report(self, client: str, why: str, now: float) -> list[str]:
        self.count += 1
        if now - self._said < _LOG_S:
            self._unsaid += 1
            return []
        self._said = now
        who = f" from client {client!r}" if client else ""
        return [f"refused a stranger{who}: {why}"]

    def report_rest(self, now: float) -> list[str]:
        if not self._unsaid or now - self._said < _LOG_S:
            return []
        count, self._unsaid, self._said = self._unsaid, 0, now
        return [f"{count} more strangers were refused"]
