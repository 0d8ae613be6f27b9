# SPDX-License-Identifier: Apache-2.0
"""The core of the service: whose job is whose, what is refused, and what a death leaves."""

from __future__ import annotations

import pytest

from tests.archiver.service.world import BOUNDS, HEARTBEAT_S, World, beat, refusal
from vmapipe.archiver.service.admission import ServiceLimits
from vmapipe.archiver.service.front import (
    DRAIN_S,
    ArchiverEvent,
    AttachFailed,
    ClientRevoked,
    PeerGone,
)
from vmapipe.archiver.service.jobs import START_S, STOP_S
from vmapipe.protocol import limits, service, transfer
from vmapipe.protocol.transfer import Abort, Ping


def test_a_job_is_opened_fed_and_stored(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    assert world.heard_by(b"c") == []
    world.ready(job)
    assert world.heard_by(b"c") == [service.Opened(limits.VERSION, HEARTBEAT_S)]
    world.hello(b"p", "", job)
    assert world.attached == {b"p": job}
    assert world.forwarded == [b"p"]
    world.store(job)
    (stored,) = world.heard_by(b"c")
    assert isinstance(stored, service.JobStored)
    assert stored.archive == "vm.vma"
    world.pass_time(DRAIN_S + 2)
    assert world.attached == {}
    assert world.unreleased == set()


def test_a_producer_before_opened_or_after_the_end_is_refused(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.hello(b"early", "", job)
    assert refusal(world, b"early") == "unknown-job"
    world.ready(job)
    world.store(job)
    world.hello(b"late", "", job)
    assert refusal(world, b"late") == "unknown-job"


def test_a_job_is_unknown_to_every_other_client(world: World) -> None:
    job = world.open(b"c", "alice", "vm.vma")
    world.ready(job)
    world.heard_by(b"c")
    world.hello(b"p1", "bob", job)
    assert refusal(world, b"p1") == "unknown-job"
    beat(world, b"p2", job, "bob")
    assert refusal(world, b"p2") == "unknown-job"
    world.say(b"p3", "bob", service.encode(service.JobCancel(job, "mine now")))
    assert refusal(world, b"p3") == "unknown-job"
    world.open(b"p4", "bob", "other.vma", job)
    assert refusal(world, b"p4") == "unknown-job"
    assert not world.stopping
    assert world.heard_by(b"c") == []


def test_a_producers_peer_that_is_another_client_all_at_once_is_not_heard(world: World) -> None:
    job = world.open(b"c", "alice", "vm.vma")
    world.ready(job)
    world.hello(b"p", "alice", job)
    world.say(b"p", "bob", transfer.encode_control(Ping()))
    assert world.forwarded == [b"p"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x.partial", "x.manifest.json"])
def test_a_name_that_is_none_is_refused(world: World, name: str) -> None:
    world.open(b"c", "", name)
    assert refusal(world, b"c") == "bad-name"
    assert not world.archivers


def test_nothing_that_exists_or_is_being_made_is_made_again(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.open(b"d", "", "vm.vma")
    assert refusal(world, b"d") == "exists"
    world.ready(job)
    world.store(job)
    world.open(b"e", "", "vm.vma")
    assert refusal(world, b"e") == "exists"


def test_a_silent_coordinator_ends_its_job_and_a_beat_keeps_it(world: World) -> None:
    silent = world.open(b"c", "", "1.vma")
    alive = world.open(b"d", "", "2.vma")
    world.ready(silent)
    world.ready(alive)
    for _ in range(HEARTBEAT_S + 2):
        world.pass_time(1)
        beat(world, b"d", alive)
    assert world.stopping == {silent}
    world.end(silent, "cancelled by SIGTERM")
    (failed,) = [event for event in world.log if event["event"] == "job-failed"]
    assert failed["text"] == f"its coordinator has been silent for {HEARTBEAT_S} s"


def test_a_machine_that_was_stopped_takes_nobody_for_dead(world: World) -> None:
    job = world.open(b"c", "", "1.vma")
    world.ready(job)
    world.now += 10 * HEARTBEAT_S
    world.pass_time(1)
    assert not world.stopping


def test_a_coordinator_that_comes_back_is_told_again_what_holds(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.begin(job, 65536, 1)
    beat(world, b"c2", job)
    opened, told = (
        service.Opened(limits.VERSION, HEARTBEAT_S),
        service.JobBegun(bytes(16), (65536, 1)),
    )
    assert world.heard_by(b"c2") == [service.Alive(), opened, told]
    beat(world, b"c2", job)
    assert world.heard_by(b"c2") == [service.Alive()]
    world.store(job)
    beat(world, b"c3", job)
    assert isinstance(world.heard_by(b"c3")[-1], service.JobStored)


def test_a_client_whose_archive_is_stored_may_come_again_at_once(world: World) -> None:
    """Its archiver lives on for a moment; how many of those there may be is bounded, too."""
    world.client_jobs = 1
    for number in range(2 * BOUNDS.max_jobs):
        job = world.open(b"c%d" % number, "", f"{number}.vma")
        world.ready(job)
        world.open(b"d%d" % number, "", "other.vma")
        assert refusal(world, b"d%d" % number) == "too-many-jobs"
        world.tell_stored(job)
    world.open(b"e", "", "other.vma")
    assert refusal(world, b"e") == "too-many-jobs"


def test_opening_a_job_twice_is_opening_it_once(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.open(b"c", "", "vm.vma", job)
    assert world.archivers == {job}
    world.ready(job)
    assert world.heard_by(b"c") == [service.Alive(), service.Opened(limits.VERSION, HEARTBEAT_S)]


def test_a_service_that_was_started_again_knows_no_job(world: World) -> None:
    beat(world, b"c", bytes(16))
    assert refusal(world, b"c") == "unknown-job"
    world.say(b"p", "", transfer.encode_control(Ping()))
    assert refusal(world, b"p") == "unknown-job"


def test_cancel_stops_the_job_and_an_archive_that_was_stored_all_the_same_is_told(
    world: World,
) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.say(b"c", "", service.encode(service.JobCancel(job, "cancelled by SIGINT")))
    assert world.stopping == {job}
    world.store(job)
    assert isinstance(world.heard_by(b"c")[-1], service.JobStored)


def test_an_archiver_that_is_killed_fails_its_job_and_its_producers_hear_why(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    other = world.open(b"d", "", "other.vma")
    world.ready(job)
    world.ready(other)
    world.hello(b"p", "", job)
    world.hello(b"q", "", other)
    world.end(job, "the archiver was killed by SIGKILL")
    assert world.heard_by(b"p") == [Abort("the archiver was killed by SIGKILL")]
    assert world.heard_by(b"c")[-1] == service.JobFailed("the archiver was killed by SIGKILL")
    assert world.heard_by(b"q") == []


def test_an_archiver_that_cannot_begin_is_a_refusal(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.end(job, "cannot create /vm.vma: Permission denied")
    assert refusal(world, b"c") == "failed"


def test_an_archiver_that_hangs_is_asked_and_then_killed(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.pass_time(START_S + 2)
    assert world.stopping == {job}
    world.stopping.clear()
    world.pass_time(STOP_S + 2)
    assert world.stopping == {job}


def test_strangers_are_answered_once_each_and_do_not_flood_the_log(world: World) -> None:
    for number in range(500):
        peer = number.to_bytes(4, "big")
        for _ in range(3):
            world.say(peer, "", [b"GET / HTTP/1.0"])
    assert len(world.said) == 500
    assert len(world.log) == 1
    world.pass_time(100)
    assert [event["text"] for event in world.log[1:]] == ["499 more strangers were refused"]


def test_old_connections_of_a_jobs_producers_make_room_for_new_ones(world: World) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    most = world.front.jobs[job].most_producers
    for number in range(most + 5):
        world.now += 0.1
        world.hello(number.to_bytes(4, "big"), "", job)
    assert len(world.attached) == most
    assert (0).to_bytes(4, "big") not in world.attached


def test_a_producer_whose_connection_ended_is_let_go_when_all_that_it_sent_has_come(
    world: World,
) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.hello(b"p", "", job)
    world.handle(PeerGone(b"p", world.now))
    world.say(b"p", "", [b"\x01", b"late"])
    assert world.forwarded[-1] == b"p"
    world.pass_time(DRAIN_S + 2)
    assert world.attached == {}
    world.hello(b"p2", "", job)
    assert world.attached == {b"p2": job}


def test_a_producer_for_which_there_is_no_descriptor_is_refused_and_harms_no_job(
    world: World,
) -> None:
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.hello(b"p", "", job)
    del world.attached[b"p"]  # it could not be done
    world.handle(AttachFailed(b"p", job))
    assert [m.code for m in world.heard_by(b"p") if isinstance(m, service.JobRefused)] == ["busy"]
    world.hello(b"p2", "", job)
    assert world.attached == {b"p2": job}
    assert world.stopping == set()


def test_nobody_hears_what_is_said_to_a_coordinator_whose_connection_has_ended(
    world: World,
) -> None:
    job = world.open(b"c", "alice", "vm.vma")
    world.ready(job)
    world.handle(PeerGone(b"c", world.now))
    world.said.clear()
    world.handle(ArchiverEvent(job, {"event": "notice", "text": "secret"}))
    # Somebody else has its name now.
    world.say(b"c", "eve", [b"x"])
    world.handle(ArchiverEvent(job, {"event": "notice", "text": "secret"}))
    assert [m for _, m in world.said if isinstance(m, service.JobNotice)] == []


def test_a_job_from_whose_producers_nothing_comes_is_ended() -> None:
    world = World(ServiceLimits(heartbeat_s=HEARTBEAT_S, idle_s=600))
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.begin(job, 65536, 65536)

    def tick(minutes: int, done: int) -> None:
        for _ in range(minutes * 6):
            world.hello(b"p", "", job) if b"p" not in world.attached else None
            world.say(b"p", "", transfer.encode_control(Ping()))
            beat(world, b"c", job)
            world.progress(job, done, done)
            world.pass_time(10)

    for part in range(1, 5):
        tick(9, part)
    assert world.stopping == set()
    tick(11, 4)
    assert world.stopping == {job}
    assert world.front.jobs[job].reason == "nothing has come from its producers for 600 s"


def test_a_job_that_has_all_may_wait_for_its_output() -> None:
    world = World(ServiceLimits(heartbeat_s=HEARTBEAT_S, idle_s=60))
    job = world.open(b"c", "", "vm.vma")
    world.ready(job)
    world.begin(job, 5, 7)
    world.progress(job, 5, 7)
    for _ in range(20):
        beat(world, b"c", job)
        world.pass_time(10)
    assert world.stopping == set()


def test_a_revoked_client_loses_its_jobs_and_nobody_else_does(world: World) -> None:
    job = world.open(b"c", "alice", "1.vma")
    other = world.open(b"d", "bob", "2.vma")
    world.ready(job)
    world.ready(other)
    world.handle(ClientRevoked("alice", world.now))
    assert world.stopping == {job}
