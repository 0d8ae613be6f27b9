# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: makes images, runs ours and the peers, writes what came out."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from benchmarks import guard, incremental, memory, serve
from benchmarks.cases import bound_cases
from benchmarks.extras import extra_cases
from benchmarks.live import live_cases
from benchmarks.measure import FEWEST_PAIRS, Case, Result, forget, remove, run_case
from benchmarks.place import Place, make_images
from benchmarks.report import Report, file_system, machine, spread, verdict, write_into

PAGE = Path("docs/benchmarking.md")
FIGURES = Path("docs/benchmarks")
# All of it takes some 28 minutes on a quiet machine with 2 cores. What has no bound comes last; on a
# slower one nothing more is begun after this time, and the table says what is left out. So the
# whole ends within 32 minutes.
_BEGIN_UNTIL_S = 1800.0
# What a case may fail with: it is told, and the others go on.
_FAULTS = (Exception, SystemExit)
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
        signal.signal(signal.SIGTERM, _stop)
        try:
            _Run(place, options.pairs, options.only, report).all()
        except KeyboardInterrupt:
            report.left_out.append("what was to come when it was stopped")
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


def _stop(signum: int, frame: FrameType | None) -> None:
    """What has been measured so far is kept."""
    raise KeyboardInterrupt


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
            self._case(case, self._pairs)
        self._live_incremental()
        self._memory()
        self._guard()
        for case in extra_cases(self._place):
            self._case(case, min(self._pairs, FEWEST_PAIRS))

    def _is_wanted(self, name: str) -> bool:
        """Return whether it is to be measured; what there is no time for is noted."""
        if self._only not in name:
            return False
        if self._seconds() > _BEGIN_UNTIL_S:
            self._report.left_out.append(name)
            return False
        return True

    def _case(self, case: Case, pairs: int) -> None:
        """A case that fails is told, and does not end the run."""
        if not self._is_wanted(case.name):
            return
        try:
            if case.before is not None:
                case.before()
            for path in case.warm:
                forget(path)
            result = run_case(case, pairs)
            self._report.results.append(result)
            _say(result, "")
            if case.pinned and len(os.sched_getaffinity(0)) > 1:
                alone = run_case(case, min(pairs, FEWEST_PAIRS), pinned=True)
                self._report.pinned[case.name] = alone
                _say(alone, ", on one core")
        except _FAULTS as error:
            self._failed(case.name, error)
        finally:
            for path in case.leaves:
                remove(path)
        print(f"  ({self._seconds():.0f} s)", flush=True)

    def _live_incremental(self) -> None:
        place = self._place
        if not self._is_wanted(incremental.CASE.name):
            return
        try:
            result = incremental.run_live(place.disk, place.small_mib, self._pairs)
            self._report.results.append(result)
            _say(result, "")
        except _FAULTS as error:
            self._failed(incremental.CASE.name, error)

    def _memory(self) -> None:
        if self._is_wanted("memory"):
            try:
                self._report.memory = memory.measure(self._place)
            except _FAULTS as error:
                self._failed("memory", error)

    def _guard(self) -> None:
        """What `--only` names is the load; no load is begun when the time is over."""
        place, only = self._place, self._only
        for name, results in (
            ("what a guest feels", guard.run_guard),
            ("what is served", serve.run_serve),
        ):
            try:
                felt = results(place.disk, place.size_mib, FEWEST_PAIRS, only)
                self._take_felt(name, felt)
            except _FAULTS as error:
                self._failed(name, error)

    def _take_felt(self, name: str, results: Iterator[guard.Result]) -> None:
        for felt in results:
            guard.report(felt)
            self._report.guard.append(felt)
            if self._seconds() > _BEGIN_UNTIL_S:
                self._report.left_out.append(f"{name}, from here on")
                return

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
        f"{min(pairs, FEWEST_PAIRS)} on one core and of what takes long."
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
