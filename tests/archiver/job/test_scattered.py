# SPDX-License-Identifier: Apache-2.0
"""Scattered clusters in shared memory: checked one by one, acknowledged when all are written."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.archiver.job.world import JOB, World, disk, read_images, spec
from tests.vma.archives import scan
from vmapipe.archiver.job.job import Job, JobPhase
from vmapipe.archiver.job.spec import ArchiveStored
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import Abort, Done, Refuse, SharedCluster, Welcome
from vmapipe.protocol.transfer_state import ProducerSide
from vmapipe.vma.scanner import ExtentRead

NAME = "a"


class Scatterer:
    """A producer whose memory holds every cluster, in an order of its own."""

    def __init__(self, data: bytes, chance: random.Random) -> None:
        self.chance = chance
        self.data = data
        clusters = -(-len(data) // CLUSTER_BYTES)
        self.places = list(range(clusters))
        chance.shuffle(self.places)
        self.memory = bytearray(clusters * CLUSTER_BYTES)
        for num, place in enumerate(self.places):
            piece = data[num * CLUSTER_BYTES :][:CLUSTER_BYTES]
            start = place * CLUSTER_BYTES
            self.memory[start : start + len(piece)] = piece
        self.todo = list(range(clusters))
        chance.shuffle(self.todo)
        self.side = ProducerSide(JOB, NAME, len(data), shared="/proc/1/fd/3")
        self.sent: list[list[SharedCluster]] = []
        self.spoilt = 0
        self.end_of_session: object = None

    def hear(self, parts: list[bytes]) -> None:
        message = self.side.receive(parts)
        if isinstance(message, Welcome):
            assert message.scattered
        if isinstance(message, Done | Refuse | Abort):
            self.end_of_session = message
        for clusters in self.sent[self.spoilt : self.side.acked]:
            # What is acknowledged is used for something else at once.
            for cluster in clusters:
                size = cluster.mask.bit_count() * 4096
                self.memory[cluster.position : cluster.position + size] = b"\xee" * size
        self.spoilt = self.side.acked

    def cluster(self, num: int) -> SharedCluster:
        size = min(CLUSTER_BYTES, len(self.data) - num * CLUSTER_BYTES)
        position = self.places[num] * CLUSTER_BYTES
        full = (1 << -(-size // 4096)) - 1
        return SharedCluster(
            num, position, full if any(self.memory[position : position + size]) else 0
        )

    def next(self, most: int) -> list[Part]:
        clusters = [self.cluster(self.todo.pop()) for _ in range(min(most, len(self.todo)))]
        self.sent.append(clusters)
        return self.side.scattered(clusters)


def world_of(producer: Scatterer, **changes: object) -> World:
    memory = memoryview(producer.memory).toreadonly()
    world = World(Job(spec(NAME, **changes), 0.0, lambda offer: memory))
    world.producers[NAME.encode()] = producer  # type: ignore[assignment]
    world.deliver(NAME.encode(), producer.side.hello())
    return world


@settings(max_examples=25)
@given(
    clusters=st.integers(1, 200),
    tail=st.integers(1, CLUSTER_BYTES),
    seed=st.integers(0, 1 << 32),
    stable=st.booleans(),
    held_clusters=st.integers(0, 200),
)
def test_they_make_the_disk_although_acknowledged_memory_is_used_again_at_once(
    clusters: int, tail: int, seed: int, stable: bool, held_clusters: int
) -> None:
    data = disk(seed, clusters, tail)
    chance = random.Random(seed)
    producer = Scatterer(data, chance)
    world = world_of(producer, stable=stable, hold_bytes=held_clusters * CLUSTER_BYTES)
    while producer.todo:
        if world.store.queue and chance.random() < 0.7:
            world.carry_out(world.store.write_one(world.job))
        else:
            world.deliver(NAME.encode(), producer.next(chance.randint(1, 64)))
    world.deliver(NAME.encode(), producer.side.end())
    while world.store.queue:
        world.carry_out(world.store.write_one(world.job))
    world.carry_out(world.job.handle(ArchiveStored()))
    assert world.job.phase is JobPhase.DONE, world.job.reason
    assert read_images(bytes(world.store.archive)) == {NAME: data}


def test_a_stable_archive_is_the_same_whatever_the_order_and_is_acknowledged_while_it_is_held() -> (
    None
):
    data = disk(5, 150, 4096)
    archives = set()
    for seed in range(4):
        producer = Scatterer(data, random.Random(seed))
        world = world_of(producer, stable=True)
        frames = 0
        while producer.todo:
            world.deliver(NAME.encode(), producer.next(10))
            frames += 1
            while world.store.queue:
                world.carry_out(world.store.write_one(world.job))
            assert producer.side.acked == frames, "nobody waits for what is held"
        world.deliver(NAME.encode(), producer.side.end())
        assert world.store.finished
        extents = [e for e in scan(bytes(world.store.archive)) if isinstance(e, ExtentRead)]
        assert len(extents) == 3
        archives.add(frozenset((e.extent.runs, bytes(e.data)) for e in extents))
    assert len(archives) == 1


def test_a_frame_that_spans_two_extents_is_acknowledged_with_the_second() -> None:
    producer = Scatterer(b"\x5a" * (100 * CLUSTER_BYTES), random.Random(1))
    world = world_of(producer)
    world.deliver(NAME.encode(), producer.next(50))
    world.deliver(NAME.encode(), producer.next(50))
    assert len(world.store.queue) == 1
    world.carry_out(world.store.write_one(world.job))
    assert producer.side.acked == 1, "the last clusters of frame 2 are in the open extent"
    world.deliver(NAME.encode(), producer.side.end())
    world.carry_out(world.store.write_one(world.job))
    assert producer.side.acked == 2


@pytest.mark.parametrize(
    ("clusters", "words"),
    [
        pytest.param(
            [(0, 0, 1), (1, 0, 1), (0, 0, 1)], "cluster 0 comes a second time", id="twice"
        ),
        pytest.param([(0, 0, 1), (3, 0, 1)], "out of range: 3", id="no such cluster"),
        pytest.param([(2, 0, 2)], "data beyond the device's end", id="beyond the end"),
        pytest.param([(0, 3 * CLUSTER_BYTES, 1)], "shared memory ends before", id="no memory"),
        pytest.param([(0, (1 << 64) - 1, 1)], "shared memory ends before", id="far away"),
        pytest.param([(0, 2 * CLUSTER_BYTES + 1, 0xFFFF)], "memory ends before", id="by a byte"),
    ],
)
def test_one_that_cannot_be_right_fails_the_job_and_names_the_device(
    clusters: list[tuple[int, int, int]], words: str
) -> None:
    producer = Scatterer(b"\x5a" * (2 * CLUSTER_BYTES + 4096), random.Random(1))
    world = world_of(producer)
    world.deliver(
        NAME.encode(), producer.side.scattered([SharedCluster(*each) for each in clusters])
    )
    assert world.job.phase is JobPhase.FAILED
    assert words in world.job.reason
    assert "'a'" in world.job.reason


def test_for_one_that_is_zero_no_memory_is_looked_at() -> None:
    producer = Scatterer(bytes(3 * CLUSTER_BYTES), random.Random(1))
    world = world_of(producer)
    zeroes = [SharedCluster(num, (1 << 64) - 1, 0) for num in (2, 0, 1)]
    world.deliver(NAME.encode(), producer.side.scattered(zeroes))
    world.deliver(NAME.encode(), producer.side.end())
    assert world.store.finished
    assert read_images(b"".join([world.store.archive, *world.store.queue[0].buffers])) == {
        NAME: bytes(3 * CLUSTER_BYTES)
    }


def test_the_memory_of_a_machine_comes_in_order_here_too() -> None:
    producer = Scatterer(b"\x5a" * (3 * CLUSTER_BYTES), random.Random(1))
    producer.side = ProducerSide(JOB, "vmstate", len(producer.data), shared="/proc/1/fd/3")
    world = World(Job(spec("vmstate"), 0.0, lambda offer: memoryview(producer.memory)))
    world.producers[b"a"] = producer  # type: ignore[assignment]
    world.deliver(b"a", producer.side.hello())
    world.deliver(b"a", producer.side.scattered([producer.cluster(num) for num in (0, 2)]))
    assert "non sequential vmstate write: 2, not 1" in world.job.reason
