# SPDX-License-Identifier: Apache-2.0
"""What is unchanged by its digest: never a cluster that differs, and all that do not."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.leaks import held_bytes_objects
from vmapipe.clusters.digests import UNKNOWN, cluster_digester, cluster_digests
from vmapipe.clusters.sizes import BLOCK_BYTES
from vmapipe.producer.outbox import Outbox
from vmapipe.producer.runs import Run
from vmapipe.producer.since_base import SinceBase, UnchangedClusters
from vmapipe.protocol import limits

KEY = bytes(range(32))


def blocks_of(cluster: int, mask: int, generation: int) -> bytes:
    return b"".join(
        struct.pack(">QQ", cluster, generation) * (BLOCK_BYTES // 16)
        for _ in range(mask.bit_count())
    )


def digests_of(masks: list[int], generations: list[int]) -> bytes:
    raw = struct.pack(f">{len(masks)}H", *masks)
    data = b"".join(
        blocks_of(i, m, g) for i, (m, g) in enumerate(zip(masks, generations, strict=True))
    )
    return b"".join(cluster_digests(cluster_digester(KEY), raw, memoryview(data)))


def asked(since: SinceBase, first: int, digests: bytes) -> None:
    for start, count in since.wants(first):
        since.take(start, digests[start * 16 : (start + count) * 16])


clusters = st.lists(
    st.tuples(st.sampled_from([0, 1, 0xFFFF]), st.sampled_from([0, 1, 0xFFFF]), st.booleans()),
    min_size=1,
    max_size=40,
)


@given(clusters, st.integers(0, 3))
def test_a_run_is_cut_into_what_differs_and_what_does_not(
    each: list[tuple[int, int, bool]], at: int
) -> None:
    before = digests_of([mask for mask, _, _ in each], [0] * len(each))
    since = SinceBase(KEY, len(each))
    asked(since, 0, before)
    now = [mask for _, mask, _ in each]
    data = b"".join(blocks_of(i, m, int(new)) for i, (_, m, new) in enumerate(each))
    memory = memoryview(bytes(at * BLOCK_BYTES) + data)
    masks = struct.pack(f">{len(now)}H", *now)
    run = Run(0, len(now), masks if any(now) else b"", at * BLOCK_BYTES, len(data))
    parts = since.split(run, memory)
    assert parts is not None
    reached, unchanged, sent = 0, set(), b""
    for part in parts:
        assert part.first_cluster == reached
        reached += part.clusters
        if isinstance(part, UnchangedClusters):
            unchanged |= set(range(part.first_cluster, reached))
        else:
            sent += memory[part.position : part.position + part.length]
            expected = masks[2 * part.first_cluster : 2 * reached]
            assert part.masks == (expected if any(expected) else b"")
    assert reached == len(each)
    same = {i for i, (old, new, later) in enumerate(each) if old == new and new and not later}
    assert unchanged == same
    assert sent == b"".join(
        blocks_of(i, m, int(new)) for i, (_, m, new) in enumerate(each) if i not in same
    )


def test_a_run_waits_for_its_digests_and_they_are_asked_for_once() -> None:
    since = SinceBase(KEY, 3 * limits.MAX_WANTED_CLUSTERS)
    run = Run(limits.MAX_WANTED_CLUSTERS - 1, 2, b"\0\1\0\1", 0, 2 * BLOCK_BYTES)
    memory = memoryview(bytes(2 * BLOCK_BYTES))
    assert since.wants(run.first_cluster) == [(0, 2048), (2048, 2048)]
    assert since.wants(run.first_cluster) == []
    assert since.split(run, memory) is None
    since.take(0, bytes(2048 * 16))
    assert since.split(run, memory) is None
    since.ask_again()
    assert since.wants(run.first_cluster) == [(2048, 2048)]
    since.take(2048, bytes(2048 * 16))
    assert since.split(run, memory) == [run]


@pytest.mark.parametrize("digests", [b"", b"x", bytes(2048 * 16 - 1), bytes(2048 * 16 + 16)])
def test_an_answer_that_is_not_whole_means_that_nothing_is_known(digests: bytes) -> None:
    since = SinceBase(KEY, 2048)
    since.wants(0)
    since.take(0, digests)
    run = Run(0, 1, b"\0\1", 0, BLOCK_BYTES)
    assert since.split(run, memoryview(bytes(BLOCK_BYTES))) == [run]


def test_answers_to_what_was_not_asked_change_nothing() -> None:
    since = SinceBase(KEY, 1 << 20)
    since.take(0, bytes(2048 * 16))
    since.take(7, bytes(2048 * 16))
    assert since.wants(0) == [(0, 2048), (2048, 2048)]


def test_no_more_than_a_few_pages_are_kept_however_large_the_disk() -> None:
    since = SinceBase(KEY, 1 << 32)
    chance = random.Random(1)
    for first in range(0, 100 * 2048, 500):
        for start, count in since.wants(first):
            since.take(start, chance.randbytes(count * 16))
        assert sum(map(len, held_bytes_objects(since))) <= 3 * 2048 * 16 + len(KEY)


def test_a_zero_cluster_has_no_digest_that_could_be_equal() -> None:
    assert digests_of([0, 1], [0, 0])[:16] == UNKNOWN
    since = SinceBase(KEY, 2)
    asked(since, 0, digests_of([0, 1], [0, 0]))
    run = Run(0, 2, b"\0\0\0\1", 0, BLOCK_BYTES)
    parts = since.split(run, memoryview(blocks_of(1, 1, 0)))
    assert parts == [Run(0, 1, b"", 0, 0), UnchangedClusters(1, 1)]


class FakeSession:
    """A session with as much credit as the test wants, which cuts each run as it is told."""

    def __init__(self, parts: list[Any] | None) -> None:
        self.credit = 1 << 30
        self.compares = True
        self.parts = parts
        self.sent: list[Any] = []
        self.on_acks: list[Callable[[], None]] = []

    def since_base(self, run: Run, memory: memoryview) -> list[Any] | None:
        return self.parts

    def send(self, run: Run, on_ack: Callable[[], None] | None) -> None:
        self.sent.append(run)
        if on_ack is not None:
            self.on_acks.append(on_ack)

    def send_unchanged(self, first: int, clusters: int) -> None:
        self.sent.append(UnchangedClusters(first, clusters))


def outbox(session: FakeSession) -> Outbox:
    return Outbox(session, memoryview(b""))  # type: ignore[arg-type]


def test_memory_is_free_when_the_last_part_of_a_run_is_acknowledged() -> None:
    first, last = Run(0, 1, b"\0\1", 0, 4096), Run(2, 1, b"\0\1", 4096, 4096)
    session = FakeSession([first, UnchangedClusters(1, 1), last, Run(3, 1, b"", 0, 0)])
    box, freed = outbox(session), []
    box.put(Run(0, 4, b"\0\1" * 4, 0, 8192), lambda: freed.append(1))
    while box.waiting:
        assert box.advance()
    assert session.sent == session.parts
    chance = random.Random(1)
    chance.shuffle(session.on_acks)
    session.on_acks.pop()()
    assert not freed
    session.on_acks.pop()()
    assert freed == [1]


def test_memory_of_a_run_that_has_not_changed_is_free_at_once() -> None:
    session = FakeSession([UnchangedClusters(0, 4)])
    box, freed = outbox(session), []
    box.put(Run(0, 4, b"\0\1" * 4, 0, 16384), lambda: freed.append(1))
    assert box.advance()
    assert freed == [1]
    assert not box.waiting


def test_nothing_is_sent_without_credit_or_digests() -> None:
    session = FakeSession(None)
    box = outbox(session)
    box.put(Run(0, 1, b"\0\1", 0, 4096))
    assert not box.advance()
    session.parts, session.credit = [UnchangedClusters(0, 1)], limits.CHARGE_PER_FRAME - 1
    assert not box.advance()
    session.credit += 1
    assert box.advance()
    assert session.sent == [UnchangedClusters(0, 1)]
