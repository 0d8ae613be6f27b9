# SPDX-License-Identifier: Apache-2.0
"""The rate limit: kept over any stretch of time, also when it changes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.producer.pace import Pace
from vmapipe.runtime.events import speed_command

MIB = 1 << 20


def read_until(pace: Pace, now: float, end: float, piece: int) -> tuple[float, int]:
    """A reader that is infinitely quick: the time afterwards, and how much it read."""
    done = 0
    while True:
        while (pause := pace.wait_s(now)) > 0:
            now += pause
            if now >= end:
                return now, done
        if not pace.bytes_per_s and done >= 1000 * MIB:
            return end, done
        done += piece
        pace.took(piece, now)


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
    _, done = read_until(Pace(speed, 0.0), 0.0, float(seconds), piece)
    # One piece is under way at each end, and an eighth of a second may be caught up.
    assert done <= speed * (seconds + 0.125) + 2 * piece
    assert done >= speed * (seconds - 0.25) - 2 * piece


def test_a_change_holds_from_the_next_question_on() -> None:
    pace = Pace(1 * MIB, 0.0)
    now, _ = read_until(pace, 0.0, 10.0, MIB // 8)
    pace.hear(speed_command(8 * MIB))
    start = now
    now, done = read_until(pace, now, now + 10.0, MIB)
    assert 0.95 * 8 * MIB * (now - start) <= done <= 1.05 * 8 * MIB * (now - start)


def test_what_was_owed_at_a_low_rate_is_not_waited_for_at_a_high_one() -> None:
    pace = Pace(1024, 0.0)
    pace.took(MIB, 0.0)
    assert pace.wait_s(0.0) > 0
    pace.hear(speed_command(1 << 30))
    assert pace.wait_s(1.0) < 0.01
    pace.hear(speed_command(0))
    assert pace.wait_s(1.0) == 0


def test_a_limit_that_comes_late_does_not_punish_what_was_read_before() -> None:
    pace = Pace(0, 0.0)
    pace.took(1 << 40, 5.0)
    pace.hear(speed_command(MIB))
    assert pace.wait_s(5.0) == 0
    pace.took(MIB, 5.0)
    assert pace.wait_s(5.0) > 0


def test_other_orders_are_passed_over() -> None:
    pace = Pace(MIB, 0.0)
    pace.hear({"order": "dance"})
    pace.wait_s(0.0)
    assert pace.bytes_per_s == MIB
