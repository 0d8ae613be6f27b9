# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: makes images, runs ours and the peers, writes what came out."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks import guard, incremental, memory, serve
from benchmarks.cases import bound_cases
from benchmarks.extras import extra_cases
from benchmarks.live import live_cases
from benchmarks.measure import Case, Result, forget, remove, run_case
from benchmarks.place import Place, make_images
from benchmarks.report import Report, file_system, machine, spread, verdict, write_into

PAGE = Path("docs/benchmarking.md")
FIGURES = Path("docs/benchmarks")
# What has no bound waits for what has: on a machine that is so slow that this time is
# over, it is left out. All of it takes some 20 minutes on a quiet one with 2 cores, the guard
# and what is served among them some 5: so the whole ends within 25.
_EXTRAS_UNTIL_S = 1200.0
# On one core, and without a bound: a median of three.
_FEWER_PAIRS = 3
_MIB = 1 << 20


def main() -> int:
    options = _options()
    with (
        tempfile.TemporaryDirectory(prefix="vmapipe-bench-", dir=options.folder) as disk,
        tempfile.TemporaryDirectory(prefix="vmapipe-bench-", dir="/dev/shm") as shm,
    ):
        place = Place(Path(disk), Path(shm), options.size, options.reference)
        _check_room(place)
        report = Report(_facts(place, options.pairs))
        print(report.facts, flush=True)
        _Run(place, options.pairs, options.only, report).all()
    text = report.markdown()
    if options.write:
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / "bounds.json").write_text(json.dumps(report.json(), indent=1) + "\n")
        (FIGURES / "bounds.svg").write_text(report.svg())
        write_into(PAGE, text)
        print(f"written: {PAGE}, {FIGURES}/bounds.json, {FIGURES}/bounds.svg")
    else:
        print(f"\n{text}")
    if options.json:
        options.json.write_text(json.dumps(report.json(), indent=1) + "\n")
    return 1 if report.failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, metavar="MIB", help="default: 4096")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each command (default: 5)")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name has the word")
    parser.add_argument("--folder", type=Path, help="where images and archives go (default: temp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    parser.add_argument(
        "--reference",
        metavar="PROGRAM",
        default=os.environ.get("VMA_REFERENCE"),
        help="the C tool, if you have it (default: $VMA_REFERENCE)",
    )
    return parser.parse_args()


class _Run:
    def __init__(self, place: Place, pairs: int, only: str, report: Report) -> None:
        self._place = place
        self._pairs = pairs
        self._only = only
        self._report = report
        self._started = time.monotonic()

    def all(self) -> None:
        make_images(self._place)
        print(f"images made after {self._seconds():.0f} s", flush=True)
        for case in [*bound_cases(self._place), *live_cases(self._place)]:
            if self._only in case.name:
                self._case(case, self._pairs)
        if self._only in incremental.CASE.name:
            self._live_incremental()
        if self._only in "memory":
            try:
                self._report.memory = memory.measure(self._place)
            except (SystemExit, OSError, subprocess.SubprocessError) as error:
                self._failed("memory", error)
        for case in extra_cases(self._place):
            if self._only not in case.name:
                continue
            if self._seconds() > _EXTRAS_UNTIL_S:
                self._report.left_out.append(case.name)
                continue
            self._case(case, min(self._pairs, _FEWER_PAIRS))
        self._guard()

    def _case(self, case: Case, pairs: int) -> None:
        """A case that fails is told, and does not end the run."""
        try:
            if case.before is not None:
                case.before()
            for path in case.warm:
                forget(path)
            result = run_case(case, pairs)
            self._report.results.append(result)
            _say(result, "")
            if case.pinned and len(os.sched_getaffinity(0)) > 1:
                alone = run_case(case, min(pairs, _FEWER_PAIRS), pinned=True)
                self._report.pinned[case.name] = alone
                _say(alone, ", on one core")
        except (SystemExit, OSError, subprocess.SubprocessError) as error:
            self._failed(case.name, error)
        finally:
            for path in case.leaves:
                remove(path)
        print(f"  ({self._seconds():.0f} s)", flush=True)

    def _live_incremental(self) -> None:
        place = self._place
        try:
            result = incremental.run_live(place.disk, place.small_mib, self._pairs)
            self._report.results.append(result)
            _say(result, "")
        except (SystemExit, OSError, subprocess.SubprocessError) as error:
            self._failed(incremental.CASE.name, error)

    def _guard(self) -> None:
        if self._seconds() > _EXTRAS_UNTIL_S:
            self._report.left_out.append("what a guest feels")
            return
        place = self._place
        for name, results in (
            ("what a guest feels", guard.run_guard),
            ("what is served", serve.run_serve),
        ):
            try:
                for felt in results(place.disk, place.size_mib, _FEWER_PAIRS, self._only):
                    guard.report(felt)
                    self._report.guard.append(felt)
            except (SystemExit, OSError, subprocess.SubprocessError) as error:
                self._failed(name, error)

    def _failed(self, name: str, error: BaseException) -> None:
        lines = str(error).strip().splitlines() or [traceback.format_exc()]
        self._report.failures[name] = " ".join(lines[:2] + lines[-1:])
        print(f"{name}: FAILED: {error}", flush=True)

    def _seconds(self) -> float:
        return time.monotonic() - self._started


def _say(result: Result, where: str) -> None:
    print(f"{result.case.name}{where}")
    for name, timing in result.timings.items():
        print(f"  {name:<34} {timing.median_s:7.2f} s  (cpu {timing.median_cpu_s:5.2f} s)")
    for bound in result.case.bounds:
        if figures := result.figures(bound):
            words = f"{bound.words}: {spread(figures)}"
            print(f"  {words}: {verdict(figures, bound.limit_on(result.cores))}", flush=True)


def _facts(place: Place, pairs: int) -> str:
    today = datetime.datetime.now(datetime.UTC).date()
    load = os.getloadavg()[0]
    return (
        f"{machine()}; load average {load:.1f} at the beginning; {today}. Images of "
        f"{place.size_mib} MiB on {file_system(place.disk)}, all in the page cache; {pairs} pairs, "
        f"{min(pairs, _FEWER_PAIRS)} on one core."
    )


def _check_room(place: Place) -> None:
    for folder, images in ((place.disk, 6), (place.memory, 1)):
        wanted = images * place.size_mib * _MIB
        if shutil.disk_usage(folder).free < wanted:
            raise SystemExit(
                f"{folder}: less than {wanted >> 30} GiB are free; try --size or --folder"
            )


if __name__ == "__main__":
    sys.exit(main())
