# SPDX-License-Identifier: Apache-2.0
"""Connections that break at any moment: nothing is lost, nothing comes twice, nobody is mistaken."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.archiver.job.world import JOB, UUID, spec
from tests.leaks import held_bytes_objects
from tests.network.lossy import Producer, World
from tests.protocol.messages import encode
from vmapipe.archiver.job.job import Job, JobPhase
from vmapipe.archiver.job.spec import KeyRevoked, MessageReceived, TimePassed
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol import limits, transfer
from vmapipe.protocol.errors import connection_lost
from vmapipe.protocol.transfer import (
    Abort,
    Bye,
    Done,
    End,
    Hello,
    Message,
    Refuse,
    Resume,
    RunFrame,
)
from vmapipe.protocol.transfer_state import ProducerState


def disk(seed: int, clusters: int, tail: int = CLUSTER_BYTES) -> bytes:
    chance = random.Random(seed)
    parts = [
        bytes(CLUSTER_BYTES) if chance.random() < 0.4 else bytes([1 + i % 255]) * CLUSTER_BYTES
        for i in range(clusters)
    ]
    return b"".join(parts)[: (clusters - 1) * CLUSTER_BYTES + tail]


class BrokenConnections(RuleBasedStateMachine):
    """Any interleaving of sending, delivering, writing and breaking, until all is stored."""

    @initialize(
        sizes=st.lists(
            st.tuples(st.integers(1, 130), st.integers(1, CLUSTER_BYTES)), min_size=1, max_size=3
        ),
        in_order=st.booleans(),
    )
    def begin(self, sizes: list[tuple[int, int]], in_order: bool) -> None:
        self.disks = {f"disk{i}": disk(i, *size) for i, size in enumerate(sizes)}
        self.world = World(Job(spec(*self.disks, in_order=in_order), 0.0))
        for index, (name, data) in enumerate(self.disks.items()):
            producer = Producer(name, data, bytes([index + 1]) * 16)
            self.world.producers.append(producer)
            self.world.connect(producer)

    def some(self, number: int) -> Producer:
        return self.world.producers[number % len(self.world.producers)]

    @rule(number=st.integers(0, 2), steps=st.integers(1, 60))
    def send(self, number: int, steps: int) -> None:
        for _ in range(steps):
            self.some(number).step()

    @rule(number=st.integers(0, 2), count=st.integers(1, 60))
    def deliver(self, number: int, count: int) -> None:
        producer = self.some(number)
        for _ in range(min(count, len(producer.to_archiver))):
            self.world.deliver(producer.connection, producer.to_archiver.popleft())

    @rule(number=st.integers(0, 2), count=st.integers(1, 20))
    def answer(self, number: int, count: int) -> None:
        producer = self.some(number)
        for _ in range(min(count, len(producer.from_archiver))):
            producer.hear()

    @rule()
    def write(self) -> None:
        if self.world.queue:
            self.world.write()
        self.world.store_if_ready()

    @rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        self.world.connect(self.some(number))

    @rule(number=st.integers(0, 2), late=st.integers(1, 5))
    def lose_and_hear_late(self, number: int, late: int) -> None:
        """What was under way arrives after the new connection's first words."""
        producer = self.some(number)
        old, under_way = producer.connection, list(producer.to_archiver)[:late]
        self.world.connect(producer)
        if producer.to_archiver:
            self.world.deliver(producer.connection, producer.to_archiver.popleft())
        for parts in under_way:
            self.world.deliver(old, parts)

    @invariant()
    def nothing_has_failed(self) -> None:
        if hasattr(self, "world"):
            assert self.world.job.phase is not JobPhase.FAILED, self.world.job.reason

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for _ in range(20_000):
            if self.world.job.over:
                break
            for number in range(len(self.disks)):
                self.send(number, 1)
                self.deliver(number, 1)
                self.answer(number, 1)
            self.write()
        assert self.world.images() == self.disks
        for producer in self.world.producers:
            assert producer.heard == Done(UUID)
            assert producer.side.state is ProducerState.CLOSED


TestBrokenConnections = BrokenConnections.TestCase
TestBrokenConnections.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# --- who is who ---

SESSION = b"s" * 16


def job_with_one(client: str = "", **changes: object) -> tuple[World, Producer]:
    """A job that is being received from one producer over the connection `1`."""
    world = World(Job(spec("a", **changes), 0.0))
    producer = Producer("a", bytes(3 * CLUSTER_BYTES), SESSION)
    world.producers.append(producer)
    world.connect(producer)
    world.deliver(b"1", producer.to_archiver.popleft(), 0.0, client)
    producer.hear()
    return world, producer


def answers(world: World, peer: bytes) -> list[Message]:
    return [transfer.decode(parts) for parts in world.replies.get(peer, ())]


def raw(message: Message) -> list[bytes]:
    return [bytes(part) for part in encode(message)]


def code_of(found: Iterable[Message]) -> list[str]:
    return [message.code for message in found if isinstance(message, Refuse)]


def test_a_session_that_is_not_known_is_refused_and_the_job_goes_on() -> None:
    """A guess, or an archiver that was started again."""
    world, _ = job_with_one()
    world.deliver(b"x", raw(Resume(1, JOB, b"x" * 16, 1)))
    world.deliver(b"y", raw(Resume(1, b"y" * 16, SESSION, 1)))
    assert code_of(answers(world, b"x")) == code_of(answers(world, b"y")) == ["unknown-session"]
    assert world.job.phase is JobPhase.RUNNING


def test_a_session_is_its_clients_alone() -> None:
    world, _ = job_with_one("host1")
    world.deliver(b"x", raw(Resume(1, JOB, SESSION, 1)), 0.0, "host2")
    assert code_of(answers(world, b"x")) == ["unknown-session"]
    world.deliver(b"y", raw(Resume(1, JOB, SESSION, 1)), 0.0, "host1")
    assert code_of(answers(world, b"y")) == []
    assert world.job.phase is JobPhase.RUNNING


def test_a_producer_that_was_started_again_is_told_apart_from_one_that_comes_back() -> None:
    world, _ = job_with_one()
    world.deliver(b"x", raw(Hello(1, JOB, "a", 3 * CLUSTER_BYTES, session=b"n" * 16)))
    assert code_of(answers(world, b"x")) == ["restarted"]
    assert world.job.phase is JobPhase.RUNNING


def test_what_comes_over_the_old_connection_afterwards_is_ignored() -> None:
    world, _ = job_with_one()
    world.deliver(b"2", raw(Resume(1, JOB, SESSION, 1)))
    for message in (RunFrame(1, 1, 0, 3, b"", memoryview(b"")), End(9, 9), Hello(1, JOB, "a", 1)):
        world.deliver(b"1", raw(message))
    assert answers(world, b"1")[1:] == []
    assert world.job.phase is JobPhase.RUNNING
    assert world.notices == ["device 'a': connected again after 0 s"]


def test_a_resume_that_is_late_or_a_replay_is_ignored() -> None:
    world, _ = job_with_one()
    world.deliver(b"3", raw(Resume(1, JOB, SESSION, 2)))
    world.deliver(b"2", raw(Resume(1, JOB, SESSION, 1)))
    world.deliver(b"4", raw(Resume(1, JOB, SESSION, 2)))
    assert answers(world, b"2") == answers(world, b"4") == []
    world.deliver(b"3", raw(RunFrame(1, 1, 0, 3, b"", memoryview(b""))))
    assert world.job.devices[0].clusters == 3


def test_a_frame_that_comes_twice_is_refused_also_after_a_reconnect() -> None:
    world, _ = job_with_one()
    frame = RunFrame(1, 1, 0, 1, b"", memoryview(b""))
    world.deliver(b"1", raw(frame))
    world.deliver(b"2", raw(Resume(1, JOB, SESSION, 1)))
    world.deliver(b"2", raw(frame))
    assert code_of(answers(world, b"2")) == ["sequence"]
    assert world.job.reason == "device 'a': frame 1 where 2 must come [sequence]"


def test_a_hello_again_that_says_something_else_is_refused() -> None:
    world, _ = job_with_one()
    world.deliver(b"2", raw(Hello(1, JOB, "a", 7, session=SESSION, attempt=1)))
    assert code_of(answers(world, b"2")) == ["sequence"]


def test_a_hello_again_after_data_has_come_is_refused() -> None:
    world, _ = job_with_one()
    world.deliver(b"1", raw(RunFrame(1, 1, 0, 1, b"", memoryview(b""))))
    world.deliver(b"2", raw(Hello(1, JOB, "a", 3 * CLUSTER_BYTES, session=SESSION, attempt=1)))
    assert code_of(answers(world, b"2")) == ["sequence"]


# --- limits ---


def test_a_cut_within_the_limit_is_told_once_and_one_beyond_it_fails_the_job() -> None:
    world, _ = job_with_one(heartbeat_s=10, reconnect_s=60)
    for now in range(61):
        world.carry_out(world.job.handle(TimePassed(float(now))))
    assert world.job.phase is JobPhase.RUNNING
    assert world.notices == ["device 'a': nothing comes; it is waited for, up to 60 s"]
    world.carry_out(world.job.handle(TimePassed(60.5)))
    assert world.job.reason == connection_lost("a", 60)
    assert world.abandoned
    assert answers(world, b"1")[-1] == Abort(connection_lost("a", 60))


def test_a_producer_that_cannot_come_back_is_not_waited_for() -> None:
    world = World(Job(spec("a", heartbeat_s=10, reconnect_s=60), 0.0))
    world.deliver(b"1", raw(Hello(1, JOB, "a", CLUSTER_BYTES)))
    for now in range(11):
        world.carry_out(world.job.handle(TimePassed(float(now))))
    world.carry_out(world.job.handle(TimePassed(10.5)))
    assert world.job.reason == "the producer of device 'a' has been silent for 10 s"


def stored(world: World, producer: Producer) -> None:
    """Everything has come and is stored; what DONE says is under way."""
    while producer.step():
        while producer.to_archiver:
            world.deliver(producer.connection, producer.to_archiver.popleft())
    while world.queue:
        world.write()
    world.store_if_ready()
    assert world.job.phase is JobPhase.DONE


def test_who_has_not_heard_that_it_is_done_is_told_again() -> None:
    world, producer = job_with_one()
    stored(world, producer)
    assert not world.job.over
    world.connect(producer)
    world.deliver(b"2", producer.to_archiver.popleft())
    while producer.from_archiver:
        producer.hear()
    assert producer.heard == Done(UUID)
    world.deliver(b"2", producer.to_archiver.popleft())
    assert world.job.over


def test_nobody_waits_for_ever_for_one_who_has_not_heard_that_it_is_done() -> None:
    world, producer = job_with_one(heartbeat_s=10, reconnect_s=20)
    stored(world, producer)
    for now in range(22):
        world.carry_out(world.job.handle(TimePassed(float(now))))
    assert world.job.over
    assert world.job.phase is JobPhase.DONE
    assert world.notices[-1] == f"{connection_lost('a', 20)}, after all was stored"


def test_connections_without_number_cost_no_memory() -> None:
    world, _ = job_with_one()
    for number in range(5000):
        world.carry_out(world.job.handle(MessageReceived(b"n%d" % number, raw(Bye()), 0.0)))
        resume = Resume(1, JOB, SESSION, 1 + number)
        world.carry_out(world.job.handle(MessageReceived(b"r%d" % number, raw(resume), 0.0)))
    assert 0 < len([text for text in world.notices if "stranger" in text]) <= 101
    # Each was answered, and most are forgotten.
    assert len([peer for peer in world.replies if peer.startswith(b"r")]) == 5000
    assert len(held_bytes_objects(world.job)) < 1100


@pytest.mark.parametrize("client", ["host1", "host2"])
def test_a_revoked_client_fails_only_its_own_job(client: str) -> None:
    world, _ = job_with_one("host1")
    world.carry_out(world.job.handle(KeyRevoked(client)))
    assert (world.job.phase is JobPhase.FAILED) == (client == "host1")


@given(st.integers(1, 200), st.lists(st.integers(0, 400), max_size=30))
def test_kept_frames_are_those_behind_the_acknowledged_ones(sent: int, acked: list[int]) -> None:
    producer = Producer("a", b"", SESSION)
    for seq in range(1, sent + 1):
        producer.kept.add(seq, [b"%d" % seq])
    for number in acked:
        producer.kept.acknowledge(number)
    most = max(acked, default=0)
    left = [int(bytes(parts[0])) for parts in producer.kept.behind(0)]
    assert left == list(range(most + 1, sent + 1))
    half = (most + sent) // 2
    assert [int(bytes(p[0])) for p in producer.kept.behind(half)] == [n for n in left if n > half]
    assert len(SESSION) == limits.UUID_BYTES
