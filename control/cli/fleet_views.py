# SPDX-License-Identifier: Apache-2.0
"""What `vmapipe fleet` shows of a catalogue: tables of running jobs and of a machine's history."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.records import ArchiveRecord, DrillRecord, RunRecord, VerificationRecord
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.text import human_bytes, one_line

if TYPE_CHECKING:
    from vmapipe.fleet.planner import FleetPlan

_CELL_CHARS = 200
# Of each kind; a year of a machine that is backed up every hour has 8,760.
_MOST_RUNS = 10_000


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as what is in them."""
    shown = [[one_line(cell, _CELL_CHARS) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def moment(seconds: float) -> str:
    """Return a time of this host's clock on the wall."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"


def show_plan(found: FleetPlan, *, as_json: bool) -> None:
    """Print what would start, and why not of all others; what is not due comes last."""
    waits = sorted(found.waits, key=lambda w: (w.why in ("not-due", "no-archive"), w.task))
    if as_json:
        for task in found.starts:
            print(json.dumps({**task._asdict(), "starts": True}))
        for wait in waits:
            reason = {"why": wait.why, "text": wait.text, "until": wait.until_s}
            print(json.dumps({**wait.task._asdict(), "starts": False, **reason}))
        return
    rows = [("STARTS", "MACHINE", "JOB", "HOST", "TARGET", "WHY NOT")]
    rows += [("yes", t.machine, t.verb, t.host, t.target, "") for t in found.starts]
    for wait in waits:
        until = f", until {moment(wait.until_s)}" if wait.until_s else ""
        words = f"{wait.why}: {wait.text}{until}"
        job = wait.task
        rows.append(("no", job.machine, job.verb, job.host, job.target, words))
    show_table(rows)


def show_running(catalogue: Catalogue, *, as_json: bool) -> None:
    """Print the jobs that run and wait. Raises Failure."""
    runs = catalogue.running()
    if as_json:
        for record in runs:
            print(json.dumps(dataclasses.asdict(record)))
        return
    if not runs:
        print("nothing runs")
        return
    rows = [("JOB", "WHAT", "MACHINE", "HOST", "TARGET", "STATE", "DONE", "RATE", "SINCE")]
    for record in runs:
        share = 100 * record.done_bytes // record.total_bytes if record.total_bytes else 0
        rate = f"{human_bytes(record.rate_bytes_s)}/s" if record.rate_bytes_s else ""
        since = moment(record.started_s or record.planned_s)
        what = (record.run, record.verb, record.machine, record.host, record.target)
        rows.append((*what, record.state, f"{share} %", rate, since))
    show_table(rows)


def show_history(catalogue: Catalogue, machine: str, *, as_json: bool) -> None:
    """Print what was done with a machine, the latest first. Raises Failure where nothing was."""
    runs = catalogue.select(RunRecord, "-planned_s", _MOST_RUNS, machine=machine)
    if not runs:
        names = sorted({r.machine for r in catalogue.select(RunRecord, "-planned_s", 1000)})
        close = [name for name in names if machine in name] or names
        known = ", ".join(close[:10]) or "none at all"
        raise Failure(f"nothing was done with a machine {machine!r}; there is {known}")
    if as_json:
        for run in runs:
            print(json.dumps({"record": "run", **dataclasses.asdict(run)}))
        for archive in catalogue.select(ArchiveRecord, machine=machine):
            print(json.dumps({"record": "archive", **dataclasses.asdict(archive)}))
        for look in catalogue.select(VerificationRecord, machine=machine):
            print(json.dumps({"record": "verification", **dataclasses.asdict(look)}))
        for test in catalogue.select(DrillRecord, machine=machine):
            print(json.dumps({"record": "drill", **dataclasses.asdict(test)}))
        return
    rows = [("WHEN", "WHAT", "STATE", "SECONDS", "ARCHIVE", "WORDS")]
    for run in runs:
        seconds = f"{run.ended_s - run.started_s:.0f}" if run.ended_s else ""
        when = moment(run.started_s or run.planned_s)
        rows.append((when, run.verb, run.state, seconds, run.archive, run.text))
    show_table(rows)
