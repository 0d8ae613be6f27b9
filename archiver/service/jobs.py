# SPDX-License-Identifier: Apache-2.0
"""What the service knows of one job and of its producers. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from vmapipe.protocol import jobs, limits

# What may be under way to a job's archiver, from one producer, above what that
# has granted: twice the most that an archiver ever grants in advance, so that
# no honest producer meets it, even one that sends again after a reconnect.
SLACK_BYTES = 2 * (16 << 20)
# The least that a data message is counted with: its least charge (section 7 of
# the wire's page), so that tiny ones are bounded, too.
_LEAST_BYTES = limits.charge(1, 0)
# Control messages under way without an answer. An honest producer has three.
_MAX_UNANSWERED = 1000


# An archiver's process is ready in a fraction of a second; when twenty are started
# at once on a machine that is busy already, in half a minute.
START_S = 60.0


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


@dataclass(slots=True)
class ServiceJob:
    """`coordinator` is the peer that spoke last for it; `heard` when."""

    id: bytes
    client: str
    name: str
    devices: tuple[str, ...]
    place: Place
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

    def overdue(self, now: float, heartbeat_s: int) -> str:
        """Why it is to be ended now; empty: it is not."""
        if self.phase is Phase.STARTING and now - self.started > START_S:
            return f"its archiver was not ready within {START_S:.0f} s"
        if self.phase is Phase.RUNNING and now - self.heard > heartbeat_s:
            return f"its coordinator has been silent for {heartbeat_s} s"
        return ""

    @property
    def most_producers(self) -> int:
        """Each device's, and as many that came over connections that are dead by now."""
        return 2 * len(self.devices) + 8
