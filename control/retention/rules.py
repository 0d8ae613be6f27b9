# SPDX-License-Identifier: Apache-2.0
"""Which archives of one machine stay: Proxmox's rules (`keep-last`, `keep-daily`, …). Pure.

The rules are applied one after the other. Each keeps the newest archive of its
latest N hours, days, … in which there is one, and counts only such in which an
earlier rule has not kept one already. What is protected stays and counts for nothing.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Year to second, of the clock on the wall where the archive was made.
When = tuple[int, int, int, int, int, int]


class Mark(enum.Enum):
    KEEP = "keep"
    REMOVE = "remove"
    PROTECTED = "protected"


class Archive(NamedTuple):
    """Where, of which machine, and from when it is."""

    path: str
    group: str
    when: When
    protected: bool = False


class Verdict(NamedTuple):
    """`rule` is the one that keeps it; empty where none does."""

    archive: Archive
    mark: Mark
    rule: str


def _week(archive: Archive) -> Any:
    return datetime.date(*archive.when[:3]).isocalendar()[:2]


# In the order in which they are applied: what a rule calls the same.
RULES: Mapping[str, Callable[[Archive], Any]] = {
    "last": lambda archive: (archive.when, archive.path),
    "hourly": lambda archive: archive.when[:4],
    "daily": lambda archive: archive.when[:3],
    "weekly": _week,
    "monthly": lambda archive: archive.when[:2],
    "yearly": lambda archive: archive.when[:1],
}


def judge(archives: Sequence[Archive], keep: Mapping[str, int]) -> list[Verdict]:
    """All archives of one group, the newest first. `keep` has a number for some of the rules."""
    newest_first = sorted(archives, key=lambda a: (a.when, a.path), reverse=True)
    marks: dict[Archive, tuple[Mark, str]] = {
        archive: (Mark.PROTECTED, "") for archive in newest_first if archive.protected
    }
    for rule, same in RULES.items():
        if keep.get(rule):
            _apply(rule, same, keep[rule], newest_first, marks)
    return [Verdict(archive, *marks.get(archive, (Mark.REMOVE, ""))) for archive in newest_first]


def _apply(
    rule: str,
    same: Callable[[Archive], Any],
    count: int,
    newest_first: Sequence[Archive],
    marks: dict[Archive, tuple[Mark, str]],
) -> None:
    before = {same(a) for a in newest_first if a in marks and marks[a][0] is Mark.KEEP}
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
