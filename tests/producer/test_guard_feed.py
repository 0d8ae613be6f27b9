# SPDX-License-Identifier: Apache-2.0
"""In which order a live producer does things, with a guard and an archiver in its hands."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest

from vmapipe.producer.guard_client import GuardClient
from vmapipe.producer.guard_feed import BackgroundReader, GuardFeed, SavedClusters
from vmapipe.producer.runs import Run
from vmapipe.producer.session import Session
from vmapipe.producer.shared_memory import Ring
from vmapipe.producer.transmit import transmit
from vmapipe.protocol import limits
from vmapipe.protocol.guard import Claimed, FromGuard, GuardBegun, Saved
from vmapipe.protocol.transfer import SharedCluster
from vmapipe.runtime.events import ignore
from vmapipe.runtime.rate_limit import RateLimiter

CLUSTER = 65536
CLUSTERS = 64
# What one piece of 16 clusters needs, and not enough for a second one.
ONE_PIECE = 1_100_000


class Archiver:
    """A session that counts credit as the real one does; waiting brings more."""

    def __init__(self, guard: Guard, *, scatters: bool) -> None:
        self.credit = ONE_PIECE
        self.frame_bytes = 8 << 20
        self.sent: list[Run] = []
        self.scatters = scatters
        self.spoke = 0.0
        self._guard = guard

    @property
    def sent_bytes(self) -> int:
        return sum(run.length for run in self.sent)

    @property
    def sent_clusters(self) -> int:
        return sum(run.clusters for run in self.sent)

    def greet(self) -> None:
        pass

    def watch(self, fd: int) -> None:
        pass

    def end(self) -> None:
        pass

    def send_from_ring(self, run: Run) -> None:
        self.send(run)

    def send(self, run: Run, on_ack: Callable[[], None] | None = None) -> None:
        assert limits.charge(run.clusters, run.length) <= self.credit, (
            "more than the archiver allows"
        )
        self.credit -= limits.charge(run.clusters, run.length)
        self.sent.append(run)
        if on_ack is not None:
            on_ack()

    def send_scattered(self, clusters: Sequence[SharedCluster], on_ack: Callable[[], None]) -> None:
        assert self.scatters
        for cluster in clusters:
            assert cluster.mask == 0xFFFF
        charge = limits.charge(len(clusters), len(clusters) * CLUSTER)
        assert charge <= min(self.credit, self.frame_bytes), "more than the archiver allows"
        self.credit -= charge
        self.sent.append(Run(clusters[0].cluster_num, len(clusters), b"", 0, charge))
        on_ack()

    def poll(self) -> None:
        pass

    def step(self, longest_s: float) -> None:
        """Either the guard has something to say, or the archiver gives credit."""
        if not self._guard.has_more():
            self.credit = ONE_PIECE


class Guard:
    """Answers each claim only after it has told what a guest's write saved meanwhile."""

    def __init__(self, disk: Path) -> None:
        self.size_bytes = CLUSTERS * CLUSTER
        self.disk_fd = os.open(disk, os.O_RDONLY)
        self.fd = -1
        self.claims = 0
        self.released: list[int] = []
        self._mail: deque[FromGuard | None] = deque([GuardBegun()])
        self._next = 0

    def has_more(self) -> bool:
        return bool(self._mail)

    def receive(self) -> FromGuard | None:
        return self._mail.popleft() if self._mail else None

    def claim(self, most: int) -> None:
        if self._next == CLUSTERS:
            self._mail += [Claimed(0, 0), None]
            return
        self.claims += 1
        saved = Saved(tuple(range(self._next + 16, self._next + 32)), tuple(range(16)))
        # None: nothing more can be read now, so the producer goes on with something else.
        self._mail += [saved, None, Claimed(self._next, 16), None]
        self._next += 32

    def copied(self, clusters: int) -> None:
        assert clusters == 16

    def release(self, slots: Sequence[int]) -> None:
        self.released += slots


@pytest.mark.parametrize("scatters", [False, True])
def test_what_a_claim_was_asked_for_with_is_still_there_when_it_is_answered(
    tmp_path: Path, scatters: bool
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(CLUSTERS * CLUSTER))
    guard = Guard(disk)
    archiver = Archiver(guard, scatters=scatters)
    ring = Ring(16 * CLUSTER)
    ring.view[-16 * CLUSTER :] = os.urandom(16 * CLUSTER)
    session, client = cast(Session, archiver), cast(GuardClient, guard)
    saved = SavedClusters(guard.size_bytes, 16, -1, ring, client)
    background = BackgroundReader("d", ring, client, RateLimiter(0, 0.0), session)
    transmit(GuardFeed("d", client, session, saved, background), session, ignore)
    assert archiver.sent_clusters == CLUSTERS
    assert guard.claims == 2
    assert sorted(guard.released) == sorted(2 * [*range(16)])
    os.close(guard.disk_fd)
    ring.close()
    del saved, background, ring
