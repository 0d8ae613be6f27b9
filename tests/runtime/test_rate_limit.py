# SPDX-License-Identifier: Apache-2.0
"""The rate limit: kept over any stretch of time, also when it changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.runtime.rate_limit import JobRateLimiter, RateLimiter

MIB = 1 << 20


def read_until(limiter: RateLimiter, now: float, end: float, piece: int) -> tuple[float, int]:
    """A reader that is infinitely quick: the time afterwards, and how much it read."""
    done = 0
    while True:
        while (pause := limiter.wait_s(now)) > 0:
            now += pause
            if now >= end:
                return now, done
        if not limiter.bytes_per_s and done >= 1000 * MIB:
            return end, done
        done += piece
        limiter.took(piece, now)


@given(
    speed=st.integers(64 << 10, 1 << 30),
    pieces_a_second=st.integers(8, 100),
    seconds=st.integers(1, 20),
)
def test_no_more_is_read_than_the_limit_allows_and_not_much_less(
    speed: int, pieces_a_second: int, seconds: int
) -> None:
    # As `frame_bytes` makes them, and smaller ones.
    piece = max(4096, speed // pieces_a_second)
    _, done = read_until(RateLimiter(speed, 0.0), 0.0, float(seconds), piece)
    # One piece is under way at each end, and an eighth of a second may be caught up.
    assert done <= speed * (seconds + 0.125) + 2 * piece
    assert done >= speed * (seconds - 0.25) - 2 * piece


def test_a_change_holds_from_the_next_question_on() -> None:
    limiter = RateLimiter(1 * MIB, 0.0)
    now, _ = read_until(limiter, 0.0, 10.0, MIB // 8)
    limiter.change(8 * MIB)
    start = now
    now, done = read_until(limiter, now, now + 10.0, MIB)
    assert 0.95 * 8 * MIB * (now - start) <= done <= 1.05 * 8 * MIB * (now - start)


def test_what_was_owed_at_a_low_rate_is_not_waited_for_at_a_high_one() -> None:
    limiter = RateLimiter(1024, 0.0)
    limiter.took(MIB, 0.0)
    assert limiter.wait_s(0.0) > 0
    limiter.change(1 << 30)
    assert limiter.wait_s(1.0) < 0.01
    limiter.change(0)
    assert limiter.wait_s(1.0) == 0


def test_a_limit_that_comes_late_does_not_punish_what_was_read_before() -> None:
    limiter = RateLimiter(0, 0.0)
    limiter.took(1 << 40, 5.0)
    limiter.change(MIB)
    assert limiter.wait_s(5.0) == 0
    limiter.took(MIB, 5.0)
    assert limiter.wait_s(5.0) > 0


def test_after_a_long_pause_at_most_an_eighth_of_a_second_is_made_up_for() -> None:
    limiter = RateLimiter(1000, 0.0)
    assert limiter.wait_s(0.0) == 0
    limiter.took(500, 0.0)
    assert limiter.wait_s(0.1) == pytest.approx(0.4)
    limiter.took(1000, 100.0)
    assert limiter.wait_s(100.0) == pytest.approx(0.875)


LIMIT = 8 * MIB
# What comes at once, after time without data, and before QEMU hears of its limit.
BURST = LIMIT // 2
LATE = 4 * MIB


class Qemu:
    """A job that reads a disk of data (True) and holes (False), a megabyte each, as it may.

    It keeps its own limit, which counts both; the one that is wanted reaches it `LATE`
    bytes later.
    """

    def __init__(self, disk: list[bool], limit: int = LIMIT) -> None:
        self.speed = JobRateLimiter(limit, 0.0)
        self.now = 0.0
        self.came: list[float] = []
        has = limit
        since = 0
        for is_data in disk:
            # Unlimited, it copies a gigabyte of data a second, and ten of holes.
            self.now += MIB / has if has else (0.001 if is_data else 0.0001)
            if is_data:
                self.came.append(self.now)
                self.speed.took(MIB, self.now)
            wanted = self.speed.wanted_at(self.now)
            since = 0 if wanted == has else since + MIB
            if since > LATE:
                has, since = wanted, 0


DISKS = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=20).map(
    lambda runs: [is_data for is_data, count in runs for _ in range(count)]
)


@given(DISKS)
def test_over_no_time_comes_more_data_than_is_allowed_and_a_burst(disk: list[bool]) -> None:
    came = Qemu(disk).came
    for first, start in enumerate(came):
        for last, end in enumerate(came[first:], start=first):
            size = (last + 1 - first) * MIB
            assert size <= LIMIT * (end - start) + 2 * BURST + 2 * LATE + 2 * MIB


@settings(max_examples=20)  # the disks are long
@given(st.integers(0, 30), st.integers(1, 10))
def test_holes_cost_next_to_nothing_however_much_data_lies_between(data: int, times: int) -> None:
    """Each stretch of 500 GiB would take more than 17 hours under the limit."""
    disk = ([False] * 2000 + [True] * data) * times
    qemu = Qemu(disk)
    holes_s = 0.0001 * disk.count(False)
    # Before the limit is lifted at first, half a second; and after data, until it is made up for.
    assert qemu.now <= 0.001 + (data * times * MIB + BURST + LATE) / LIMIT + holes_s + 0.6 * times


def test_data_alone_never_lifts_the_limit() -> None:
    qemu = Qemu([True] * 500)
    assert qemu.speed.wanted == LIMIT
    assert qemu.now >= 499 * MIB / LIMIT


def test_without_a_limit_none_is_wanted() -> None:
    speed = JobRateLimiter(0, 0.0)
    assert not speed.took(1 << 40, 0.001)
    assert speed.wanted_at(5.0) == 0


def test_another_limit_is_in_force_at_once_and_what_was_before_is_forgotten() -> None:
    speed = JobRateLimiter(LIMIT, 0.0)
    assert speed.wanted_at(1.0) == 0
    assert speed.took(100 * MIB, 1.0)
    speed.change(2 * LIMIT, 1.0)
    assert speed.wanted_at(1.0) == 2 * LIMIT
    assert speed.wanted_at(1.51) == 0
    speed.change(0, 2.0)
    assert speed.wanted_at(2.0) == 0


def test_what_a_busy_guest_has_copied_counts_for_some_seconds_only() -> None:
    """It is not limited, and nobody can tell it from what the limit is for."""
    speed = JobRateLimiter(LIMIT, 0.0)
    for second in range(3600):
        speed.took(10 * LIMIT, float(second))
    assert speed.wanted_at(3600.0) == LIMIT
    assert speed.wanted_at(3600.0 + 64 * MIB / LIMIT + 1) == 0
