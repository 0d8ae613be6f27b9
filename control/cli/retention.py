# SPDX-License-Identifier: Apache-2.0
"""The choice of archives of one machine that stay: Proxmox's rules (`keep-last`, `keep-daily`, …). Pure.

The rules are applied one after the other. Each keeps the newest archive of its
latest N hours, days, … in which there is one, and counts only such in which an
earlier rule has not kept one already. What is protected stays and counts for nothing;
so do archives whose name cannot be true, and those that were stored too short a time ago
to be believed: whoever can store archives must not be able to push older ones out with them.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Year to second, of the clock on the wall where the archive was made.
When = tuple[int, int, int, int, int, int]


# Between the clock of the machine that names an archive and the one of the host that stores it
# may lie any two time zones (26 hours apart), and between its begin and its end so many days.
_ZONES_S = 26 * 3600
_LONGEST_BACKUP_S = 3 * 86400
# Told: so many more archives of a day, and so many times as many, as are usual.
_FLOOD_MORE, _FLOOD_TIMES = 4, 3
_DAY_S = 86400

WITHIN = "within"


class Mark(enum.Enum):
    """The decision on an archive; all but REMOVE stay, and all but KEEP count for nothing."""

    KEEP = "keep"
    REMOVE = "remove"
    PROTECTED = "protected"
    #: By its name, or by its file's time, it is from a time to come.
    FUTURE = "future"
    #: It was stored at another time than its name says.
    MISDATED = "misdated"
    #: No rule keeps it, and its lock is not over.
    LOCKED = "locked"


class StoredArchive(NamedTuple):
    """An archive's place, machine and time."""

    path: str
    group: str
    when: When
    protected: bool = False
    #: When its last byte was written, by the clock of the host that has it: seconds since 1970.
    stored_s: float = 0.0


class Clock(NamedTuple):
    """`now_s` of this host. `within_s`: what was stored less long ago stays, and does not count.

    `is_service`: a service stores there, whose clients choose the names: a name has to fit the
    time at which it was stored.
    """

    now_s: float
    within_s: float = 0.0
    is_service: bool = False


class Verdict(NamedTuple):
    """`rule` is the one that keeps it; empty where none does."""

    archive: StoredArchive
    mark: Mark
    rule: str


def _week(archive: StoredArchive) -> Any:
    return datetime.date(*archive.when[:3]).isocalendar()[:2]


# In the order in which they are applied: what a rule calls the same.
RULES: Mapping[str, Callable[[StoredArchive], Any]] = {
    "last": lambda archive: (archive.when, archive.path),
    "hourly": lambda archive: archive.when[:4],
    "daily": lambda archive: archive.when[:3],
    "weekly": _week,
    "monthly": lambda archive: archive.when[:2],
    "yearly": lambda archive: archive.when[:1],
}


def judge(
    archives: Sequence[StoredArchive], keep: Mapping[str, int], clock: Clock | None = None
) -> list[Verdict]:
    """All archives of one group, the newest first. `keep` has a number for some of the rules.

    Without a clock names are believed.
    """
    newest_first = sorted(archives, key=lambda a: (a.when, a.path), reverse=True)
    marks: dict[StoredArchive, tuple[Mark, str]] = {}
    for archive in newest_first:
        aside = _set_aside(archive, clock)
        if aside:
            marks[archive] = aside
    for rule, same in RULES.items():
        if keep.get(rule):
            _apply(rule, same, keep[rule], newest_first, marks)
    return [Verdict(archive, *marks.get(archive, (Mark.REMOVE, ""))) for archive in newest_first]


def _set_aside(archive: StoredArchive, clock: Clock | None) -> tuple[Mark, str] | None:
    """The mark of an archive that no rule counts."""
    if archive.protected:
        return Mark.PROTECTED, ""
    if clock is None:
        return None
    named_s = _seconds(archive.when)
    if max(named_s, archive.stored_s) > clock.now_s + _ZONES_S:
        return Mark.FUTURE, ""
    late_s = archive.stored_s - named_s
    if clock.is_service and not -_ZONES_S <= late_s <= _LONGEST_BACKUP_S:
        return Mark.MISDATED, ""
    if archive.stored_s > clock.now_s - clock.within_s:
        return Mark.KEEP, WITHIN
    return None


def _seconds(when: When) -> float:
    """As if it were UTC: `_ZONES_S` allows for what it may be."""
    return datetime.datetime(*when, tzinfo=datetime.UTC).timestamp()


def flood(archives: Sequence[StoredArchive], now_s: float, days: int = 7) -> tuple[int, int] | None:
    """(how many were stored in the last 24 hours, how many a day before), where that is unusual.

    Of the last `days` only: rules have thinned out what is older.
    """
    counts = [0] * days
    for archive in archives:
        day = int((now_s - archive.stored_s) // _DAY_S)
        if 0 <= day < days:
            counts[day] += 1
    usual = max(counts[1:], default=0)
    today = counts[0]
    if today >= _FLOOD_TIMES * usual and today >= usual + _FLOOD_MORE and len(archives) > today:
        return today, usual
    return None


def _apply(
    rule: str,
    same: Callable[[StoredArchive], Any],
    count: int,
    newest_first: Sequence[StoredArchive],
    marks: dict[StoredArchive, tuple[Mark, str]],
) -> None:
    before = {
        same(a)
        for a in newest_first
        if a in marks and marks[a][0] is Mark.KEEP and marks[a][1] != WITHIN
    }
    now: set[Any] = set()
    for archive in newest_first:
        period = same(archive)
        if archive in marks or period in before:
            continue
        if period in now:
            marks[archive] = (Mark.REMOVE, "")
        elif len(now) >= count:
            return
        else:
            now.add(period)
            marks[archive] = (Mark.KEEP, rule)
