# SPDX-License-Identifier: Apache-2.0
"""Clients, producers and deaths in any order: limits hold, and nothing is left at the end."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.archiver.service.world import World
from tests.protocol.jobs import of_coordinators
from vmapipe.archiver.service.admission import ServiceLimits
from vmapipe.archiver.service.front import ClientRevoked
from vmapipe.archiver.service.jobs import START_S, ServicePhase
from vmapipe.protocol import service, transfer
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import Ping

BOUNDS = ServiceLimits(max_jobs=4, heartbeat_s=20)
CLIENT_JOBS = 2
clients = st.sampled_from(["alice", "bob", "eve"])
peers = st.integers(0, 11).map(lambda number: bytes([number]))
indexes = st.integers(0, 100)


class ServiceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(BOUNDS)
        self.world.client_jobs = CLIENT_JOBS
        self.known: list[bytes] = [bytes(16)]

    def some_job(self, index: int) -> bytes:
        return self.known[index % len(self.known)]

    def some_archiver(self, index: int) -> bytes:
        archivers = sorted(self.world.archivers)
        return archivers[index % len(archivers)]

    @rule(peer=peers, client=clients, name=st.sampled_from(["a", "b", "../c", "d.partial"]))
    def open(self, peer: bytes, client: str, name: str) -> None:
        self.known.append(self.world.open(peer, client, name))

    @rule(peer=peers, client=clients, index=indexes)
    def open_again(self, peer: bytes, client: str, index: int) -> None:
        self.world.open(peer, client, "again", self.some_job(index))

    @rule(peer=peers, client=clients, index=indexes)
    def hello(self, peer: bytes, client: str, index: int) -> None:
        self.world.hello(peer, client, self.some_job(index))

    @rule(peer=peers, client=clients, index=indexes)
    def beat(self, peer: bytes, client: str, index: int) -> None:
        self.world.say(peer, client, service.encode(service.Beat(self.some_job(index))))

    @rule(peer=peers, client=clients, index=indexes)
    def cancel(self, peer: bytes, client: str, index: int) -> None:
        self.world.say(
            peer, client, service.encode(service.JobCancel(self.some_job(index), "enough"))
        )

    @rule(peer=peers, client=clients)
    def ping(self, peer: bytes, client: str) -> None:
        self.world.say(peer, client, transfer.encode_control(Ping()))

    @rule(peer=peers, client=clients, message=of_coordinators)
    def anything(self, peer: bytes, client: str, message: service.FromCoordinator) -> None:
        self.world.say(peer, client, service.encode(message))

    @rule(peer=peers, client=clients, parts=st.lists(st.binary(max_size=20), max_size=3))
    def junk(self, peer: bytes, client: str, parts: list[Part]) -> None:
        self.world.say(peer, client, parts)

    @precondition(lambda self: self.world.archivers)
    @rule(index=indexes)
    def archiver_is_ready(self, index: int) -> None:
        self.world.ready(self.some_archiver(index))

    @precondition(lambda self: self.world.archivers)
    @rule(index=indexes)
    def archiver_stores(self, index: int) -> None:
        self.world.store(self.some_archiver(index))

    @precondition(lambda self: self.world.archivers)
    @rule(index=indexes)
    def archiver_dies(self, index: int) -> None:
        self.world.end(self.some_archiver(index), "it was killed")

    @rule(client=clients)
    def revoke(self, client: str) -> None:
        self.world.handle(ClientRevoked(client, self.world.now))

    @rule(seconds=st.integers(1, 30))
    def time_passes(self, seconds: int) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def the_limits_hold(self) -> None:
        running = self.world.front.running
        assert len(running) <= BOUNDS.max_jobs
        assert all(n <= CLIENT_JOBS for n in Counter(job.client for job in running).values())
        paths = [job.place.path for job in running]
        assert len(set(paths)) == len(paths)
        assert not any(".." in path or path.endswith(".partial") for path in paths)

    @invariant()
    def what_the_core_knows_is_what_there_is(self) -> None:
        front = self.world.front
        assert {job.id for job in front.running} == self.world.archivers
        assert {
            p: producer.job for p, producer in front.producers.by_peer.items()
        } == self.world.attached
        for peer, job_id in self.world.attached.items():
            assert front.producers.by_peer[peer].client == front.jobs[job_id].client
            assert peer in front.jobs[job_id].producers
        assert {j.id for j in front.jobs.values() if not j.released} == self.world.unreleased

    @invariant()
    def nobody_is_told_of_another_ones_job(self) -> None:
        for job in self.world.front.jobs.values():
            if job.phase is ServicePhase.ENDED:
                assert job.verdict is not None

    def teardown(self) -> None:
        """Everybody falls silent: what is left is asked to stop, ends, and is forgotten."""
        self.world.pass_time(START_S + 5)
        assert self.world.archivers <= self.world.stopping
        for job in list(self.world.archivers):
            self.world.end(job, "asked to stop")
        self.world.pass_time(BOUNDS.heartbeat_s + 5)
        assert self.world.front.idle
        assert not self.world.front.jobs
        assert not self.world.front.producers.by_peer
        assert not self.world.attached
        assert not self.world.unreleased


TestServiceMachine = ServiceMachine.TestCase
TestServiceMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
