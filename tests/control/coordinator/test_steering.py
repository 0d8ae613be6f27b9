# SPDX-License-Identifier: Apache-2.0
"""A backup's speed limit, the user's or what its guest allows, as it is told and shared."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.coordinator import steering
from vmapipe.control.coordinator.steering import LatencySource, LatencyWish, Shares, Steering
from vmapipe.runtime.events import Event
from vmapipe.runtime.latency import NOTHING_FELT, Felt

MIB = 1 << 20


class Guest:
    """A guest that feels what it is told to feel."""

    every_s = 0.25

    def __init__(self, felt: Felt, *, is_idle: bool = False) -> None:
        self.felt, self.guest_is_idle = felt, is_idle

    def measure(self, bound_s: float, notices: list[str]) -> LatencySource | None:
        return self

    def take(self) -> Felt:
        return self.felt


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(steering, "time", clock)
    return clock


def begun(guest: Guest, speed: int = 0) -> tuple[Steering, list[Any]]:
    told: list[Event] = []
    found = Steering(speed, ["a", "b"], LatencyWish(0.02, 8 * MIB))
    found.begin(guest, told.append)
    return found, told


def passes(found: Steering, clock: Clock, told: list[Any], seconds: float) -> None:
    for _ in range(int(4 * seconds)):
        clock.now += 0.25
        found.poll(told.append)


def test_at_the_floor_it_is_said_once_that_the_backup_cannot_help(clock: Clock) -> None:
    found, told = begun(Guest(Felt(100, 50, 0.3)))
    passes(found, clock, told, 60)
    (notice,) = [event["text"] for event in told if event["event"] == "notice"]
    assert notice.startswith(
        "the guest waits 300 ms although the backup reads no more than its floor"
    )
    assert found.share == 4 * MIB
    result = found.result()
    assert result is not None
    assert (result["worst_s"], result["seconds"], result["seconds_above"]) == (0.3, 60, 60)


def test_a_good_second_in_between_is_no_reason_to_be_silent_later(clock: Clock) -> None:
    guest = Guest(Felt(100, 50, 0.3))
    found, told = begun(guest)
    for felt, seconds in ((guest.felt, 6), (Felt(100, 0, 0.015), 2), (guest.felt, 30)):
        assert not [event for event in told if event["event"] == "notice"]
        guest.felt = felt
        passes(found, clock, told, seconds)
    assert len([event for event in told if event["event"] == "notice"]) == 1


def test_what_is_to_be_said_of_a_device_that_came_later_is_said(clock: Clock) -> None:
    class Plugged(Guest):
        def measure(self, bound_s: float, notices: list[str]) -> LatencySource | None:
            self.notices = notices
            return self

    guest = Plugged(NOTHING_FELT)
    found, told = begun(guest)
    guest.notices.append("the guest's device late")
    passes(found, clock, told, 5)
    notices = [event["text"] for event in told if event["event"] == "notice"]
    assert notices == ["the guest's device late"]


def test_an_idle_guests_backup_has_the_users_limit_and_no_other(clock: Clock) -> None:
    found, told = begun(Guest(NOTHING_FELT, is_idle=True), speed=50 * MIB)
    passes(found, clock, told, 5)
    assert found.share == 25 * MIB
    assert [event["limit_bytes_s"] for event in told] == [50 * MIB] * 5
    found.limit(0)
    assert found.share == 0
    assert found.limit_bytes_s == 0


def test_a_disk_that_is_done_leaves_its_share(clock: Clock) -> None:
    found, _ = begun(Guest(NOTHING_FELT), speed=20 * MIB)
    progress: Any = {
        "event": "progress",
        "devices": [
            {"name": "a", "bytes": 5, "done_bytes": 5},
            {"name": "b", "bytes": 5, "done_bytes": 1},
        ],
    }
    assert found.share == 10 * MIB
    assert found.take(progress)
    assert found.share == 20 * MIB


def test_without_a_bound_nothing_is_asked() -> None:
    found = Steering(0, ["a"], None)
    found.begin(Guest(Felt(1, 1, 9.0)), lambda event: None)
    assert not found.poll(lambda event: None)
    assert (found.share, found.result(), found.options) == (0, None, [])


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
