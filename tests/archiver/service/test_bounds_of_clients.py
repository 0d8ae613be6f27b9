# SPDX-License-Identifier: Apache-2.0
"""The core of the service: what a client may take of it, and that room is left for the others."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.archiver.service.world import HEARTBEAT_S, World, beat, refusal
from vmapipe.archiver.service.admission import JOB_MEMORY_BYTES, FreeSpace, ServiceLimits
from vmapipe.archiver.service.front import ArchiverAnswer, StopAsked
from vmapipe.archiver.service.jobs import Need, need_of
from vmapipe.archiver.service.peers import MAX_REFUSALS, SLACK_BYTES, UnassignedPeers
from vmapipe.protocol import limits, service, transfer
from vmapipe.protocol.transfer import Grant, Ping, Welcome


def test_each_limit_refuses_with_its_code(world: World) -> None:
    world.client_jobs = 1
    first = world.open(b"c", "alice", "1.vma")
    world.open(b"d", "alice", "2.vma")
    assert refusal(world, b"d") == "too-many-jobs"
    world.client_jobs = 0
    world.open(b"e", "alice", "2.vma")
    world.open(b"f", "bob", "3.vma")
    world.open(b"g", "bob", "4.vma")
    assert refusal(world, b"g") == "too-many-jobs"
    world.end(first, "it failed")
    world.room_left = FreeSpace(999, 1 << 40)
    world.open(b"h", "bob", "4.vma")
    assert refusal(world, b"h") == "no-space"
    # Two archivers are starting and have not taken their memory yet.
    world.room_left = FreeSpace(1000, 1000 + 3 * JOB_MEMORY_BYTES - 1)
    world.open(b"i", "bob", "4.vma")
    assert refusal(world, b"i") == "no-memory"
    world.room_left = FreeSpace(1000, 1000 + 3 * JOB_MEMORY_BYTES)
    world.quota_bytes, world.used["bob"] = 500, 500
    world.open(b"j", "bob", "4.vma")
    assert refusal(world, b"j") == "quota"
    world.open(b"k", "bob", "refused")
    assert refusal(world, b"k") == "bad-contents"
    world.handle(StopAsked("later"))
    world.open(b"l", "alice", "5.vma")
    assert refusal(world, b"l") == "stopping"
    assert [event["code"] for event in world.log if event["event"] == "job-refused"][
        -1
    ] == "stopping"


def test_a_client_above_its_quota_loses_its_youngest_job_first(world: World) -> None:
    world.quota_bytes = 100
    old = world.open(b"c", "alice", "1.vma")
    young = world.open(b"d", "alice", "2.vma")
    other = world.open(b"e", "bob", "3.vma")
    for job in (old, young, other):
        world.ready(job)
    world.used["alice"] = 101
    world.pass_time(1)
    assert world.stopping == {young}
    world.end(young, "cancelled by SIGTERM")
    (failed,) = [m for m in world.heard_by(b"d") if isinstance(m, service.JobFailed)]
    assert failed.reason == "the client's quota of 100 bytes is used up"
    world.used["alice"] = 60
    world.pass_time(5)
    assert world.stopping == {young}


def test_one_client_cannot_take_all_places_where_others_may_come() -> None:
    world = World(ServiceLimits(max_jobs=64, heartbeat_s=HEARTBEAT_S))
    world.others = {"eve", "mallory", "alice"}
    for client in ("eve", "mallory", "alice"):
        for number in range(64):
            world.open(b"%s-%d" % (client.encode(), number), client, f"{number}.vma")
    taken = Counter(job.client for job in world.front.running)
    assert taken == {"eve": 32, "mallory": 16, "alice": 8}


def test_a_client_that_is_alone_may_take_all_places() -> None:
    world = World(ServiceLimits(max_jobs=8, heartbeat_s=HEARTBEAT_S))
    for number in range(9):
        world.open(b"%d" % number, "host1", f"{number}.vma")
    assert len(world.front.running) == 8


def test_jobs_are_opened_only_as_far_as_descriptors_reach() -> None:
    one = need_of(2)
    world = World(
        ServiceLimits(heartbeat_s=HEARTBEAT_S, most=Need(10 * one.connections, 7 * one.descriptors))
    )
    world.others = {"eve", "alice"}
    for client in ("eve", "alice"):
        for number in range(8):
            world.open(b"%s-%d" % (client.encode(), number), client, f"{number}.vma")
    taken = Counter(job.client for job in world.front.running)
    assert (taken["eve"], taken["alice"]) == (4, 2)
    (refused,) = [m for m in world.heard_by(b"eve-7") if isinstance(m, service.JobRefused)]
    assert refused.code == "too-many-jobs"
    assert "open files" in refused.reason


def test_a_job_larger_than_the_service_is_refused_with_the_way_out() -> None:
    world = World(ServiceLimits(heartbeat_s=HEARTBEAT_S, most=Need(2, 100)))
    world.open(b"c", "", "vm.vma")
    (refused,) = [m for m in world.heard_by(b"c") if isinstance(m, service.JobRefused)]
    assert "limit of open files has to be raised" in refused.reason


def test_what_a_client_is_told_and_what_it_brings_into_the_log_is_bounded(world: World) -> None:
    name = "\U0001f600" * 4000 + "/"
    for number in range(2000):
        world.open(b"e", "eve", name, job=number.to_bytes(16, "little"))
    heard = world.heard_by(b"e")
    assert len(heard) == MAX_REFUSALS
    assert all(isinstance(m, service.JobRefused) and len(m.reason) <= 1000 for m in heard)
    assert set(world.dropped) == {b"e"}
    refusals = [event for event in world.log if event["event"] == "job-refused"]
    assert len(refusals) == 10
    assert all(len(str(event)) < 2000 for event in refusals)
    world.pass_time(60)
    (more,) = [e["text"] for e in world.log if e["event"] == "notice"]
    assert more == "1990 more lines about client 'eve' were left out"
    # Of another client it is said.
    world.open(b"a", "alice", "no/name")
    assert [e["client"] for e in world.log if e["event"] == "job-refused"][-1] == "alice"


def test_a_coordinator_that_jumps_from_connection_to_connection_is_told_little(
    world: World,
) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    for number in range(1000):
        beat(world, b"c%d" % (number % 2), job)
    assert len([m for _, m in world.said if isinstance(m, service.Opened)]) < 12
    world.pass_time(20)
    beat(world, b"c7", job)
    assert any(isinstance(m, service.Opened) for m in world.heard_by(b"c7"))


def test_peers_that_belong_to_no_job_make_room_for_each_other_and_for_other_clients() -> None:
    visitors = UnassignedPeers(16)
    gone = [visitors.add(b"e%d" % number, "eve") for number in range(100)]
    assert gone[:4] == [None] * 4
    assert gone[4:] == [b"e%d" % number for number in range(96)]
    assert visitors.add(b"a", "alice") is None
    for client in "bcdefgh":
        for number in range(4):
            dropped = visitors.add(b"%s%d" % (client.encode(), number), client)
            assert dropped != b"a"
    assert visitors.of("alice") == [b"a"]


def test_what_a_producer_may_have_under_way_is_what_its_archiver_grants_and_a_bit(
    world: World,
) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.hello(b"p", "", job)

    def flood() -> int:
        """Bytes that go through until no more do."""
        before = len(world.forwarded)
        for _ in range(40):
            world.say(b"p", "", [b"\x01", bytes(1 << 20)])
        return (len(world.forwarded) - before) * ((1 << 20) + 1)

    def told(message: Welcome | Grant) -> None:
        world.handle(ArchiverAnswer(b"p", transfer.encode_control(message)))

    told(Welcome(limits.VERSION, 1, 8 << 20, 4 << 20, 30))
    assert SLACK_BYTES - (2 << 20) < flood() <= SLACK_BYTES
    assert flood() == 0
    told(Grant((8 << 20) + (5 << 20), 0))
    assert (3 << 20) < flood() <= (6 << 20)
    assert flood() == 0


def test_control_messages_without_an_answer_are_bounded(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.hello(b"p", "", job)
    for _ in range(5000):
        world.say(b"p", "", transfer.encode_control(Ping()))
    assert len(world.forwarded) <= 1000


@pytest.mark.parametrize(
    ("clients", "descriptors"),
    [(2, 400), (13, 400), (13, 5000), (40, 1000), (64, 5000), (100, 5000)],
)
def test_however_many_clients_take_what_they_can_each_other_has_room_for_a_job(
    clients: int, descriptors: int
) -> None:
    most = Need(descriptors // 3, descriptors)
    world = World(ServiceLimits(heartbeat_s=HEARTBEAT_S, most=most))
    names = [f"c{number}" for number in range(clients)]
    world.others = set(names)
    greedy, honest = names[:-1], names[-1]
    for number in range(70 if clients < 40 else 4):
        for client in greedy:
            # All that come and are refused come again.
            world.now += 2.0
            world.open(b"%s-%d" % (client.encode(), number), client, f"{number}.vma")
    world.open(b"honest", honest, "vm.vma")
    assert world.front.running[-1].client == honest
    if clients == 2:
        assert len(world.front.running) > 1  # the other one had more than one


def test_who_opens_jobs_that_store_nothing_again_and_again_waits_and_others_do_not() -> None:
    world = World(ServiceLimits(heartbeat_s=HEARTBEAT_S))
    world.others = {"eve", "alice"}
    opened = 0
    for number in range(200):
        job = world.open(b"e%d" % number, "eve", f"{number}.vma")
        if job in world.archivers:
            opened += 1
            world.say(b"e%d" % number, "eve", service.encode(service.JobCancel(job, "")))
            world.end(job, "cancelled")
            world.pass_time(0.01)
    assert opened == 64
    (refused,) = [m for m in world.heard_by(b"e199") if isinstance(m, service.JobRefused)]
    assert refused.code == "too-often"
    assert "may be opened in" in refused.reason
    job = world.open(b"alice", "alice", "vm.vma")
    assert job in world.archivers
    world.pass_time(20)
    assert world.open(b"late", "eve", "late.vma") in world.archivers


def test_jobs_that_are_stored_are_not_counted() -> None:
    world = World(ServiceLimits(heartbeat_s=HEARTBEAT_S))
    for number in range(300):
        job = world.open(b"h%d" % number, "host", f"{number}.vma")
        world.ready(job)
        world.store(job)
    assert len(world.stored) == 300
