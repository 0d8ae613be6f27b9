# SPDX-License-Identifier: Apache-2.0
"""Work is cut and given so that nobody holds too much and everybody has something to do."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.protocol.restore_work import (
    MAX_RANGE_EXTENTS,
    ExtentWork,
    RangeWork,
    SyncWork,
    decode_for_worker,
)
from vmapipe.restore.feed import InlineFeed, ThreadFeed
from vmapipe.restore.handout import CREDIT_BYTES, Roster, Work, WorkMaker
from vmapipe.restore.pace import Pace
from vmapipe.restore.reading import Piece
from vmapipe.runtime.errors import Failure
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.layout import CLUSTER_BYTES

MIB = 1 << 20


def piece(
    number: int, dev_id: int, mask: int, *, data: bytes | None = None, digest: bytes = b""
) -> Piece:
    """An extent of 58 clusters; out of a file unless it has data."""
    data_bytes = 58 * mask.bit_count() * 4096
    run = ClusterRun(dev_id, number * 58, (mask,) * 58, 0)
    return Piece(Extent(12800 + number * 10 * MIB, data_bytes, (run,)), bytes(512), data, digest)


def works(maker: WorkMaker, pieces: list[Piece]) -> list[Work]:
    return list(maker.works(iter(pieces)))


def test_extents_of_a_file_go_out_some_mebibytes_at_a_time() -> None:
    maker = WorkMaker({1}, set())
    made = works(maker, [piece(number, 1, 0xFFFF) for number in range(7)])
    messages = [decode_for_worker(work.parts) for work in made]
    assert [len(m.offsets) for m in messages if isinstance(m, RangeWork)] == [3, 3, 1]
    assert {work.cost_bytes for work in made} == {0}
    assert [work.seq for work in made] == [1, 2, 3]
    assert sum(work.cluster_bytes for work in made) == 7 * 58 * CLUSTER_BYTES


def test_extents_without_work_cost_no_message_but_count() -> None:
    pieces = [piece(0, 1, 0), piece(1, 2, 0xFFFF), piece(2, 2, 0), piece(3, 1, 1)]
    for wanted, zeroed, busy in (
        ({1}, set[int](), [3]),
        ({1}, {1}, [0, 3]),
        ({1, 2}, {2}, [1, 2, 3]),
        (set[int](), set[int](), []),
    ):
        maker = WorkMaker(wanted, zeroed)
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
    made = works(WorkMaker(set(), set()), [piece(0, 1, 0, digest=bytes(16))])
    message = decode_for_worker(made[0].parts)
    assert isinstance(message, RangeWork)
    assert message.digests == (bytes(16),)


def test_very_many_small_extents_stay_below_a_messages_limit() -> None:
    made = works(WorkMaker({1}, {1}), [piece(n, 1, 0) for n in range(MAX_RANGE_EXTENTS + 1)])
    messages = [decode_for_worker(work.parts) for work in made]
    assert [len(m.sizes) for m in messages if isinstance(m, RangeWork)] == [MAX_RANGE_EXTENTS, 1]


def test_an_extent_with_its_data_is_a_message_and_costs_its_memory() -> None:
    made = works(WorkMaker({1}, set(), {1}), [piece(0, 1, 1, data=bytes(58 * 4096))])
    message = decode_for_worker(made[0].parts)
    assert isinstance(message, ExtentWork)
    assert message.data.nbytes == 58 * 4096
    assert made[0].cost_bytes >= 512 + 58 * 4096
    assert made[0].data_bytes == {1: 58 * 4096}


def test_every_target_is_synced_once() -> None:
    messages = [decode_for_worker(work.parts) for work in WorkMaker({1, 5}, ()).syncs([1, 5])]
    assert messages == [SyncWork(1, 1), SyncWork(2, 5)]


def work(seq: int, cost_bytes: int) -> Work:
    return Work(seq, [b"x"], cost_bytes, 0, {})


@given(st.integers(1, 8), st.lists(st.integers(0, 4 * MIB), max_size=60), st.randoms())
def test_what_is_under_way_is_bounded_and_work_never_stalls(
    count: int, costs: list[int], chance: object
) -> None:
    roster = Roster(count)
    names = [f"w{number}" for number in range(count)]
    for name in names:
        roster.joined(name)
    limit = max(CREDIT_BYTES, 8 * MIB * count)
    under_way: list[tuple[str, Work]] = []
    for seq, cost in enumerate(costs):
        while (free := roster.free_worker(cost)) is None:
            assert under_way
            getattr(chance, "shuffle")(under_way)  # noqa: B009  Hypothesis names no type for it
            holder, done = under_way.pop()
            assert roster.done(holder, done.seq) is done
        given_work = work(seq, cost)
        roster.gave(free, given_work)
        under_way.append((free, given_work))
        assert sum(item.cost_bytes for _, item in under_way) <= limit
    assert roster.idle == (not under_way)


def test_nobody_gets_work_before_anybody_is_there() -> None:
    roster = Roster(2)
    assert roster.free_worker(0) is None
    assert roster.idle
    roster.joined("w")
    assert roster.free_worker(0) == "w"


def test_an_answer_to_work_that_was_not_given_is_not_taken() -> None:
    roster = Roster(1)
    roster.joined("w")
    roster.gave("w", work(1, 0))
    assert roster.done("w", 2) is None
    assert roster.done("stranger", 1) is None


def test_a_feed_out_of_a_file_ends_and_raises_what_reading_raises() -> None:
    def failing() -> Iterator[Work]:
        yield work(1, 0)
        raise Failure("torn")

    feed = InlineFeed(iter([work(1, 0)]))
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
        assert select.select([feed.fd], [], [], 10)[0]


def test_a_feed_out_of_a_pipe_gives_all_in_order_then_the_error() -> None:
    def failing() -> Iterator[Work]:
        for seq in range(5000):
            yield work(seq, 5 * MIB if seq % 100 == 0 else 0)
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
    feed = ThreadFeed(iter([work(1, 0)]), lambda: None)
    assert polled(feed) is not None
    assert polled(feed) is None
    assert feed.ended
    feed.close()


def test_a_feed_reads_ahead_only_so_far_and_stops_when_it_is_closed() -> None:
    read: list[int] = []
    reading, writing = os.pipe()

    def endless() -> Iterator[Work]:
        for seq in range(1_000_000):
            if seq == 4:
                os.write(writing, b"!")
            read.append(seq)
            yield work(seq, 3 * MIB)

    feed = ThreadFeed(endless(), lambda: None)
    assert polled(feed) is not None
    assert polled(feed) is not None
    # Two are taken, two wait in the queue, the fifth is in the thread's hand.
    assert select.select([reading], [], [], 10)[0]
    feed.close()
    assert read == [0, 1, 2, 3, 4]
    os.close(reading)
    os.close(writing)


def test_a_limit_holds_over_time_with_a_short_burst() -> None:
    pace = Pace({1: 1000}, now=0.0)
    assert pace.wait_s({}, 0.0) == 0
    assert pace.wait_s({1: 500}, 0.0) == 0
    pace.took({1: 500}, 0.0)
    assert pace.wait_s({1: 1}, 0.1) == pytest.approx(0.4)
    # After a long pause, at most an eighth of a second is made up for.
    pace.took({1: 1000}, 100.0)
    assert pace.wait_s({1: 1}, 100.0) == pytest.approx(0.875)
