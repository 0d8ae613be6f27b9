# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vma.memory import peak_bytes
from vmapipe.clusters import cluster_set
from vmapipe.clusters.cluster_set import ClusterSet, joined
from vmapipe.clusters.sizes import MAX_CLUSTERS

PAGE = 1 << 16


def flat(runs: list[tuple[int, int]]) -> list[int]:
    return [first + i for first, count in runs for i in range(count)]


@st.composite
def size_and_runs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A size, and runs below it in any order: mostly apart, the last ones perhaps double."""
    size = draw(st.integers(1, 300))
    edge = st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 192]).map(lambda p: min(p, size))
    cuts = sorted({0, size, *draw(st.lists(edge | st.integers(0, size), max_size=60))})
    apart = [(low, high - low) for low, high in itertools.pairwise(cuts)]
    kept = [run for run in apart if draw(st.integers(0, 9))]
    doubles = draw(st.lists(st.sampled_from(apart), max_size=2))
    return size, [*draw(st.permutations(kept)), *doubles]


@given(size_and_runs())
@settings(max_examples=150)
def test_a_cluster_set_is_a_set(case: tuple[int, list[tuple[int, int]]]) -> None:
    size, runs = case
    model: set[int] = set()
    # The same code with pages of 64 instead of 65536: edges come up all the time.
    with mock.patch.multiple(cluster_set, _PAGE=64, _FEW=6):
        clusters = ClusterSet(size)
        for first, count in runs:
            new = set(range(first, first + count))
            double = min(new & model, default=None)
            assert clusters.add(first, count) == double
            if double is not None:
                return
            model |= new
            assert clusters.count == len(model)
        missing = list(clusters.missing())
    assert flat(missing) == sorted(set(range(size)) - model)
    assert all(count > 0 for _, count in missing)


@given(size_and_runs(), st.data())
@settings(max_examples=100)
def test_every_question_is_answered_as_by_a_set_of_numbers(
    case: tuple[int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    size, runs = case
    with mock.patch.multiple(cluster_set, _PAGE=64, _FEW=data.draw(st.sampled_from([0, 6, 64]))):
        clusters = ClusterSet(size)
        model: set[int] = set()
        for first, count in runs:
            clusters.add_all(first, count)
            model |= set(range(first, first + count))
        assert clusters.count == len(model)
        low = data.draw(st.integers(0, size - 1))
        end = data.draw(st.integers(low + 1, size))
        asked = set(range(low, end))
        assert clusters.has(low) == (low in model)
        assert clusters.has_all(low, end - low) == (asked <= model)
        assert clusters.count_in(low, end - low) == len(asked & model)
        assert flat(list(joined(clusters.present(low, end)))) == sorted(asked & model)
        assert flat(list(joined(clusters.missing(low, end)))) == sorted(asked - model)
        assert clusters.next_present(low, end) == min(asked & model, default=end)
        assert clusters.next_missing(low, end) == min(asked - model, default=end)


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1])
@pytest.mark.parametrize("step", [29, 58, 255, 256, 257, PAGE - 1, PAGE, PAGE + 1])
def test_a_disk_that_comes_in_order_is_complete_at_its_last_cluster(size: int, step: int) -> None:
    clusters = ClusterSet(size)
    for first in range(0, size, step):
        assert clusters.count == first
        assert clusters.add(first, min(step, size - first)) is None
    assert list(clusters.missing()) == []
    assert clusters.count == size
    assert clusters.add(size - 1, 1) == size - 1


@pytest.mark.parametrize(
    ("first", "count"),
    [(PAGE - 1, 1), (PAGE, 1), (PAGE - 1, 2), (PAGE - 3, 6), (PAGE - 300, 600), (0, 2 * PAGE + 9)],
)
def test_runs_across_a_page_edge_are_whole(first: int, count: int) -> None:
    size = 2 * PAGE + 9
    clusters = ClusterSet(size)
    assert clusters.add(first, count) is None
    assert clusters.count == count
    assert flat(list(clusters.missing())) == [*range(first), *range(first + count, size)]
    for inside in {first, first + count - 1, min(first + count - 1, PAGE)}:
        assert clusters.add(inside, 1) == inside


def test_the_first_double_cluster_is_named_even_in_the_next_page() -> None:
    clusters = ClusterSet(3 * PAGE)
    clusters.add(PAGE + 7, 3)
    assert clusters.add(PAGE - 10, 100) == PAGE + 7


def test_the_first_double_cluster_of_a_full_page_is_its_first() -> None:
    clusters = ClusterSet(3 * PAGE)
    clusters.add(PAGE, PAGE)
    assert clusters.add(PAGE - 10, 100) == PAGE


@pytest.mark.parametrize("backwards", [False, True])
def test_single_clusters_in_any_order_fill_a_page(backwards: bool) -> None:
    size = 1000
    clusters = ClusterSet(size)
    evens, odds = range(0, size, 2), range(1, size, 2)
    for cluster in itertools.chain(evens, reversed(odds) if backwards else odds):
        assert clusters.add(cluster, 1) is None
    assert list(clusters.missing()) == []
    assert [clusters.add(cluster, 1) for cluster in (0, 1, 998, 999)] == [0, 1, 998, 999]


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 11), (10, 1), (11, 0), (5, -1)])
def test_clusters_that_the_set_does_not_have_are_refused(first: int, count: int) -> None:
    clusters = ClusterSet(10)
    with pytest.raises(ValueError, match="in a set of 10"):
        clusters.add(first, count)


def test_the_largest_disk_in_long_runs_costs_little_memory() -> None:
    def work() -> None:
        clusters = ClusterSet(MAX_CLUSTERS)
        step = 1 << 20
        for first in range(0, MAX_CLUSTERS, step):
            assert clusters.add(first, step) is None
        assert clusters.count == MAX_CLUSTERS
        assert list(clusters.missing()) == []
        assert clusters.add(MAX_CLUSTERS - 1, 1) == MAX_CLUSTERS - 1

    assert peak_bytes(work) < 16 << 20


def test_the_largest_disk_in_one_run_is_quickly_complete() -> None:
    clusters = ClusterSet(MAX_CLUSTERS)
    assert clusters.add(0, MAX_CLUSTERS) is None
    assert clusters.add(12345, 1) == 12345
    assert list(clusters.missing()) == []


def test_the_first_missing_cluster_of_the_largest_disk_is_found_at_once() -> None:
    clusters = ClusterSet(MAX_CLUSTERS)
    clusters.add(0, 5)
    assert next(clusters.missing()) == (5, PAGE - 5)


def test_clusters_that_lie_far_apart_cost_bytes_and_not_pages() -> None:
    count = 4096

    def work() -> None:
        clusters = ClusterSet(MAX_CLUSTERS)
        for number in range(count):
            clusters.add(number * PAGE + number, 1)
        assert clusters.count == count

    # A bitmap for each would be 32 MiB.
    assert peak_bytes(work) < 512 * count
