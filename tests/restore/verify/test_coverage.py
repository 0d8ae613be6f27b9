# SPDX-License-Identifier: Apache-2.0
"""After a mistake, counting goes on, and is right."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.verify.coverage import CoverageReport
from vmapipe.restore.verify.report import Damage
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device, Header

# Runs may cross what the set of clusters is made of (65,536).
FIRST = 65536 - 20
COUNT = 40


def clusters(finds: Iterable[Damage], word: str) -> list[int]:
    found: list[int] = []
    for find in finds:
        if word in find.text and find.offset is not None and find.length is not None:
            start = find.offset // CLUSTER_BYTES
            found += range(start, start + -(-find.length // CLUSTER_BYTES))
    return sorted(found)


def extent(*runs: tuple[int, int]) -> Extent:
    return Extent(0, 0, tuple(ClusterRun(1, first, (0,) * count, 0) for first, count in runs))


run = st.tuples(st.integers(FIRST, FIRST + COUNT - 1), st.integers(1, 59)).map(
    lambda run: (run[0], min(run[1], FIRST + COUNT - run[0]))
)


@given(st.lists(st.lists(run, min_size=1, max_size=4), max_size=8))
def test_exactly_what_is_missing_or_double_is_told(extents: list[list[tuple[int, int]]]) -> None:
    device = Device(1, "d", (FIRST + COUNT) * CLUSTER_BYTES - 1000)
    census = CoverageReport(Header(bytes(16), 0, (device,), ()))
    assert list(census.add(extent((0, FIRST)))) == []
    seen: set[int] = set()
    for runs in extents:
        finds = list(census.add(extent(*runs)))
        twice = []
        for first, count in runs:
            for number in range(first, first + count):
                if number in seen:
                    twice.append(number)
                seen.add(number)
        assert clusters(finds, "a second time") == sorted(twice)
    missing = [number for number in range(FIRST, FIRST + COUNT) if number not in seen]
    finds = list(census.finish())
    assert clusters(finds, "missing") == missing
    # Neighbours are told together, also across what the set is made of.
    ends = {number for number in missing if number + 1 not in missing}
    assert len(finds) == len(ends)


@given(st.lists(run, max_size=6), st.integers(1, 300))
def test_clusters_beyond_the_end_do_not_count(runs: list[tuple[int, int]], size: int) -> None:
    device = Device(1, "d", size * CLUSTER_BYTES)
    census = CoverageReport(Header(bytes(16), 0, (device,), ()))
    for first, count in runs:
        finds = list(census.add(extent((first, count))))
        assert clusters(finds, "beyond") == [*range(first, first + count)]
    assert clusters(census.finish(), "missing") == list(range(size))
