# SPDX-License-Identifier: Apache-2.0
"""What finds extents in damaged bytes, leaves clusters out, and counts what is missing."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.vma.archives import UUID, Run, devices_and_runs, pack_extents
from vmapipe.clusters.cluster_set import ClusterSet, joined
from vmapipe.clusters.sizes import BLOCK_BYTES, EXTENT_HEADER_BYTES
from vmapipe.vma.extent import (
    ClusterRun,
    extent_uuid,
    find_extent_header,
    parse_extent_header,
    without,
)
from vmapipe.vma.header import Device

Case = tuple[tuple[Device, ...], list[Run]]


def clusters(runs: tuple[ClusterRun, ...]) -> list[tuple[int, int, int, int]]:
    """(dev_id, number, mask, where its data is), one each."""
    found = []
    for run in runs:
        at = run.data_at
        for index, mask in enumerate(run.masks):
            found.append((run.dev_id, run.first_cluster + index, mask, at))
            at += mask.bit_count() * BLOCK_BYTES
    return found


@given(devices_and_runs(), st.sets(st.integers(0, 58)))
def test_clusters_that_are_left_out_are_exactly_those(case: Case, left_out: set[int]) -> None:
    _, runs = case
    raw = next(iter(pack_extents(UUID, runs)))
    extent = parse_extent_header(raw[:EXTENT_HEADER_BYTES], UUID)
    kept = clusters(without(extent.runs, left_out))
    assert kept == [
        one for number, one in enumerate(clusters(extent.runs)) if number not in left_out
    ]


@given(devices_and_runs(), st.binary(max_size=600), st.binary(max_size=600))
def test_an_extent_is_found_at_any_place_and_no_other_is(
    case: Case, before: bytes, behind: bytes
) -> None:
    _, runs = case
    first = next(iter(pack_extents(UUID, runs)))[:EXTENT_HEADER_BYTES]
    other = next(iter(pack_extents(b"another archive!", runs)))[:EXTENT_HEADER_BYTES]
    data = before + other + first + behind
    at = find_extent_header(data, UUID)
    assert at == len(before) + len(other)
    assert extent_uuid(data[at:]) == UUID
    # Whoever does not know the uuid takes the first one.
    assert find_extent_header(data, None) == len(before)
    assert find_extent_header(data, UUID, at + 1) == -1
    assert find_extent_header(data[: at + EXTENT_HEADER_BYTES - 1], UUID) == -1


@given(devices_and_runs(), st.integers(0, EXTENT_HEADER_BYTES * 8 - 1))
def test_an_extent_header_with_a_wrong_bit_is_not_one(case: Case, bit: int) -> None:
    _, runs = case
    raw = bytearray(next(iter(pack_extents(UUID, runs)))[:EXTENT_HEADER_BYTES])
    raw[bit // 8] ^= 1 << bit % 8
    assert find_extent_header(bytes(raw), UUID) == -1


near_pages = st.integers(65536 - 300, 65536 + 300)


@given(st.lists(st.tuples(near_pages, st.integers(1, 400)), max_size=12))
def test_a_set_knows_what_is_in_and_what_is_missing(runs: list[tuple[int, int]]) -> None:
    size = 65536 + 700
    found = ClusterSet(size)
    inside: set[int] = set()
    for first, count in runs:
        found.add_all(first, count)
        inside |= set(range(first, first + count))
    assert found.count == len(inside)
    present = [n for first, count in found.present() for n in range(first, first + count)]
    assert present == sorted(inside)
    missing = [
        n for first, count in found.missing(0, 65536 + 100) for n in range(first, first + count)
    ]
    assert missing == [n for n in range(65536 + 100) if n not in inside]
    whole = list(joined(found.missing()))
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(whole))
    assert sum(count for _, count in whole) == size - len(inside)


def test_the_missing_clusters_of_256_tib_are_one_run() -> None:
    found = ClusterSet(1 << 32)
    found.add_all(5, 3)
    assert list(joined(found.missing())) == [(0, 5), (8, (1 << 32) - 8)]
