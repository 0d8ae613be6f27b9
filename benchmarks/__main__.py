# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: make images, run all cases, print a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import guard
from benchmarks.cases import all_cases, image_paths, make_images
from benchmarks.measure import Case, Timing, ratios, run_case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, metavar="MIB", help="default: 4096")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each command (default: 5)")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name has the word")
    parser.add_argument("--folder", type=Path, help="where images and archives go (default: temp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmapipe-bench-", dir=options.folder) as name:
        folder = Path(name)
        print(f"{machine()}; images of {options.size} MiB in {folder}, page cache warm")
        figures: dict[str, object] = {}
        cases = all_cases(folder, image_paths(folder), options.size)
        if any(options.only in case.name for case in cases):
            make_images(folder, options.size)
            for case in cases:
                wanted = options.only in case.name
                # The archives of the later cases are made here.
                if wanted or " to a file" in case.name:
                    timings = run_case(case, options.pairs if wanted else 1, seed=1)
                    if wanted:
                        report(case, timings)
                        figures[case.name] = {n: t.seconds for n, t in timings.items()}
            for leftover in folder.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for result in guard.run_guard(folder, options.size, options.pairs, options.only):
            guard.report(result)
            figures[result.title] = {n: [f._asdict() for f in r] for n, r in result.felt.items()}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "cases": figures}, indent=1))
    return 0


def machine() -> str:
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if "model name" in line), "?")
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}"


def report(case: Case, timings: dict[str, Timing]) -> None:
    print(f"\n{case.name}" + (f"  ({case.goal})" if case.goal else ""))
    ours = timings[case.ours.name]
    for name, timing in timings.items():
        line = f"  {name:<24} {timing.median_s:7.2f} s  (cpu {timing.cpu_s:5.2f} s)"
        if timing is not ours:
            pairs = ratios(ours, timing)
            line += (
                f"   vmapipe takes {statistics.median(pairs):5.2f} x"
                f"  ({min(pairs):.2f} .. {max(pairs):.2f})"
            )
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
