# SPDX-License-Identifier: Apache-2.0
"""Windows over midnight and daylight saving, and due times that are spread and the same for everybody."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.fleet.windows import (
    DAY_S,
    Window,
    latest_slot,
    opening,
    parse_interval,
    parse_window,
    phase,
)

BERLIN = "Europe/Berlin"
NIGHT = (parse_window("22:00-06:00"),)


def at(text: str, zone: str = BERLIN) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("when", "is_open"),
    [
        ("2026-11-30T21:59", False),
        ("2026-11-30T22:00", True),
        ("2026-12-01T00:30", True),
        ("2026-12-01T05:59", True),
        ("2026-12-01T06:00", False),
    ],
)
def test_a_window_over_midnight_is_open_on_both_sides_of_it(when: str, is_open: bool) -> None:
    assert opening(NIGHT, BERLIN, at(when)).is_open == is_open


def test_a_window_belongs_to_the_day_on_which_it_opens() -> None:
    windows = (parse_window("Fri 22:00-06:00"),)
    assert opening(windows, BERLIN, at("2026-12-05T03:00")).is_open  # Saturday
    closed = opening(windows, BERLIN, at("2026-12-06T03:00"))
    assert (closed.is_open, closed.until_s) == (False, at("2026-12-11T22:00"))


def test_a_night_is_an_hour_shorter_or_longer_when_the_clocks_change() -> None:
    def length_h(evening: str) -> float:
        return (opening(NIGHT, BERLIN, at(evening)).until_s - at(evening)) / 3600

    assert [length_h(f"2026-{day}T22:00") for day in ("03-27", "03-28", "10-24")] == [8, 7, 9]


def test_a_window_that_a_change_of_clocks_swallows_opens_all_the_same() -> None:
    windows = (parse_window("02:00-03:00"),)
    moment = opening(windows, BERLIN, at("2026-03-28T12:00")).until_s
    assert opening(windows, BERLIN, moment).is_open
    assert moment == at("2026-03-29T03:00")


def test_windows_that_touch_are_one() -> None:
    windows = (parse_window("20:00-00:00"), parse_window("00:00-04:00"))
    assert opening(windows, BERLIN, at("2026-12-01T21:00")).until_s == at("2026-12-02T04:00")


@pytest.mark.parametrize(
    "text", ["", "22-06", "25:00-01:00", "10:61-11:00", "10:00-10:00", "Foo 10:00-11:00", "22:00"]
)
def test_a_wrong_window_is_told_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_window(text)


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("4h", 14400), ("2w", 14 * DAY_S)])
def test_intervals_have_units(text: str, seconds: int) -> None:
    assert parse_interval(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "h", "-1h", "0d", "1.5h", "1y", "٣h"])
def test_a_wrong_interval_is_told_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_interval(text)


times = st.floats(min_value=1.6e9, max_value=2.2e9)
names = st.text(max_size=12)
windows_of = st.lists(
    st.builds(
        lambda begin, length, days: Window(begin, begin + length, frozenset(days)),
        st.integers(0, 1439),
        st.integers(1, 1440),
        st.sets(st.integers(0, 6), min_size=1),
    ),
    max_size=2,
).map(tuple)
zones = st.sampled_from(["UTC", BERLIN, "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"])


@given(names, st.sampled_from([900.0, 3600.0 * 4, DAY_S, 7.0 * DAY_S]), windows_of, zones, times)
@settings(max_examples=30)  # each looks at weeks of a calendar
def test_a_due_time_is_past_and_stays_until_the_next(
    name: str, every_s: float, windows: tuple[Window, ...], zone: str, now_s: float
) -> None:
    slot = latest_slot(name, every_s, windows, zone, now_s)
    assert slot <= now_s
    # However windows lie: within an interval, and the days for which none opens, there was one.
    assert now_s - slot <= 2 * every_s + 8 * DAY_S * bool(windows)
    later = latest_slot(name, every_s, windows, zone, now_s + every_s / 3)
    assert later >= slot


@given(st.sampled_from([1, 7]), times)
@settings(max_examples=10)
def test_nightly_starts_are_spread_over_the_first_half_of_the_window(
    days: int, now_s: float
) -> None:
    slots = [latest_slot(f"vm{n}", days * DAY_S, NIGHT, "UTC", now_s) for n in range(100)]
    assert all(opening(NIGHT, "UTC", slot).is_open for slot in slots)
    assert len(set(slots)) == 100
    assert len({slot // DAY_S for slot in slots}) >= days


def test_places_of_names_are_even() -> None:
    counts = [0] * 10
    for number in range(10_000):
        counts[int(phase(f"machine-{number}") * 10)] += 1
    assert min(counts) > 850


@given(windows_of, zones, times)
def test_what_an_opening_says_until_is_true(
    windows: tuple[Window, ...], zone: str, now_s: float
) -> None:
    state = opening(windows, zone, now_s)
    if not state.until_s:
        assert state.is_open == (not windows) or not state.is_open
    else:
        assert state.until_s > now_s
        after = opening(windows, zone, state.until_s)
        # A window of all days goes on into the next piece of it.
        assert after.is_open or state.is_open
