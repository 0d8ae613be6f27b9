# SPDX-License-Identifier: Apache-2.0
"""The page: valid, without scripts, nothing from outside, and every text of a stranger escaped."""

from __future__ import annotations

import html.parser
import json
import random
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet.report.records import (
    HOUR_S,
    NOW_S,
    PROMISES,
    archive,
    drill,
    machine,
    small_fleet,
)
from tests.machine import Need
from vmapipe.access.drill.screen import Picture, encode_png
from vmapipe.fleet.records import DrillRecord
from vmapipe.fleet.report.facts import FleetReport, ReportInput, make_report
from vmapipe.fleet.report.metrics import render_metrics
from vmapipe.fleet.report.page import render_page
from vmapipe.runtime.text import one_line

PNG = encode_png(Picture(8, 4, bytes(96)))
# What a page without scripts needs; a stranger's text can bring nothing else into it.
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "h1",
    "h2",
    "p",
    "strong",
    "ul",
    "li",
    "b",
    "svg",
    "path",
    "polyline",
    "text",
    "main",
    "section",
    "details",
    "summary",
    "span",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "div",
    "figure",
    "img",
    "figcaption",
}
DASHBOARD = Path(__file__).parents[3] / "packaging" / "grafana-dashboard.json"


class Tags(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}


def page_of(report: FleetReport, picture: bytes | None = PNG) -> str:
    def picture_of(_: DrillRecord) -> bytes | None:
        return picture

    return render_page(report, picture_of)


@pytest.mark.parametrize("records", [small_fleet(), ReportInput([], [])], ids=["fleet", "nothing"])
def test_a_validator_finds_nothing(records: ReportInput, tmp_path: Path, need: Need) -> None:
    (tidy,) = need("tidy")
    page = tmp_path / "report.html"
    page.write_text(page_of(make_report(records, PROMISES, NOW_S)), encoding="utf-8")
    done = subprocess.run([tidy, "-q", "-e", page], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_machine_its_problems_and_its_picture_are_on_the_page() -> None:
    report = make_report(small_fleet(), PROMISES, NOW_S, title="Backups of <example>")
    page = page_of(report)
    for row in report.machines:
        assert row.machine in page
        for problem in row.problems:
            assert problem.way_out.replace("'", "&#39;") in page
    assert "5 of 12 machines are not safe." in page
    assert "Backups of &lt;example&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert "not backed up: told by the owner" in page


@settings(max_examples=30)
@given(st.text(max_size=60) | st.sampled_from(["<script>x()</script>", '"><img src=//x>', "{{1}}"]))
def test_whatever_a_machine_is_called_the_page_has_the_same_elements(name: str) -> None:
    records = ReportInput(
        [machine("m")],
        [archive(name, HOUR_S, f"{name}.vma"), archive(name, 90 * 24 * HOUR_S)],
        drills=[drill(name, f"{name}.vma", "not-booted")],
    )
    tags = Tags(page_of(make_report(records, PROMISES, NOW_S, title=name)))
    assert tags.found <= TAGS
    assert not [a for a, _ in tags.attributes if a.startswith("on") or a == "href"]
    assert all(v.startswith("data:image/png") for a, v in tags.attributes if a == "src")


def test_a_picture_that_is_none_or_too_large_is_left_out() -> None:
    report = make_report(small_fleet(), PROMISES, NOW_S)
    for picture in (None, b"<svg onload=x()>", PNG + b"x"):
        page = page_of(report, picture)
        assert "data:" not in page.replace("img-src data:", "")
        assert page.count("no picture") == 2


def test_pictures_have_a_limit_together_and_the_page_says_so() -> None:
    names = [f"m{n}" for n in range(40)]
    records = ReportInput(
        [], [archive(n, HOUR_S, n) for n in names], drills=[drill(n, n, "booted") for n in names]
    )
    large = encode_png(Picture(640, 480, random.randbytes(3 * 640 * 480)))
    page = page_of(make_report(records, PROMISES, NOW_S), large)
    assert len(page) < 20 << 20
    assert "more have no room on this page" in page


def test_many_machines_with_one_trouble_are_one_line() -> None:
    names = [f"m{n:03}" for n in range(300)]
    page = page_of(make_report(ReportInput([machine(n) for n in names], []), {}, NOW_S))
    assert page.count("no archive of it") == 1
    assert "and 288 more" in page
    # A machine without an archive costs less than this; none is left out.
    assert len(page) < 300 * 1000
    assert all(f">{name}" in page for name in names)


def test_the_dashboard_draws_metrics_that_there_are() -> None:
    text = render_metrics(make_report(small_fleet(), PROMISES, NOW_S))
    there = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    drawn = {
        word
        for panel in panels
        for target in panel["targets"]
        for word in target["expr"].replace("(", " ").replace("{", " ").split()
        if word.startswith("vmapipe_")
    }
    assert drawn
    assert {name.rstrip(")") for name in drawn} <= there


def test_metrics_name_each_problem_once_and_escape_what_a_machine_is_called() -> None:
    odd = 'a"b\\c\nd'
    records = ReportInput([machine(odd), machine("never")], [archive(odd, 90 * HOUR_S)])
    text = render_metrics(make_report(records, PROMISES, NOW_S))
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(set(samples)) == len(samples)
    problems = [dict(labels) for name, labels in samples if name == "vmapipe_machine_problem"]
    assert problems == [
        {"machine": one_line(odd), "host": "pve1", "kind": "late"},
        {"machine": "never", "host": "pve1", "kind": "never"},
    ]


def test_a_page_costs_no_more_a_machine_when_there_are_many() -> None:
    """By its size when it is packed: rows of thousands of machines differ by their figures only."""
    few, many = (
        zlib.compress(
            page_of(
                make_report(
                    ReportInput([], [archive(f"m{n}", HOUR_S * (1 + n % 9)) for n in range(count)]),
                    PROMISES,
                    NOW_S,
                )
            ).encode()
        )
        for count in (200, 2000)
    )
    assert len(many) < 10 * len(few)
