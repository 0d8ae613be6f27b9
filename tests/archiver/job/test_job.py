# SPDX-License-Identifier: Apache-2.0
"""The core of a job: every archive is whole, every job ends, and no fault goes unnamed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.archiver.job.world import JOB, UUID, Producer, World, disk, read_images, spec
from vmapipe.archiver.job.job import Job, JobPhase
from vmapipe.archiver.job.spec import ArchiveStored, JobAborted, TimePassed
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol import limits, transfer
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import Abort, Done, Refuse
from vmapipe.vma.header import Config


@settings(max_examples=25)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, CLUSTER_BYTES)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 1 << 32),
    in_order=st.booleans(),
    stable=st.booleans(),
    held_clusters=st.integers(0, 200),
)
def test_a_job_ends_with_every_disk_whatever_the_order_and_the_speed_of_each(
    sizes: list[tuple[int, int]], seed: int, in_order: bool, stable: bool, held_clusters: int
) -> None:
    disks = {
        f"disk{index}": disk(seed + index, clusters, tail)
        for index, (clusters, tail) in enumerate(sizes)
    }
    held = held_clusters * CLUSTER_BYTES
    made = spec(*disks, in_order=in_order, stable=stable, hold_bytes=held)
    world = World(Job(made, 0.0))
    for name in reversed(disks):
        world.add(name, disks[name])
    world.run(random.Random(seed))
    assert world.job.phase is JobPhase.DONE, world.job.reason
    assert read_images(bytes(world.store.archive)) == disks
    assert all(p.end_of_session == Done(UUID) for p in world.producers.values())


def test_in_order_the_same_disks_make_the_same_archive() -> None:
    disks = {"b": disk(1, 70), "a": disk(2, 70)}
    archives = set()
    for seed in range(5):
        world = World(Job(spec("b", "a", in_order=True, uuid=b""), 0.0))
        order = list(disks)
        random.Random(seed).shuffle(order)
        for name in order:
            world.add(name, disks[name])
        world.run(random.Random(seed))
        archives.add(bytes(world.store.archive))
    assert len(archives) == 1


def test_another_disk_size_or_config_makes_another_uuid_in_a_reproducible_archive() -> None:
    uuids = set()
    for clusters, config in ((1, b"x"), (2, b"x"), (1, b"y")):
        job = Job(spec("a", in_order=True, uuid=b"", configs=(Config("c", config),)), 0.0)
        world = World(job)
        world.add("a", disk(1, clusters))
        uuids.add(job.uuid)
    assert len(uuids) == 3


def test_a_stable_uuid_is_the_same_at_another_time_and_for_another_size_and_no_other_machines() -> (
    None
):
    def uuid_of(name: str, clusters: int, config: bytes, ctime_s: int) -> bytes:
        configs = (Config("c", config),)
        job = Job(spec(name, stable=True, uuid=b"", configs=configs, ctime_s=ctime_s), 0.0)
        World(job).add(name, disk(1, clusters))
        return job.uuid

    one = uuid_of("a", 1, b"x", 1)
    assert uuid_of("a", 2, b"x", 99) == one
    assert len({one, uuid_of("b", 1, b"x", 1), uuid_of("a", 1, b"y", 1)}) == 3


def test_an_archive_of_configs_only_needs_no_producer() -> None:
    world = World(Job(spec(configs=(Config("vm.conf", b"x"),)), 0.0))
    assert world.store.finished
    world.run(random.Random(0))
    assert world.job.phase is JobPhase.DONE


def test_254_devices_go_through_with_the_smallest_windows() -> None:
    disks = {f"disk{index}": disk(index, 3) for index in range(254)}
    world = World(Job(spec(*disks), 0.0))
    for name, data in disks.items():
        world.add(name, data)
    assert sum(p.side.credit for p in world.producers.values()) <= 254 * limits.MIN_WINDOW_BYTES
    world.run(random.Random(1))
    assert world.job.phase is JobPhase.DONE
    assert read_images(bytes(world.store.archive)) == disks


def refusal(world: World, name: str, job: bytes = JOB, data: bytes = b"x") -> object:
    return world.add(name, data, job).end_of_session


def test_a_stranger_is_refused_with_the_reason_and_the_job_goes_on() -> None:
    world = World(Job(spec("a", "b"), 0.0))
    world.add("a", b"x")
    assert refusal(world, "c") == Refuse("unknown-device", "the job has no device 'c'")
    assert refusal(world, "b", job=bytes(16)) == Refuse("unknown-job", "another job is made here")
    world.deliver(b"junk", [b"\xc1\xc1"])
    world.deliver(b"junk", [b"\xc1\xc1"])
    assert len(world.notices) == 3, "each is reported once"
    del world.producers[b"c"], world.producers[b"b"]
    world.producers[b"b2"] = world.producers[b"a"]
    late = Producer("b", b"y", JOB)
    world.producers[b"b2"] = late
    world.deliver(b"b2", late.side.hello())
    while late.able:
        world.deliver(b"b2", late.next_message())
    first = world.producers[b"a"]
    while first.able:
        world.deliver(b"a", first.next_message())
    assert world.store.finished


def test_a_second_producer_of_a_device_is_refused_and_the_first_goes_on() -> None:
    world = World(Job(spec("a", "b"), 0.0))
    world.add("a", b"x")
    twin = Producer("a", b"x", JOB)
    world.producers[b"twin"] = twin
    world.deliver(b"twin", twin.side.hello())
    assert twin.end_of_session == Refuse("duplicate-device", "'a' is here already")
    assert world.job.phase is JobPhase.GATHERING


def one_device(clusters: int = 3) -> tuple[World, Producer]:
    world = World(Job(spec("a", "b"), 0.0))
    producer = world.add("a", disk(1, clusters))
    world.add("b", b"x")
    return world, producer


def raw_run(producer: Producer, first: int, count: int, masks: bytes, payload: bytes) -> list[Part]:
    return transfer.encode_run(
        producer.side.sent_frames + 1, producer.side.dev_id, first, count, masks, payload
    )


@pytest.mark.parametrize(
    ("first", "count", "masks", "words"),
    [
        (3, 1, b"", "out of range: 3"),
        (2, 2, b"", "out of range: 3"),
        (0, 1 << 18, b"", "out of range"),
        (2, 1, b"\x80\x00", "beyond the device's end"),
    ],
)
def test_a_cluster_beyond_the_end_fails_the_job_and_names_the_device(
    first: int, count: int, masks: bytes, words: str
) -> None:
    world = World(Job(spec("a"), 0.0))
    producer = world.add("a", disk(1, 3, tail=4096))
    payload = bytes([1]) * 4096 if masks else b""
    world.deliver(b"a", raw_run(producer, first, count, masks, payload))
    assert world.job.phase is JobPhase.FAILED
    assert world.store.abandoned
    assert words in world.job.reason
    assert "'a'" in world.job.reason


def test_a_cluster_sent_twice_fails_the_job() -> None:
    world, producer = one_device()
    world.deliver(b"a", producer.side.run(0, 1, b"", b""))
    world.deliver(b"a", producer.side.run(0, 2, b"", b""))
    assert "cluster 0 comes a second time" in world.job.reason


def test_an_end_before_the_last_cluster_fails_the_job_and_names_the_missing_one() -> None:
    world, producer = one_device()
    world.deliver(b"a", producer.side.run(0, 2, b"", b""))
    world.deliver(b"a", producer.side.end())
    assert "incomplete: cluster 2 never came" in world.job.reason


def test_a_failing_producer_fails_the_job_with_its_own_words() -> None:
    world, producer = one_device()
    world.deliver(b"a", producer.side.fail("disk 'a': cannot read /x at offset 5: I/O error"))
    assert world.job.reason == "disk 'a': cannot read /x at offset 5: I/O error"
    assert isinstance(world.producers[b"b"].end_of_session, Abort)


def test_a_failing_output_tells_every_producer_why() -> None:
    world, producer = one_device()
    world.carry_out(world.job.handle(JobAborted("No space left on device")))
    assert producer.end_of_session == Abort("No space left on device")
    assert world.store.abandoned
    world.carry_out(world.job.handle(JobAborted("something else")))
    assert world.job.reason == "No space left on device"


def test_a_silent_producer_fails_the_job_after_the_heartbeat_limit() -> None:
    world, _ = one_device()
    world.deliver(b"b", world.producers[b"b"].side.ping(), now=20.0)
    assert ticks_until_the_end(world, 0.0) == 31
    assert world.job.reason == "the producer of device 'a' has been silent for 30 s"


def ticks_until_the_end(world: World, start: float) -> int:
    """A tick a second; the second at which the job has failed."""
    for second in range(200):
        world.carry_out(world.job.handle(TimePassed(start + second)))
        if world.job.phase is JobPhase.FAILED:
            return second
    pytest.fail("the job goes on for ever")


def test_while_the_archiver_itself_was_stopped_nobodys_silence_counts() -> None:
    world, _ = one_device()
    world.carry_out(world.job.handle(TimePassed(1.0)))
    world.carry_out(world.job.handle(TimePassed(1000.0)))
    assert world.job.phase is JobPhase.RUNNING
    # Of the 30 s, one had passed before.
    assert ticks_until_the_end(world, 1000.0) == 30


def test_who_spoke_right_after_the_stop_is_noticed_as_soon_as_anybody_when_it_dies() -> None:
    world, producer = one_device()
    world.carry_out(world.job.handle(TimePassed(1.0)))
    world.deliver(b"a", producer.side.ping(), now=1000.0)
    world.deliver(b"b", world.producers[b"b"].side.ping(), now=1000.0)
    assert ticks_until_the_end(world, 1000.0) == 31


def test_before_the_welcome_a_producer_may_be_silent_for_30_s_whatever_the_limit() -> None:
    world = World(Job(spec("a", "b", heartbeat_s=3), 0.0))
    first = world.add("a", b"x")
    for second in range(25):
        world.carry_out(world.job.handle(TimePassed(float(second))))
    second_one = Producer("b", b"y", JOB)
    world.producers[b"b"] = second_one
    world.deliver(b"b", second_one.side.hello(), now=25.0)
    world.carry_out(world.job.handle(TimePassed(27.0)))
    assert world.job.phase is JobPhase.RUNNING
    world.deliver(b"b", second_one.side.ping(), now=27.0)
    world.carry_out(world.job.handle(TimePassed(29.0)))
    assert world.job.reason == "the producer of device 'a' has been silent for 3 s"
    assert isinstance(first.end_of_session, Abort)


def test_a_failure_while_the_archive_is_stored_is_not_turned_into_success() -> None:
    world = World(Job(spec("a"), 0.0))
    producer = world.add("a", b"x")
    while producer.able:
        world.deliver(b"a", producer.next_message())
    assert world.store.finished
    world.deliver(b"a", producer.side.fail("cancelled"))
    world.carry_out(world.job.handle(ArchiveStored()))
    assert world.job.phase is JobPhase.FAILED


def test_a_producer_that_never_comes_is_named_after_the_start_limit() -> None:
    world = World(Job(spec("a", "b", "c"), 0.0))
    world.add("a", b"x")
    for now in range(0, 60, 10):
        world.deliver(b"a", world.producers[b"a"].side.ping(), now=float(now))
        for second in range(0, 10, 4):
            world.carry_out(world.job.handle(TimePassed(float(now + second))))
    world.carry_out(world.job.handle(TimePassed(61.0)))
    assert world.job.reason == "the producer of device 'b', 'c' did not come within 60 s"


def test_vmstate_is_taken_in_order_only_and_its_length_is_what_came() -> None:
    world = World(Job(spec("vmstate"), 0.0))
    producer = world.add("vmstate", b"x" * 100)
    world.deliver(b"vmstate", raw_run(producer, 0, 5, b"", b""))
    producer.side.sent_frames, producer.side.sent_clusters = 1, 5
    assert world.job.phase is JobPhase.RUNNING
    world.deliver(b"vmstate", raw_run(producer, 6, 1, b"", b""))
    assert "non sequential vmstate write" in world.job.reason


def test_too_much_for_one_header_fails_the_job_with_the_limit() -> None:
    configs = tuple(Config(f"c{index}", bytes(65000)) for index in range(9))
    world = World(Job(spec("a", configs=configs), 0.0))
    producer = world.add("a", b"x")
    assert "the limit is 524288" in world.job.reason
    assert isinstance(producer.end_of_session, Abort)


def test_a_producer_hears_of_all_that_is_written_however_little_data_that_is() -> None:
    """Its memory is full of clusters that are nearly all zero: it waits for this, we for it."""
    world = World(Job(spec("a", "b"), 0.0))
    producer = world.add("a", (b"x" + bytes(CLUSTER_BYTES - 1)) * 130)
    world.add("b", b"x")
    block = b"x" + bytes(4095)
    for cluster in range(130):
        world.deliver(b"a", producer.side.run(cluster, 1, b"\x00\x01", block))
    assert world.store.queue
    while world.store.queue:
        world.carry_out(world.store.write_one(world.job))
    # What is left is in the one extent that is still open.
    assert producer.side.acked >= 130 - 59
