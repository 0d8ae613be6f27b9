# SPDX-License-Identifier: Apache-2.0
"""What a report says of a machine follows from its records, and nothing that is wrong is left out."""

from __future__ import annotations

import datetime
import gc
import sys
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fleet.report.records import (
    DAY_S,
    HOUR_S,
    NOW_S,
    PROMISES,
    archive,
    drill,
    failed,
    machine,
    small_fleet,
)
from vmapipe.fleet.records import VerificationRecord
from vmapipe.fleet.report.check import judge, plugin_lines
from vmapipe.fleet.report.facts import FleetReport, MachineReport, Promise, ReportInput, make_report


def rows(report: FleetReport) -> dict[str, MachineReport]:
    return {row.machine: row for row in report.machines}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("well", []),
        ("late", ["late"]),
        ("never", ["never"]),
        ("broken", ["damaged"]),
        ("stuck", ["not-booted"]),
        ("retry", ["failed"]),
        ("untested", ["untested"]),
        ("gone", ["vanished"]),
        ("parked", []),
        ("new", ["new"]),
        ("homeless", ["no-target"]),
        ("unseen", ["unverified"]),
    ],
)
def test_what_is_wrong_with_a_machine_is_said_with_a_way_out(name: str, kinds: list[str]) -> None:
    row = rows(make_report(small_fleet(), PROMISES, NOW_S))[name]
    assert [problem.kind for problem in row.problems] == kinds
    assert all(problem.text and problem.way_out for problem in row.problems)


def test_a_plugin_says_what_the_report_says_and_which_hosts_do_not_answer() -> None:
    report = make_report(small_fleet(), PROMISES, NOW_S)
    checked = judge(report, {"pve9": "no route | to it"})
    assert (checked.state, checked.machines) == ("critical", 11)
    kinds = {(row.machine, p.kind) for row in report.machines for p in row.problems}
    assert {(t.name, t.what) for t in checked.troubles} == (kinds - {("new", "new")}) | {
        ("pve9", "host-down")
    }
    first, *others = plugin_lines(checked)
    assert first.startswith(
        "FLEET CRITICAL - 11 machines, 1 damaged, 1 never, 1 late, 1 not-booted, "
    )
    assert first.count("|") == 1
    assert "late=1;;;0" in first
    assert "host_down=1;;;0" in first
    assert "warning: pve9: no route / to it" in others
    assert not any("|" in line for line in others)
    well = make_report(ReportInput([machine("a")], [archive("a", HOUR_S)]), PROMISES, NOW_S)
    assert plugin_lines(judge(well, {}))[0].startswith("FLEET OK - 1 machines, all as promised | ")
    assert judge(make_report(ReportInput([], []), PROMISES, NOW_S), {}).state == "unknown"


def test_how_often_a_backup_has_failed_since_the_last_one_is_said() -> None:
    runs = [failed("a", age) for age in (9 * HOUR_S, 3 * HOUR_S, HOUR_S)]
    records = ReportInput([machine("a")], [archive("a", 5 * HOUR_S)], runs=runs)
    (problem,) = rows(make_report(records, PROMISES, NOW_S))["a"].problems
    assert "it failed 2 times, the last one: cannot connect" in problem.text


def test_the_worst_comes_first_and_a_reason_is_repeated() -> None:
    report = make_report(small_fleet(), PROMISES, NOW_S)
    assert [row.severity for row in report.machines] == sorted(
        (row.severity for row in report.machines), key=["critical", "warning", "ok"].index
    )
    assert report.count("critical") == 5
    assert "is QEMU running?" in rows(report)["never"].problems[0].text
    assert "is QEMU running?" in rows(report)["retry"].problems[0].text


def test_an_archive_that_was_removed_is_shown_on_its_day_and_counts_for_nothing() -> None:
    old = archive("a", 2 * HOUR_S, removed_s=NOW_S - HOUR_S)
    row = rows(make_report(ReportInput([machine("a")], [old]), PROMISES, NOW_S, days=3))["a"]
    assert row.days == ["", "", "stored"]
    assert (row.archives, row.stored_bytes, row.newest) == (0, 0, None)
    assert [problem.kind for problem in row.problems] == ["never"]


def test_damage_of_an_archive_that_is_gone_is_no_problem_any_more() -> None:
    seen = VerificationRecord("a", "b1", "old.vma", NOW_S - HOUR_S, "damaged")
    records = ReportInput(
        [machine("a")],
        [archive("a", DAY_S, "old.vma", removed_s=NOW_S), archive("a", HOUR_S)],
        [seen],
        [drill("a", "old.vma", "not-booted")],
    )
    assert rows(make_report(records, PROMISES, NOW_S))["a"].problems == []


def test_a_failure_counts_until_a_later_backup_was_stored() -> None:
    records = ReportInput([machine("a")], [archive("a", HOUR_S)], runs=[failed("a", 5 * HOUR_S)])
    row = rows(make_report(records, PROMISES, NOW_S, days=2))["a"]
    assert row.problems == []
    assert row.days == ["", "stored"]


def test_the_best_proof_of_a_day_is_shown_and_damage_above_all() -> None:
    day = [archive("a", HOUR_S, "1.vma"), archive("a", 2 * HOUR_S, "2.vma")]
    seen = VerificationRecord("a", "b1", "2.vma", NOW_S, "ok")
    input_ = ReportInput([machine("a")], day, [seen])
    assert rows(make_report(input_, PROMISES, NOW_S, days=1))["a"].days == ["verified"]
    booted = input_._replace(drills=[drill("a", "1.vma", "booted")])
    assert rows(make_report(booted, PROMISES, NOW_S, days=1))["a"].days == ["booted"]
    damaged = booted._replace(
        verifications=[VerificationRecord("a", "b1", "2.vma", NOW_S, "damaged")]
    )
    assert rows(make_report(damaged, PROMISES, NOW_S, days=1))["a"].days == ["damaged"]


def test_an_archive_of_a_machine_that_no_scan_knows_is_in_the_report() -> None:
    report = make_report(ReportInput([], [archive("x", HOUR_S)]), {}, NOW_S)
    assert [row.machine for row in report.machines] == ["x"]
    assert report.targets[0].stored_bytes == 1 << 30


def test_a_report_costs_two_calls_an_archive() -> None:
    """Counted, not timed: of 300,000 archives each call is a tenth of a second. A day's number is one; one is spare."""

    def calls(archives: int) -> int:
        names = [f"vm{n}" for n in range(10)]
        records = ReportInput(
            [machine(name) for name in names],
            [archive(name, HOUR_S * (1 + n)) for name in names for n in range(archives)],
        )
        count = [0]

        def seen(frame: object, event: str, value: object) -> None:
            count[0] += event == "call"

        gc.disable()  # what others have it call would count, too
        sys.setprofile(seen)
        try:
            make_report(records, PROMISES, NOW_S)
        finally:
            sys.setprofile(None)
            gc.enable()
        return count[0]

    assert calls(300) - calls(100) <= 2 * 2000


def test_without_a_promise_nothing_is_late() -> None:
    report = make_report(ReportInput([], [archive("x", 400 * DAY_S)]), {"": Promise(0.0)}, NOW_S)
    assert report.machines[0].problems == []


@given(
    st.integers(1_700_000_000, 1_900_000_000),
    st.integers(1, 400),
    st.integers(0, 500 * 86400),
    st.sampled_from(["UTC", "Europe/Berlin", "Pacific/Apia", "America/St_Johns"]),
)
def test_an_archive_is_shown_on_the_day_that_the_clock_on_the_wall_had(
    now_s: int, days: int, age_s: int, zone: str
) -> None:
    one = archive("x", 0.0, stored_s=float(now_s - age_s), instant_s=0.0)
    report = make_report(ReportInput([], [one]), {}, float(now_s), zone, days)
    first = datetime.date.fromisoformat(report.first_day)
    day = datetime.datetime.fromtimestamp(now_s - age_s, ZoneInfo(zone)).date()
    index = (day - first).days
    cells = report.machines[0].days
    assert len(cells) == days
    assert [n for n, cell in enumerate(cells) if cell] == ([index] if 0 <= index < days else [])


def test_an_archive_of_a_time_to_come_makes_no_machine_safe() -> None:
    ahead = archive("web", -3 * DAY_S, "a.vma")
    booted = drill("web", "a.vma", "booted", -DAY_S)
    records = ReportInput([machine("web")], [ahead], drills=[booted])
    (row,) = make_report(records, PROMISES, NOW_S).machines
    assert [problem.kind for problem in row.problems] == ["late"]
    assert "a clock was wrong" in row.problems[0].text
