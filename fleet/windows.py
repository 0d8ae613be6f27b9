# SPDX-License-Identifier: Apache-2.0
"""Times at which something may start, and when it is due again: windows, time zones, spread starts. Pure.

A window is a piece of a local day, over midnight or not, and moves with daylight saving: `22:00-06:00`,
`Sat,Sun 08:00-20:00`. What is due is a grid of times that only a machine's name and its interval decide:
starts are spread, never drift, and whoever asks at whatever time hears the same.
"""

from __future__ import annotations

import bisect
import datetime
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple
from zoneinfo import ZoneInfo

DAY_S = 86400
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"(?:(?P<days>[A-Za-z,\-]+) +)?(\d\d):(\d\d) ?- ?(\d\d):(\d\d)", re.ASCII)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}
# Windows are looked for so far back.
_MOST_S = 3660 * DAY_S
# Starts are spread over so much of a window: what starts last shall be done in it, too.
_SPREAD = 0.5


class Window(NamedTuple):
    """Minutes of the local day on which it opens; `to_minute` may lie in the next day."""

    from_minute: int
    to_minute: int
    weekdays: frozenset[int] = frozenset(range(7))  # 0: Monday


class WindowState(NamedTuple):
    """`open` now; until when; or when it opens next (0: never)."""

    is_open: bool
    until_s: float = 0.0


def parse_window(text: str) -> Window:
    """Read `22:00-06:00` or `Mon-Fri 22:00-06:00`. Raises ValueError with words for the user."""
    match = _WINDOW.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a window such as 22:00-06:00 or Sat,Sun 08:00-20:00")
    hours = [int(match[n]) * 60 + int(match[n + 1]) for n in (2, 4)]
    if max(int(match[3]), int(match[5])) > 59 or max(hours) > 24 * 60:
        raise ValueError(f"{text!r} has a time that no clock shows")
    begin, end = hours
    if begin == end:
        raise ValueError(f"{text!r} has no length; 00:00-24:00 is all day")
    return Window(begin, end if end > begin else end + 24 * 60, _weekdays(match["days"]))


def _weekdays(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found = set[int]()
    for part in text.lower().split(","):
        first, dash, last = part.partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise ValueError(f"{part!r} is not a day: {', '.join(_DAYS)}, or two with a dash")
        begin = _DAYS.index(first)
        length = (_DAYS.index(last) - begin) % 7 if dash else 0
        found |= {(begin + n) % 7 for n in range(length + 1)}
    return frozenset(found)


def parse_interval(text: str) -> float:
    """Read `4h`, `1d`, `30m`, `2w` into seconds. Raises ValueError with words for the user."""
    unit = _UNITS_S.get(text[-1:])
    if unit is None or not (text[:-1].isascii() and text[:-1].isdecimal() and len(text) < 9):
        raise ValueError(f"{text!r} is not a time such as 30m, 4h, 1d, 2w")
    seconds = int(text[:-1]) * unit
    if not seconds:
        raise ValueError(f"{text!r} has no length; for example: 4h")
    if seconds > _MOST_S:
        raise ValueError(f"{text!r} is more than 10 years")
    return float(seconds)


@functools.lru_cache(maxsize=1 << 17)
def phase(name: str) -> float:
    """Return where in its interval a name has its place: 0 to 1, the same everywhere and for ever."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest) / (1 << 48)


@functools.lru_cache(maxsize=1 << 12)
def opening(windows: tuple[Window, ...], zone: str, now_s: float) -> WindowState:
    """Tell whether one of the windows is open; without windows it always is."""
    if not windows:
        return WindowState(True)
    today = datetime.datetime.fromtimestamp(now_s, ZoneInfo(zone)).date()
    following = 0.0
    closes = 0.0
    for begin, end in _intervals(windows, zone, today.toordinal() - 2, today.toordinal() + 9):
        if begin <= (closes or now_s) < end:
            closes = max(closes, end)  # two that overlap or touch are one
        elif begin > now_s and not following:
            following = begin
    return WindowState(True, closes) if closes else WindowState(False, following)


@functools.lru_cache(maxsize=1 << 10)
def _intervals(
    windows: tuple[Window, ...], zone: str, first: int, last: int
) -> tuple[tuple[float, float], ...]:
    """Return the windows that open on these days (ordinals), sorted: begin and end, seconds."""
    found = []
    for ordinal in range(first, last + 1):
        day = datetime.date.fromordinal(ordinal)
        for window in windows:
            if day.weekday() in window.weekdays:
                begin = _moment(day, window.from_minute, zone)
                end = _moment(day, window.to_minute, zone)
                # At the change to summer time a window may have no length: it still is one.
                found.append((begin, end if end > begin else begin + 3600))
    return tuple(sorted(found))


def _moment(day: datetime.date, minute: int, zone: str) -> float:
    """Return the first time at which a clock on the wall shows that minute of a day, or would have."""
    at = datetime.datetime.combine(day, datetime.time(), ZoneInfo(zone))
    # Wall time is what adding to an aware datetime changes; the offset is found afterwards.
    return (at + datetime.timedelta(minutes=minute)).timestamp()


def latest_slot(
    name: str, every_s: float, windows: tuple[Window, ...], zone: str, now_s: float
) -> float:
    """Return the latest time up to now at which this name was due.

    Of whole days with windows: in the window of every so many days, in its first half. Otherwise at
    fixed distances, and a window only lets it start.
    """
    if windows and every_s >= DAY_S:
        return _nightly_slot(phase(name), round(every_s / DAY_S), windows, zone, now_s)
    shift = phase(name) * every_s
    return (now_s - shift) // every_s * every_s + shift


def _nightly_slot(
    place: float, days: int, windows: tuple[Window, ...], zone: str, now_s: float
) -> float:
    begins, ends, ordinals, today = _nights(windows, zone, int(now_s // 900) * 900, days)
    # The machines of several days are divided among these days, and within each over the window.
    which = int(place * days)
    within = place * days - which
    due_day = today - (today - which) % days
    while ordinals and due_day >= ordinals[0]:
        index = bisect.bisect_left(ordinals, due_day)
        if index < len(begins):
            slot = begins[index] + within * _SPREAD * (ends[index] - begins[index])
            if slot <= now_s:
                return slot
        due_day -= days
    return now_s - days * DAY_S


@functools.lru_cache(maxsize=256)
def _nights(
    windows: tuple[Window, ...], zone: str, about_s: int, days: int
) -> tuple[Sequence[float], Sequence[float], Sequence[int], int]:
    """Return the windows of the last periods: begins, ends, the days on which they begin, and today."""
    tz = ZoneInfo(zone)
    # Tomorrow's, too: `about_s` may be a quarter of an hour ago.
    today = datetime.datetime.fromtimestamp(about_s, tz).date().toordinal() + 1
    found = _intervals(windows, zone, today - 4 * days - 8, today)
    ordinals = [datetime.datetime.fromtimestamp(b, tz).date().toordinal() for b, _ in found]
    return [b for b, _ in found], [e for _, e in found], ordinals, today
