# SPDX-License-Identifier: Apache-2.0
"""Work is cut and given so that nobody holds too much and everybody has something to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.restore import (
    MAX_RANGE_EXTENTS,
    ExtentWork,
    RangeWork,
    SyncWork,
    decode_for_worker,
)
from vmapipe.restore.archive.reader import FoundExtent
from vmapipe.restore.archive.slots import ExtentSlots, map_slots
from vmapipe.restore.workers.work import (
    InlineFeed,
    RateLimits,
    ThreadFeed,
    Work,
    WorkBuilder,
    WorkerTable,
)
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.syscalls import readable
from vmapipe.vma.extent import ClusterRun, Extent

MIB = 1 << 20


def piece(
    number: int, dev_id: int, mask: int, *, digest: bytes = b"", slot: int = -1
) -> FoundExtent:
    """An extent of 58 clusters."""
    data_bytes = 58 * mask.bit_count() * 4096
    run = ClusterRun(dev_id, number * 58, (mask,) * 58, 0)
    return FoundExtent(
        Extent(12800 + number * 10 * MIB, data_bytes, (run,)), bytes(512), None, digest, slot
    )


def works(maker: WorkBuilder, pieces: list[FoundExtent]) -> list[Work]:
    return list(maker.works(iter(pieces)))


def test_extents_of_a_file_go_out_some_mebibytes_at_a_time() -> None:
    maker = WorkBuilder({1}, set())
    made = works(maker, [piece(number, 1, 0xFFFF) for number in range(19)])
    messages = [decode_for_worker(work.parts) for work in made]
    assert [len(m.offsets) for m in messages if isinstance(m, RangeWork)] == [9, 9, 1]
    assert {work.slot for work in made} == {-1}
    assert [work.seq for work in made] == [1, 2, 3]
    assert sum(work.cluster_bytes for work in made) == 19 * 58 * CLUSTER_BYTES


def test_extents_without_work_cost_no_message_but_count() -> None:
    pieces = [piece(0, 1, 0), piece(1, 2, 0xFFFF), piece(2, 2, 0), piece(3, 1, 1)]
    for wanted, zeroed, busy in (
        ({1}, set[int](), [3]),
        ({1}, {1}, [0, 3]),
        ({1, 2}, {2}, [1, 2, 3]),
        (set[int](), set[int](), []),
    ):
        maker = WorkBuilder(wanted, zeroed)
        made = works(maker, pieces)
        offsets = [
            offset
            for work in made
            if work.parts and isinstance(message := decode_for_worker(work.parts), RangeWork)
            for offset in message.offsets
        ]
        assert offsets == [pieces[number].extent.offset for number in busy]
        assert sum(work.cluster_bytes for work in made) == 4 * 58 * CLUSTER_BYTES
        assert maker.totals.extents == 4


def test_what_has_a_digest_is_always_looked_at() -> None:
    made = works(WorkBuilder(set(), set()), [piece(0, 1, 0, digest=bytes(16))])
    message = decode_for_worker(made[0].parts)
    assert isinstance(message, RangeWork)
    assert message.digests == (bytes(16),)


def test_very_many_small_extents_stay_below_a_messages_limit() -> None:
    made = works(WorkBuilder({1}, {1}), [piece(n, 1, 0) for n in range(MAX_RANGE_EXTENTS + 1)])
    messages = [decode_for_worker(work.parts) for work in made]
    assert [len(m.sizes) for m in messages if isinstance(m, RangeWork)] == [MAX_RANGE_EXTENTS, 1]


def test_an_extent_of_a_stream_is_a_message_of_its_own_and_keeps_its_slot() -> None:
    maker = WorkBuilder({1}, set(), {1}, from_stream=True)
    made = works(maker, [piece(0, 1, 1, slot=7), piece(1, 2, 1, slot=9), piece(2, 1, 0)])
    message = decode_for_worker(made[0].parts)
    assert isinstance(message, ExtentWork)
    assert (message.offset, message.position) == (12800, 7)
    assert made[0].data_bytes == {1: 58 * 4096}
    # What nobody wants is no message, but its slot comes back all the same.
    assert [(bool(item.parts), item.slot) for item in made] == [(True, 7), (False, 9), (False, -1)]


def test_every_target_is_synced_once() -> None:
    messages = [decode_for_worker(work.parts) for work in WorkBuilder({1, 5}, ()).syncs([1, 5])]
    assert messages == [SyncWork(1, 1), SyncWork(2, 5)]


def work(seq: int, ahead: int = 2) -> Work:
    return Work(seq, [b"x"], ahead, 0, {})


@given(st.integers(1, 8), st.lists(st.integers(1, 4), max_size=60), st.randoms())
def test_nobody_has_too_much_and_work_never_stalls(
    count: int, limits: list[int], chance: object
) -> None:
    roster = WorkerTable()
    for number in range(count):
        roster.joined(f"w{number}")
    under_way: list[tuple[str, Work]] = []
    for seq, limit in enumerate(limits):
        item = work(seq, limit)
        while (free := roster.free_worker(item)) is None:
            assert under_way
            getattr(chance, "shuffle")(under_way)  # noqa: B009  Hypothesis names no type for it
            holder, done = under_way.pop()
            assert roster.done(holder, done.seq) is done
        roster.gave(free, item)
        under_way.append((free, item))
        assert sum(holder == free for holder, _ in under_way) <= limit
    assert roster.idle == (not under_way)


def test_nobody_gets_work_before_anybody_is_there() -> None:
    roster = WorkerTable()
    assert roster.free_worker(work(1)) is None
    assert roster.idle
    roster.joined("w")
    assert roster.free_worker(work(1)) == "w"


def test_an_answer_to_work_that_was_not_given_is_not_taken() -> None:
    roster = WorkerTable()
    roster.joined("w")
    roster.gave("w", work(1))
    assert roster.done("w", 2) is None
    assert roster.done("stranger", 1) is None


def test_a_feed_out_of_a_file_ends_and_raises_what_reading_raises() -> None:
    def failing() -> Iterator[Work]:
        yield work(1)
        raise Failure("torn")

    feed = InlineFeed(iter([work(1)]))
    assert [(feed.poll() is None, feed.ended) for _ in range(2)] == [(False, False), (True, True)]
    broken = InlineFeed(failing())
    broken.poll()
    with pytest.raises(Failure, match="torn"):
        broken.poll()


def polled(feed: ThreadFeed) -> Work | None:
    """The next work, waiting for it as the coordinator does."""
    while True:
        item = feed.poll()
        if item is not None or feed.ended:
            return item
        assert readable([feed.fd], 60)


def test_a_feed_out_of_a_pipe_gives_all_in_order_then_the_error() -> None:
    def failing() -> Iterator[Work]:
        for seq in range(5000):
            yield work(seq)
        raise Failure("torn")

    feed = ThreadFeed(failing(), lambda: None)
    for seq in range(5000):
        item = polled(feed)
        assert item is not None
        assert item.seq == seq
    with pytest.raises(Failure, match="torn"):
        polled(feed)
    feed.close()


def test_a_feed_out_of_a_pipe_ends() -> None:
    feed = ThreadFeed(iter([work(1)]), lambda: None)
    assert polled(feed) is not None
    assert polled(feed) is None
    assert feed.ended
    feed.close()


def test_a_feed_reads_ahead_only_so_far_and_stops_when_it_is_closed() -> None:
    read: list[int] = []

    def endless() -> Iterator[Work]:
        for seq in range(1_000_000):
            read.append(seq)
            yield work(seq)

    feed = ThreadFeed(endless(), lambda: None)
    assert polled(feed) is not None
    feed.close()
    assert len(read) < 1000


def test_slots_are_waited_for_until_the_end() -> None:
    slots = ExtentSlots(1)
    taken = [slots.take() for _ in range(5)]
    assert len(set(taken)) == 5
    slots.view(taken[1], 3)[:] = b"abc"
    mapped = map_slots(slots.fd)
    assert bytes(mapped[taken[1] : taken[1] + 3]) == b"abc"
    mapped.release()
    slots.give(taken[2])
    assert slots.take() == taken[2]
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(Cancelled):
            slots.take()
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    slots.stop()
    assert ended.wait(60)
    thread.join()
    slots.close()


def test_a_limit_holds_over_time_with_a_short_burst() -> None:
    pace = RateLimits({1: 1000}, now=0.0)
    assert pace.wait_s({}, 0.0) == 0
    assert pace.wait_s({1: 500}, 0.0) == 0
    pace.took({1: 500}, 0.0)
    assert pace.wait_s({1: 1}, 0.1) == pytest.approx(0.4)
    # After a long pause, at most an eighth of a second is made up for.
    pace.took({1: 1000}, 100.0)
    assert pace.wait_s({1: 1}, 100.0) == pytest.approx(0.875)
