# SPDX-License-Identifier: Apache-2.0
"""The sink in memory: what comes once, twice, in parts, out of order, and when nobody takes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.clusters.cluster_set import ClusterSet
from vmapipe.producer.chunks import MAX_PARTIAL_CLUSTERS, ZEROES, ZeroRuns
from vmapipe.producer.qemu_sink import QemuSink
from vmapipe.producer.runs import packed
from vmapipe.producer.shared_memory import RingAllocator
from vmapipe.protocol.limits import MAX_RUN_CLUSTERS
from vmapipe.runtime.syscalls import readable

CLUSTER = 65536
SIZE = 5 * CLUSTER + 1536
START = 4096


class Target:
    """A sink, and a disk that is put together from what it hands on."""

    def __init__(self, size: int = SIZE, room: int = 8 * CLUSTER, wait_s: float = 20) -> None:
        self.memory = memoryview(bytearray(START + room))
        self.sink = QemuSink("d", size, self.memory, range(START, START + room), wait_s)
        self.sink.piece_clusters = 4
        self.disk = bytearray(b"?" * size)
        self.seen: list[int] = []

    def take(self, *, keep: bool = False) -> list[int]:
        """Take all that waits; positions whose memory is still held when `keep`."""
        held = []
        while (arrived := self.sink.next()) is not None:
            first, count, position, length = arrived
            self.seen += range(first, first + count)
            at = first * CLUSTER
            if position < 0:
                end = min(len(self.disk), at + count * CLUSTER)
                self.disk[at:end] = bytes(end - at)
            else:
                self.disk[at : at + length] = self.memory[position : position + length]
                held.append(position)
            self.sink.sent(count)
        if not keep:
            self.sink.give_back(held)
        return held


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.sink.close()


def pattern(offset: int, length: int) -> bytes:
    return bytes((offset + i) // 512 % 251 + 1 for i in range(length))


WRITES = st.lists(
    st.tuples(
        st.integers(0, SIZE // 512 - 1),
        st.integers(1, 300),
        st.sampled_from(["write", "try", "place", "zero", "try zero"]),
    ),
    max_size=25,
)


@settings(max_examples=30)  # the model goes sector by sector
@given(WRITES)
def test_any_pieces_in_any_order_make_the_disk_and_each_cluster_comes_once(
    writes: list[tuple[int, int, str]],
) -> None:
    """Wherever writes overlap, the first one counts, as long as its cluster had not gone yet."""
    target = Target()
    model: list[int | None] = [None] * (SIZE // 512)
    whole = [(at, SIZE // 512 // 4 + 1, "write") for at in range(0, SIZE // 512, SIZE // 2048)]
    for sector, most, how in [*writes, *whole]:
        count = min(most, SIZE // 512 - sector)
        if count < 1:
            continue
        value = 0 if "zero" in how else sector % 250 + 1
        for index in range(sector, sector + count):
            # A cluster that is written whole replaces the parts that came before.
            first = index - index % 128
            end = min(first + 128, SIZE // 512)
            covers = sector <= first and sector + count >= end
            gone = all(v is not None for v in model[first:end])
            if model[index] is None or (covers and not gone and index == first):
                targets = range(first, end) if covers and index == first else (index,)
                for at in targets:
                    model[at] = value
        data = memoryview(bytes([value]) * (count * 512))
        offset = sector * 512
        if how == "try zero" and target.sink.try_zeroes(offset, len(data)):
            pass
        elif "zero" in how:
            target.sink.write_zeroes(offset, len(data), may_hole=True, fast_only=False)
        elif how == "place" and (place := target.sink.place(offset, len(data))):
            assert target.take() == []  # nothing is sent before it has come
            place.room[:] = data
            target.sink.placed(place, offset)
        elif how == "write" or not target.sink.try_write(data, offset):
            target.sink.write(data, offset)
        target.take()
    assert target.sink.missing == 0
    assert sorted(target.seen) == list(range(6))
    assert target.sink.used_bytes == 0
    assert bytes(target.disk) == b"".join(bytes([v or 0]) * 512 for v in model)
    target.sink.close()


def test_a_write_without_room_waits_until_there_is_some() -> None:
    small = Target(room=4 * CLUSTER)
    data = memoryview(pattern(0, SIZE))
    assert small.sink.try_write(data[:CLUSTER], 0)
    held = small.take(keep=True)
    writer = threading.Thread(target=small.sink.write, args=(data[CLUSTER:], CLUSTER))
    writer.start()
    while small.sink.missing or small.sink.waiting_writes:
        assert readable([small.sink.fd], 60)
        small.take()
        if held:
            small.sink.give_back(held)
            held = []
    writer.join(60)
    small.take()
    assert bytes(small.disk) == bytes(data)
    small.sink.close()


def test_a_write_that_has_waited_for_too_long_ends_the_backup_and_succeeds() -> None:
    small = Target(room=CLUSTER, wait_s=0.05)
    data = memoryview(pattern(0, 2 * CLUSTER))
    small.sink.write(data, 0)  # returns: the guest goes on
    assert "a write has waited" in small.sink.failure
    assert "--guest-wait" in small.sink.failure
    assert readable([small.sink.fd], 0)
    small.sink.close()


def test_a_failed_sink_takes_everything_at_once_and_lets_those_go_who_wait() -> None:
    small = Target(room=CLUSTER)
    data = memoryview(pattern(0, 2 * CLUSTER))
    writer = threading.Thread(target=small.sink.write, args=(data, 0))
    assert small.sink.next() is None
    writer.start()
    assert readable([small.sink.fd], 60)
    small.sink.fail("the archiver is gone")
    writer.join(60)
    assert not writer.is_alive()
    assert small.sink.try_write(memoryview(bytes(20 * CLUSTER)), 7)
    small.sink.write(data, 3)
    small.sink.write_zeroes(0, SIZE, may_hole=True, fast_only=True)
    assert small.sink.failure == "the archiver is gone"
    small.sink.close()


def test_too_many_clusters_in_parts_end_the_backup_and_not_the_guest() -> None:
    size = (MAX_PARTIAL_CLUSTERS + 2) * CLUSTER
    target = Target(size)
    for cluster in range(MAX_PARTIAL_CLUSTERS + 1):
        target.sink.write(memoryview(b"x" * 512), cluster * CLUSTER)
    assert "in pieces" in target.sink.failure
    target.sink.close()


def test_reads_are_zero_and_the_other_requests_mean_nothing(target: Target) -> None:
    buffer = memoryview(bytearray(b"x" * 9))
    assert target.sink.try_read(buffer, 0)
    assert bytes(buffer) == bytes(9)
    target.sink.flush()
    target.sink.trim(0, SIZE)
    target.sink.cache(0, SIZE)
    assert list(target.sink.extents(0, 10)) == [(10, 0)]
    assert target.sink.next() is None


def test_neighbouring_zeroes_become_one_run(target: Target) -> None:
    for cluster in (0, 2, 3, 4):
        target.sink.write_zeroes(cluster * CLUSTER, CLUSTER, may_hole=False, fast_only=False)
    runs = []
    while (arrived := target.sink.next()) is not None:
        runs.append((arrived.first, arrived.clusters))
        target.sink.sent(arrived.clusters)
    assert runs == [(0, 1), (2, 3)]


@given(st.lists(st.integers(0, 60), unique=True), st.integers(1, 3))
def test_zeroes_become_the_fewest_runs_in_whatever_order_they_come(
    order: list[int], width: int
) -> None:
    zeroes = ZeroRuns()
    for place in order:
        zeroes.add(place * width, width)
    runs = [(run.first, run.clusters) for run in zeroes.take()]
    here = {place * width + i for place in order for i in range(width)}
    assert [c for first, count in runs for c in range(first, first + count)] == sorted(here)
    assert len(runs) == len({c for c in here if c - 1 not in here})
    assert len(zeroes) == 0


def test_a_run_of_zeroes_longer_than_a_frame_is_cut() -> None:
    zeroes = ZeroRuns()
    zeroes.add(0, MAX_RUN_CLUSTERS + 5)
    assert [run.clusters for run in zeroes.take()] == [MAX_RUN_CLUSTERS, 5]


def test_the_sender_is_woken_for_zeroes_only_when_they_are_the_last(target: Target) -> None:
    """A frame for each megabyte of empty space would cost more than all else."""
    assert target.sink.next() is None
    for cluster in range(5):
        assert target.sink.try_zeroes(cluster * CLUSTER, CLUSTER)
        assert readable([target.sink.fd], 0) == []
    assert target.sink.try_zeroes(5 * CLUSTER, 1536)
    assert readable([target.sink.fd], 0)
    arrived = target.sink.next()
    assert arrived is not None
    assert (arrived.first, arrived.clusters) == (0, 6)


def test_zeroes_that_come_in_between_wait_for_more_of_them(target: Target) -> None:
    assert target.sink.try_zeroes(0, CLUSTER)
    assert target.sink.next() is not None
    target.sink.sent(1)
    assert target.sink.try_zeroes(2 * CLUSTER, CLUSTER)
    assert target.sink.next() is None  # so soon after the last ones
    assert target.sink.try_zeroes(CLUSTER, CLUSTER)
    assert target.sink.try_zeroes(3 * CLUSTER, SIZE - 3 * CLUSTER)
    arrived = target.sink.next()
    assert arrived is not None
    assert (arrived.first, arrived.clusters) == (1, 5)


@settings(max_examples=20)  # the disks are long
@given(st.lists(st.integers(0, 5), unique=True, max_size=5))
def test_the_rest_of_a_thin_disk_is_zero_and_each_cluster_comes_once(came: list[int]) -> None:
    target = Target()
    for cluster in came:
        data = memoryview(pattern(0, min(CLUSTER, SIZE - cluster * CLUSTER)))
        assert target.sink.try_write(data, cluster * CLUSTER)
    assert target.sink.arrived == len(came)
    target.sink.rest_is(ZEROES)
    target.take()
    assert sorted(target.seen) == list(range(6))
    assert target.sink.missing == 0
    for cluster in range(6):
        at = cluster * CLUSTER
        wanted = pattern(0, CLUSTER) if cluster in came else bytes(CLUSTER)
        assert bytes(target.disk[at : at + CLUSTER]) == wanted[: SIZE - at]
    target.sink.close()


def test_a_long_run_of_zeroes_can_be_sent_in_steps(target: Target) -> None:
    target.sink.write_zeroes(0, SIZE, may_hole=False, fast_only=False)
    assert target.sink.next() is not None
    target.sink.sent(2)
    arrived = target.sink.next()
    assert arrived is not None
    assert (arrived.first, arrived.clusters) == (2, 4)


def test_the_last_cluster_has_room_for_whole_blocks(target: Target) -> None:
    target.sink.try_write(memoryview(b"x" * 1536), 5 * CLUSTER)
    arrived = target.sink.next()
    assert arrived is not None
    run = packed(target.memory, arrived.position, arrived.first, arrived.length)
    assert (run.length, run.masks) == (4096, b"\0\1")


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 40))))
def test_arrivals_know_what_is_new(ranges: list[tuple[int, int]]) -> None:
    arrivals, model = ClusterSet(140), set[int]()
    for first, count in ranges:
        wanted = set(range(first, first + count))
        runs = list(arrivals.missing(first, first + count))
        new = {c for a, n in runs for c in range(a, a + n)}
        assert new == wanted - model
        assert arrivals.count_in(first, count) == len(wanted & model)
        for run in runs:
            arrivals.add(*run)
        model |= wanted
    assert arrivals.count == len(model)
    assert [c for c in range(140) if arrivals.has(c)] == sorted(model)


@given(st.lists(st.one_of(st.integers(1, 9), st.none()), max_size=80), st.randoms())
def test_room_is_never_given_twice_and_comes_back(steps: list[int | None], chance) -> None:  # type: ignore[no-untyped-def]
    room, held = RingAllocator(100, 24), dict[int, int]()
    for step in steps:
        if step is None:
            if held:
                position = chance.choice(sorted(held))
                room.give_back(position)
                del held[position]
            continue
        position = room.take(step)
        if position is None:
            assert held
            continue
        assert position >= 100
        assert position + step <= 124
        assert all(position >= a + n or a >= position + step for a, n in held.items())
        held[position] = step
    assert room.used == sum(held.values())
    for position in held:
        room.give_back(position)
    assert room.take(24) == 100


def test_what_took_its_room_first_is_sent_first_however_long_its_copy_takes(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent later, it would hold up all the room behind it: it is given back in its order."""
    started, may_go_on = threading.Event(), threading.Event()
    fill = target.sink._fill

    def slow_fill(position: int, data: memoryview | bytes) -> None:
        if position == START:
            started.set()
            assert may_go_on.wait(30)
        fill(position, data)

    monkeypatch.setattr(target.sink, "_fill", slow_fill)
    first = threading.Thread(target=target.sink.write, args=(memoryview(bytes(CLUSTER)), 0))
    first.start()
    assert started.wait(30)
    assert target.sink.try_write(memoryview(pattern(CLUSTER, CLUSTER)), CLUSTER)
    assert target.sink.next() is None
    may_go_on.set()
    first.join(30)
    assert readable([target.sink.fd], 30)
    target.take()
    assert target.seen == [0, 1]


def test_a_write_that_comes_in_counts_when_it_is_there_and_what_came_meanwhile_stays(
    target: Target,
) -> None:
    abandoned, late = target.sink.place(0, CLUSTER), target.sink.place(CLUSTER, 2 * CLUSTER)
    assert abandoned is not None
    assert late is not None
    late.room[:] = b"L" * (2 * CLUSTER)
    assert target.sink.try_write(memoryview(b"m" * CLUSTER), CLUSTER)
    # It waits for its turn behind both.
    assert target.sink.next() is None
    target.sink.unplaced(abandoned)
    assert target.sink.missing == 5
    target.sink.placed(late, CLUSTER)
    assert readable([target.sink.fd], 30)
    target.take()
    assert sorted(target.seen) == [1, 2]
    assert bytes(target.disk[CLUSTER : 3 * CLUSTER]) == b"m" * CLUSTER + b"L" * CLUSTER
    assert target.sink.used_bytes == 0


def test_a_write_that_comes_in_while_the_backup_fails_is_dropped(target: Target) -> None:
    place = target.sink.place(0, CLUSTER)
    assert place is not None
    target.sink.fail("the disk is full")
    target.sink.placed(place, 0)
    assert target.sink.next() is None
    assert target.sink.used_bytes == 0
    assert target.sink.place(0, CLUSTER) is None
