# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page: no scripts, nothing loaded from elsewhere, every text escaped. Pure but for the template's file.

Texts come from strangers (names of archives, of machines, last words of programs): the template
escapes whatever it is given, and the page itself forbids scripts and everything from outside.
"""

from __future__ import annotations

import base64
import datetime
import functools
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args
from zoneinfo import ZoneInfo

from vmapipe.access.drill.screen import MAX_PNG_BYTES, is_png
from vmapipe.fleet.records import DrillRecord
from vmapipe.fleet.report.facts import Cell, FleetReport, MachineReport, Problem, Severity
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.text import human_age, human_bytes

#: Returns a picture (PNG) of a restore test, or None.
PictureOf = Callable[[DrillRecord], bytes | None]

# Mail takes a page of 20 MiB.
_MAX_PICTURES_BYTES = 12 << 20
# What is wrong with more machines than that nobody reads; the table has them all.
_MAX_PROBLEMS, _MAX_NAMED = 200, 12
_STEP, _HEIGHT = 7, 14
# The better the proof, the taller: nobody has to tell colours apart.
_CELL_HEIGHTS: Mapping[Cell, int] = {
    "stored": 6,
    "verified": 10,
    "booted": 14,
    "failed": 14,
    "damaged": 14,
}
# The template has it, too.
_CURVE_HEIGHT = 18
_LAST_S = 2.5e11


class ShownPicture(NamedTuple):
    """A restore test with what its screen showed, as a `data:` address; empty: none."""

    row: MachineReport
    drill: DrillRecord
    address: str


def render_page(report: FleetReport, picture_of: PictureOf = lambda drill: None) -> str:
    """Return the page. Raises Failure where the templates' library is not installed."""
    pictures, left_out = _pictures(report, picture_of)
    problems = _grouped(report)
    page: str = _template().render(
        report=report,
        problems=problems,
        pictures=pictures,
        pictures_left_out=left_out,
        days=_day_labels(report),
        step=_STEP,
        strip=_strip,
        strip_text=_strip_text,
        curve=_curve,
        size=human_bytes,
        age=human_age,
        time=lambda at_s: _time(at_s, report.zone),
    )
    return page


@functools.cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise Failure(
            "a report's page needs the library Jinja2: pip install 'vmapipe[report]', "
            "or python3-jinja2 on Debian; --json and --metrics need nothing"
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return environment.from_string(text)


class ShownProblem(NamedTuple):
    """A problem, and the machines that have it in the same words; `left_out`: more that are not named."""

    problem: Problem
    rows: list[MachineReport]
    left_out: int


class ShownProblems(NamedTuple):
    """`left_out`: so many more have no room."""

    shown: list[ShownProblem]
    left_out: int


def _grouped(report: FleetReport) -> dict[Severity, ShownProblems]:
    """Return problems by severity; what several machines have in the same words is said once."""
    groups: dict[Problem, list[MachineReport]] = {}
    for row in report.machines:
        for problem in row.problems:
            groups.setdefault(problem, []).append(row)
    found: dict[Severity, ShownProblems] = {}
    for severity in get_args(Severity):
        of_it = [
            ShownProblem(problem, rows[:_MAX_NAMED], max(0, len(rows) - _MAX_NAMED))
            for problem, rows in groups.items()
            if problem.severity == severity
        ]
        found[severity] = ShownProblems(of_it[:_MAX_PROBLEMS], max(0, len(of_it) - _MAX_PROBLEMS))
    return found


def _time(at_s: float, zone: str) -> str:
    # A name may say the last day that a calendar has, which elsewhere is the one after it.
    at = datetime.datetime.fromtimestamp(min(at_s, _LAST_S), ZoneInfo(zone))
    return at.strftime("%Y-%m-%d %H:%M")


def _day_labels(report: FleetReport) -> list[tuple[int, str]]:
    """Return the number and the label of each Monday among the days."""
    first = datetime.date.fromisoformat(report.first_day)
    days = [first + datetime.timedelta(days=n) for n in range(report.days)]
    return [(n, day.strftime("%d.%m.")) for n, day in enumerate(days) if day.weekday() == 0]


def _strip(row: MachineReport) -> list[tuple[Cell, str]]:
    """Return a machine's days as one path for each kind of cell: ten thousand rows stay light.

    A cell is a vertical line, as broad as a day, from the bottom up.
    """
    paths: dict[Cell, list[str]] = {}
    for index, cell in enumerate(row.days):
        if cell:
            line = f"M{index * _STEP + _STEP // 2} {_HEIGHT}v-{_CELL_HEIGHTS[cell]}"
            paths.setdefault(cell, []).append(line)
    return [(cell, "".join(lines)) for cell, lines in paths.items()]


def _strip_text(row: MachineReport) -> str:
    """The same for who does not see it."""
    counts = {cell: row.days.count(cell) for cell in _CELL_HEIGHTS}
    said = [f"{count} {cell}" for cell, count in counts.items() if count]
    return f"{len(row.days)} days: {', '.join(said) or 'nothing stored'}"


def _curve(sizes: Sequence[int]) -> str:
    """Return the points of a curve, a day a unit of its width; empty: fewer than two days have a size."""
    points = [(index, size) for index, size in enumerate(sizes) if size]
    if len(points) < 2:
        return ""
    most = max(size for _, size in points)
    height = _CURVE_HEIGHT - 2
    return " ".join(f"{index},{1 + height - height * size // most}" for index, size in points)


def _pictures(report: FleetReport, picture_of: PictureOf) -> tuple[list[ShownPicture], int]:
    """Return the last restore tests, those that failed first; and of how many the page has no room."""
    tested = [(row, row.drill) for row in report.machines if row.drill is not None]
    tested.sort(key=lambda pair: (pair[1].verdict == "booted", -pair[1].tested_s))
    shown: list[ShownPicture] = []
    left_bytes, left_out = _MAX_PICTURES_BYTES, 0
    for row, drill in tested:
        if left_bytes < MAX_PNG_BYTES:
            left_out += 1
            continue
        data = picture_of(drill)
        address = ""
        if data is not None and is_png(data):
            left_bytes -= len(data)
            address = "data:image/png;base64," + base64.b64encode(data).decode()
        shown.append(ShownPicture(row, drill, address))
    return shown, left_out
