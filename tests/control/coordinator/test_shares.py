# SPDX-License-Identifier: Apache-2.0
"""A job's speed limit, divided."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.coordinator.shares import Shares

names = st.lists(st.text(min_size=1), min_size=1, max_size=20, unique=True)


@given(st.integers(1, 1 << 50), names, st.data())
def test_disks_that_are_not_done_have_the_whole_limit_among_them(
    limit: int, disks: list[str], data: st.DataObject
) -> None:
    shares = Shares(limit, disks)
    for disk in data.draw(st.permutations(disks)):
        active = len(shares.active)
        assert limit <= shares.share * active < limit + active
        before = shares.share
        told = shares.done(disk)
        assert told == (bool(shares.active) and shares.share != before)
        assert not shares.done(disk), "done twice changes nothing"


@given(names)
def test_no_limit_stays_none(disks: list[str]) -> None:
    shares = Shares(0, disks)
    assert shares.share == 0
    assert not shares.done(disks[0])
    assert shares.share == 0


def test_disks_that_are_read_in_turn_have_all_of_it_each() -> None:
    shares = Shares(10, ["a", "b"], in_turn=True)
    assert shares.share == 10
    assert not shares.done("a")
    shares.bytes_per_s = 7
    assert shares.share == 7
