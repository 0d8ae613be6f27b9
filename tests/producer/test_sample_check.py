# SPDX-License-Identifier: Apache-2.0
"""A sample of what has not changed, held against the base's digests."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.clusters.digests import UNKNOWN, cluster_digester, cluster_digests
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.runs import packed
from vmapipe.producer.sample_check import SampleCheck
from vmapipe.producer.since_base import UnchangedClusters
from vmapipe.runtime.errors import DoubtfulBase

KEY = bytes(range(32))
FIRST = 7


def content(seed: int) -> bytes:
    """A cluster: 0 is zeroes, odd ones are half empty."""
    half = random.Random(seed).randbytes(CLUSTER_BYTES // 2)
    return bytes(CLUSTER_BYTES) if not seed else half + (bytes(len(half)) if seed % 2 else half)


def digest_of(data: bytes) -> bytes:
    memory = bytearray(data)
    run = packed(memoryview(memory), 0, 0, len(data))
    masks = run.masks or bytes(2)
    (digest,) = cluster_digests(cluster_digester(KEY), masks, memoryview(memory)[: run.length])
    return digest


def told(sample: list[int], base: dict[int, bytes]) -> SampleCheck:
    check = SampleCheck("disk", is_awaited=True)
    check.set_key(KEY)
    check.tell(sample[:1], is_last=False)
    assert not check.is_told
    check.tell(sample[1:], is_last=True)
    for cluster in check.wants():
        check.take(cluster, digest_of(base[cluster]))
    return check


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.sets(st.integers(FIRST, FIRST + 9), min_size=1),
    st.integers(0, CLUSTER_BYTES - 1),
)
def test_what_is_as_in_the_base_is_not_sent_and_all_else_is_once(
    seeds: list[int], sample: set[int], cut: int
) -> None:
    data = b"".join(map(content, seeds))[: len(seeds) * CLUSTER_BYTES - cut]
    # What the disk holds at a cluster, padded, is what the base held.
    padded = data + bytes(-len(data) % CLUSTER_BYTES)
    base = {
        FIRST + n: padded[n * CLUSTER_BYTES : (n + 1) * CLUSTER_BYTES]
        if n < len(seeds)
        else content(1)
        for n in range(10)
    }
    check = told(sorted(sample), base)
    assert check.is_ready(FIRST, len(seeds))
    memory = bytearray(data + bytes(2 * CLUSTER_BYTES))
    run = packed(memoryview(memory), 0, FIRST, len(data))
    parts = check.split(run, memoryview(memory))
    next_cluster, position = FIRST, 0
    for part in parts:
        assert part.first_cluster == next_cluster
        next_cluster += part.clusters
        if isinstance(part, UnchangedClusters):
            assert part.first_cluster in sample
            position += len(packed_data(base[part.first_cluster]))
            continue
        wanted = b"".join(packed_data(base[part.first_cluster + n]) for n in range(part.clusters))
        assert memory[part.position : part.position + part.length] == wanted
        position += part.length
    assert next_cluster == FIRST + len(seeds)
    assert position == run.length
    assert check.is_done == all(n < FIRST + len(seeds) for n in sample)


def packed_data(data: bytes) -> bytes:
    memory = bytearray(data)
    run = packed(memoryview(memory), 0, 0, len(data))
    return bytes(memory[: run.length])


@pytest.mark.parametrize(("now", "before"), [(1, 2), (0, 2), (2, 0)])
def test_one_difference_is_the_end_and_names_the_offset(now: int, before: int) -> None:
    check = told([FIRST + 1], {FIRST + 1: content(before)})
    memory = bytearray(content(3) + content(now))
    run = packed(memoryview(memory), 0, FIRST, len(memory))
    with pytest.raises(DoubtfulBase, match=f"at offset {8 * CLUSTER_BYTES} has changed"):
        check.split(run, memoryview(memory))


def test_zeroes_where_the_base_has_data_are_a_difference() -> None:
    check = told([3, 4], {3: content(0), 4: content(1)})
    check.compare_zeroes(3)
    with pytest.raises(DoubtfulBase, match="its record is wrong"):
        check.compare_zeroes(4)


def test_a_base_without_digests_cannot_be_compared() -> None:
    check = SampleCheck("disk", is_awaited=True)
    check.set_key(b"")
    with pytest.raises(DoubtfulBase, match="no digests"):
        check.tell([1], is_last=True)
    check.tell([], is_last=True)
    assert check.is_done


def test_nothing_is_compared_before_its_digest_has_come_and_few_are_asked_for_at_a_time() -> None:
    check = SampleCheck("disk", is_awaited=True)
    check.set_key(KEY)
    check.tell(range(1000), is_last=True)
    asked = check.wants()
    assert len(asked) < 1000
    assert check.wants() == []
    assert not check.is_ready(0, 1)
    check.take(999, UNKNOWN)  # not asked for
    assert not check.is_ready(999, 1)
    for cluster in asked:
        check.take(cluster, UNKNOWN)
    assert check.is_ready(0, len(asked))
    assert check.wants()[0] == len(asked)
    assert check.sampled(998, 5) == [998, 999]
