# SPDX-License-Identifier: Apache-2.0
"""`vmapipe report`: what folders and buckets of archives say of their machines."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.errors import EXIT_DAMAGED, Failure, UsageError, os_error_text
from vmapipe.runtime.process import run
from vmapipe.runtime.side_files import write_whole
from vmapipe.runtime.text import human_age, one_line

if TYPE_CHECKING:
    from vmapipe.fleet.records import DrillRecord
    from vmapipe.fleet.report.facts import FleetReport
    from vmapipe.fleet.report.page import PictureOf

DESCRIPTION = """\
Say of every machine whether it is safe: how old its newest archive is, on which days
one was stored, what was verified, what booted in a restore test, what is wrong, and the way out.
Only the archives of the named folders and buckets are looked at, by their names, and what
`vmapipe verify` and `vmapipe drill` have left beside them. Nothing is changed.
"""

EPILOG = """\
An archive belongs to the machine, and is from the time, that its name says:
vzdump-qemu-100-2026_01_31-02_00_00.vma.zst, vm-2026-01-31.vma. One without a date is a machine of its own.

examples:
  vmapipe report /srv/backup
  vmapipe report /srv/backup s3://offsite/vm --every 1d --drill-every 30d --html report.html
  vmapipe report /srv/backup --metrics /var/lib/prometheus/node-exporter/vmapipe_report.prom

exit codes: 0 all is as promised, or only with warnings; 1 it could not be found out; 2 wrong use;
4 a machine is not safe
"""

# A page with more days has no room for the table's other columns.
_MAX_DAYS = 366


class NotSafe(Failure):
    """The report was made, and says that a machine is not safe."""

    exit_code = EXIT_DAMAGED


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "places", nargs="+", metavar="PLACE", help="a folder, or s3://BUCKET/PREFIX/"
    )
    promises = parser.add_argument_group("what was promised")
    promises.add_argument(
        "--every",
        metavar="TIME",
        default="1d",
        help="how often a machine has to be stored, such as 4h, 1d, 1w; late is what is older by "
        "half (default: 1d; none: nothing is late)",
    )
    promises.add_argument(
        "--drill-every",
        metavar="TIME",
        default="none",
        help="how often a restore test has to be made; after twice that time it is missed (default: none)",
    )
    add_report_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    return run(prog, lambda: _report(options))


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add where a report goes, and what it shows."""
    group = parser.add_argument_group(
        "the report: where it goes (a table is printed, if nothing is named), and what it shows"
    )
    group.add_argument("--html", metavar="FILE", help="one page that needs no server and no script")
    group.add_argument(
        "--metrics", metavar="FILE", help="a text file for Prometheus' node_exporter (NAME.prom)"
    )
    group.add_argument("--title", default="Backups", help="the page's title (default: Backups)")
    group.add_argument(
        "--days", type=int, default=31, metavar="N", help="how many days are shown (default: 31)"
    )
    group.add_argument(
        "--time-zone",
        default="",
        metavar="ZONE",
        help="whose days, such as Europe/Vienna (default: this host's)",
    )


def _report(options: argparse.Namespace) -> None:
    # Imported here: `--help` comes sooner without.
    from vmapipe.fleet.report.facts import Promise, ReportInput, make_report
    from vmapipe.fleet.rescan import read_place
    from vmapipe.places.place import open_place

    zone = check_report_options(options)
    promise = Promise(
        _interval("--every", options.every), _interval("--drill-every", options.drill_every)
    )
    found = []
    for name in options.places:
        with contextlib.closing(open_place(name)) as place:
            found.append(read_place(place, name))
    records = ReportInput(
        [],
        [archive for one in found for archive in one.archives],
        [seen for one in found for seen in one.verifications],
        [drill for one in found for drill in one.drills],
    )
    report = make_report(records, {"": promise}, time.time(), zone, options.days, options.title)
    give_out(report, options)


def check_report_options(options: argparse.Namespace) -> str:
    """Return the name of the time zone. Raises UsageError."""
    if not 1 <= options.days <= _MAX_DAYS:
        raise UsageError(f"--days is 1 to {_MAX_DAYS}")
    zone: str = options.time_zone or _own_zone()
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(
            f"--time-zone {one_line(zone, 200)!r} is not known here; Europe/Vienna and UTC are such names"
        ) from error
    return zone


def _own_zone() -> str:
    """The name of this host's time zone, as Debian keeps it; UTC where that is not told."""
    if "TZ" in os.environ:
        return os.environ["TZ"].removeprefix(":") or "UTC"
    with contextlib.suppress(OSError):
        _, found, name = os.path.realpath("/etc/localtime").partition("/zoneinfo/")
        if found:
            return name.removeprefix("posix/")
    return "UTC"


def _interval(option: str, text: str) -> float:
    from vmapipe.fleet.windows import parse_interval

    if text == "none":
        return 0.0
    try:
        return parse_interval(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}, or none") from error


def beside_archive(drill: DrillRecord) -> bytes | None:
    """Return the picture of a restore test from the folder of its evidence, where that can be read from here."""
    from vmapipe.access.drill.result import read_picture

    return read_picture(drill.picture, drill.archive)


def give_out(
    report: FleetReport, options: argparse.Namespace, picture_of: PictureOf = beside_archive
) -> None:
    """Write and print what was asked for. Raises Failure, and NotSafe at the end."""
    if options.html:
        from vmapipe.fleet.report.page import render_page

        _write(options.html, render_page(report, picture_of))
    if options.metrics:
        from vmapipe.fleet.report.metrics import render_metrics

        _write(options.metrics, render_metrics(report))
    if options.json:
        print(json.dumps(dataclasses.asdict(report)), flush=True)
    elif not (options.html or options.metrics):
        print("\n".join(_table(report)), flush=True)
    if critical := report.count("critical"):
        are = "is" if critical == 1 else "are"
        raise NotSafe(f"{critical} of {len(report.machines)} machines {are} not safe")


def _write(path: str, text: str) -> None:
    """The page's reader and the exporter are other users."""
    try:
        write_whole(path, text.encode(errors="backslashreplace"), 0o644)
    except OSError as error:
        raise Failure(f"cannot write {path}: {os_error_text(error)}") from error


def _table(report: FleetReport) -> list[str]:
    rows = [("MACHINE", "NEWEST", "PROMISED", "ARCHIVES", "RESTORE TEST", "")]
    for row in report.machines:
        tested = ""
        if row.drill is not None:
            tested = f"{row.drill.verdict}, {human_age(report.made_s - row.drill.tested_s)} ago"
        rows.append(
            (
                one_line(row.machine, 110),
                human_age(row.age_s) if row.newest else "never",
                human_age(row.promised_s) if row.promised_s else "",
                str(row.archives),
                tested,
                "; ".join(problem.text for problem in row.problems) or "ok",
            )
        )
    widths = [max(len(cells[column]) for cells in rows) for column in range(5)]
    lines = []
    for cells in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        lines.append(one_line("  ".join([*padded, cells[-1]]).rstrip()))
    return lines
