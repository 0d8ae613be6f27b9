# SPDX-License-Identifier: Apache-2.0
"""What counts in bins say of latencies is what the latencies say themselves, up to the width of a bin."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.runtime.latency import (
    NOTHING_FELT,
    Felt,
    LatencyCounts,
    Means,
    bounds_ns,
    felt_of,
    is_ours,
    worst,
)

bounds = st.floats(0.0001, 10)
latencies = st.lists(st.integers(5_000, 10_000_000_000), min_size=1, max_size=400)


@given(bounds, latencies)
def test_the_slow_ones_are_counted_exactly_and_the_percentile_within_a_bin(
    bound_s: float, taken: list[int]
) -> None:
    counts = LatencyCounts(bound_s)
    for each in taken:
        counts.add(each)
    felt = counts.take()
    bound_ns = round(bound_s * 1e9)
    assert felt.requests == len(taken)
    assert felt.slow == sum(each >= bound_ns for each in taken)
    exact = sorted(taken)[math.ceil(0.99 * len(taken)) - 1]
    edges = bounds_ns(bound_s)
    if edges[2] <= exact < edges[-1]:
        assert exact <= felt.p99_s * 1e9 <= exact * 1.27 + 2
    assert counts.take() == NOTHING_FELT


@given(bounds)
def test_the_boundaries_rise_are_ours_and_have_the_bound_among_them(bound_s: float) -> None:
    edges = bounds_ns(bound_s)
    assert edges == sorted(set(edges))
    assert round(bound_s * 1e9) in edges
    assert is_ours(edges)
    assert not is_ours(edges[2:])
    assert not is_ours([])


def test_a_histogram_as_qemu_shows_it_has_one_bin_more_than_boundaries() -> None:
    assert felt_of([10, 20], [98, 1, 1], 20e-9) == Felt(100, 1, 20e-9)


def test_of_totals_only_the_mean_is_known_and_the_first_look_says_nothing() -> None:
    means = Means(0.01)
    assert means.take("a", 1000, 10**12) == NOTHING_FELT
    assert means.take("a", 1010, 10**12 + 5 * 10**7) == Felt(10, 0, 0.005)
    assert means.take("a", 1020, 10**12 + 4 * 10**8) == Felt(10, 10, 0.035)
    # It was reset, or is another device of that name.
    assert means.take("a", 3, 10) == NOTHING_FELT


def test_a_good_disk_does_not_make_up_for_a_bad_one() -> None:
    assert worst([Felt(1000, 0, 0.001), Felt(10, 5, 0.2)]) == Felt(10, 5, 0.2)
    assert not worst([Felt(1000, 0, 0.001), Felt(10, 0, 0.002)]).is_broken
