# SPDX-License-Identifier: Apache-2.0
"""Proxmox's rules for what stays, against what they promise."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.cli.retention import RULES, Mark, StoredArchive, Verdict, judge

times = st.datetimes(datetime.datetime(2020, 1, 1), datetime.datetime(2026, 12, 31))  # noqa: DTZ001
keeps = st.dictionaries(st.sampled_from(sorted(RULES)), st.integers(1, 8))


@st.composite
def archives(draw: st.DrawFn) -> list[StoredArchive]:
    """Close together as a rule, so that hours and days have several."""
    first = draw(times)
    gaps = draw(st.lists(st.integers(0, 60 * 24 * 20), max_size=40))
    found, when = [], first
    for number, minutes in enumerate(gaps):
        when += datetime.timedelta(minutes=minutes)
        moment = (when.year, when.month, when.day, when.hour, when.minute, when.second)
        found.append(
            StoredArchive(f"{number}", "g", moment, draw(st.sampled_from([False] * 9 + [True])))
        )
    return draw(st.permutations(found))


def kept(verdicts: list[Verdict]) -> list[str]:
    return [v.archive.path for v in verdicts if v.mark is Mark.KEEP]


@given(archives(), keeps)
def test_every_archive_gets_one_verdict_and_protected_ones_stay(
    found: list[StoredArchive], keep: Mapping[str, int]
) -> None:
    verdicts = judge(found, keep)
    assert sorted(v.archive for v in verdicts) == sorted(found)
    for verdict in verdicts:
        assert (verdict.mark is Mark.PROTECTED) == verdict.archive.protected


@given(archives(), keeps)
def test_each_rule_keeps_at_most_its_number_each_in_a_period_of_its_own(
    found: list[StoredArchive], keep: Mapping[str, int]
) -> None:
    verdicts = judge(found, keep)
    for rule, same in RULES.items():
        mine = [same(v.archive) for v in verdicts if v.rule == rule]
        assert len(mine) <= keep.get(rule, 0)
        assert len(set(mine)) == len(mine)


@given(archives(), keeps)
def test_the_newest_that_is_not_protected_always_stays(
    found: list[StoredArchive], keep: Mapping[str, int]
) -> None:
    free = sorted((a for a in found if not a.protected), key=lambda a: (a.when, a.path))
    if free and keep:
        assert free[-1].path in kept(judge(found, keep))


@given(archives(), keeps)
def test_what_protects_one_takes_the_place_of_no_other(
    found: list[StoredArchive], keep: Mapping[str, int]
) -> None:
    unprotected = [a for a in found if not a.protected]
    assert kept(judge(found, keep)) == kept(judge(unprotected, keep))


@given(archives(), keeps)
def test_pruning_twice_removes_no_more_than_once(
    found: list[StoredArchive], keep: Mapping[str, int]
) -> None:
    """Or a cron job would eat an old archive a night."""
    left = [v.archive for v in judge(found, keep) if v.mark is not Mark.REMOVE]
    assert [v.archive for v in judge(left, keep) if v.mark is Mark.REMOVE] == []


@given(archives(), st.integers(1, 50))
def test_one_rule_alone_keeps_the_newest_of_its_latest_periods(
    found: list[StoredArchive], count: int
) -> None:
    free = sorted((a for a in found if not a.protected), key=lambda a: (a.when, a.path))
    for rule, same in RULES.items():
        newest = {same(archive): archive.path for archive in free}
        periods = sorted(newest, reverse=True)[:count]
        assert sorted(kept(judge(found, {rule: count}))) == sorted(newest[p] for p in periods)


def at(*when: int) -> StoredArchive:
    year, month, day, hour = (*when, 0, 0)[:4]
    return StoredArchive("-".join(map(str, when)), "g", (year, month, day, hour, 0, 0))


def test_a_later_rule_counts_only_periods_that_an_earlier_one_left_empty() -> None:
    """The example of the Proxmox Backup Server's manual, in small."""
    days = [at(2026, 1, day) for day in range(1, 32)]
    verdicts = {
        v.archive.path: v.rule for v in judge(days, {"last": 2, "daily": 3, "weekly": 2}) if v.rule
    }
    assert verdicts == {
        "2026-1-31": "last",
        "2026-1-30": "last",
        "2026-1-29": "daily",
        "2026-1-28": "daily",
        "2026-1-27": "daily",
        # The week from the 26th on has some already.
        "2026-1-25": "weekly",
        "2026-1-18": "weekly",
    }


def test_weeks_are_those_of_iso_8601_across_the_year() -> None:
    verdicts = judge([at(2025, 12, 28), at(2025, 12, 29), at(2026, 1, 4)], {"weekly": 5})
    assert kept(verdicts) == ["2026-1-4", "2025-12-28"]
