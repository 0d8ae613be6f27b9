# SPDX-License-Identifier: Apache-2.0
"""What was measured, as a Markdown table, as JSON and as a picture."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import guard
from benchmarks.chart import Bar, chart
from benchmarks.measure import OURS, Bound, Result
from benchmarks.memory import Memory

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
_COLUMNS = "| work | vmapipe | peer | ratio | bound | | on one core |\n"
_RULE = "| --- | --- | --- | --- | --- | --- | --- |\n"


class Report:
    """Everything that one run gave. `pinned`: the same cases on one core, by name."""

    def __init__(self, facts: str) -> None:
        self.facts = facts
        self.results: list[Result] = []
        self.pinned: dict[str, Result] = {}
        self.memory: list[Memory] = []
        #: What a guest feels, load by load.
        self.guard: list[guard.Result] = []
        self.failures: dict[str, str] = {}
        self.left_out: list[str] = []

    def markdown(self) -> str:
        bounded = [result for result in self.results if result.case.bounds]
        others = [result for result in self.results if not result.case.bounds]
        text = f"{self.facts}\n\n{_COLUMNS}{_RULE}"
        text += "".join(self._bound_row(r, bound) for r in bounded for bound in r.case.bounds)
        text += "".join(map(_memory_row, self.memory))
        if self.failures or self.left_out:
            text += "\n"
            text += "".join(f"- **{name}: failed.** {why}\n" for name, why in self.failures.items())
            text += "".join(
                f"- {name}: left out, for there was no time.\n" for name in self.left_out
            )
        text += "\nAll commands; seconds are medians, CPU seconds of all processes together:\n"
        for result in [*bounded, *others]:
            text += f"\n{_heading(result)}\n\n{_command_rows(result)}"
            if result.case.name in self.pinned:
                text += f"\n... on one core:\n\n{_command_rows(self.pinned[result.case.name])}"
        if self.guard:
            text += (
                "\nWhat a guest and who reads a served archive feel:\n\n```"
                + "".join(map(guard.text, self.guard))
                + "```\n"
            )
        return text

    def _bound_row(self, result: Result, bound: Bound) -> str:
        name = result.case.name + (": CPU seconds" if bound.cpu else "")
        ours, peer = (
            f"{statistics.median(result.timings[which].of(cpu=bound.cpu)) / bound.gib:.2f} s"
            if which in result.timings
            else ""
            for which in (bound.command, bound.peer)
        )
        figures = result.figures(bound)
        if not figures:
            return f"| {name} | {ours} | not installed | | {bound.words} | | |\n"
        pinned = self.pinned.get(result.case.name)
        alone = pinned.figures(bound) if pinned else []
        one_core = f"{spread(alone)}, {verdict(alone, bound.limit_on(1))}" if alone else ""
        return (
            f"| {name} | {ours} | {peer} | {spread(figures)} | {bound.words} | "
            f"{verdict(figures, bound.limit_on(result.cores))} | {one_core} |\n"
        )

    def json(self) -> dict[str, object]:
        return {
            "facts": self.facts,
            "cases": [_result_json(result) for result in self.results],
            "on_one_core": [_result_json(result) for result in self.pinned.values()],
            "memory_mib": {memory.name: round(memory.peak_mib, 1) for memory in self.memory},
            "guard": {
                r.title: {n: [f._asdict() for f in x] for n, x in r.felt.items()}
                for r in self.guard
            },
            "failures": self.failures,
            "left_out": self.left_out,
        }

    def svg(self) -> str:
        bars = []
        for result in [*self.results, *self.pinned.values()]:
            where = ", on one core" if result.cores == 1 else ""
            for bound in result.case.bounds:
                if figures := result.figures(bound):
                    middle, limit = statistics.median(figures), bound.limit_on(result.cores)
                    text = f"{middle:.2f} ({bound.words})"
                    of = ": CPU seconds" if bound.cpu else ""
                    bars.append(Bar(f"{result.case.name}{of}{where}", middle / limit, text))
        for memory in self.memory:
            if memory.limit_mib:
                text = f"{memory.peak_mib:.0f} MiB (bound {memory.limit_mib:.0f})"
                bars.append(Bar(f"memory: {memory.name}", memory.peak_mib / memory.limit_mib, text))
        return chart("vmapipe against its bounds", bars)


def _memory_row(memory: Memory) -> str:
    limit = memory.limit_mib
    bound = f"at most {limit:.0f} MiB" if limit else ""
    word = "" if not limit else "met" if memory.peak_mib <= limit else "**not met**"
    return f"| peak memory: {memory.name} | {memory.peak_mib:.0f} MiB | | | {bound} | {word} | |\n"


def _heading(result: Result) -> str:
    words = "; ".join(bound.words for bound in result.case.bounds)
    return f"**{result.case.name}**" + (f" ({words})" if words else "")


def _command_rows(result: Result) -> str:
    text = "| command | seconds | CPU | vmapipe takes |\n| --- | --- | --- | --- |\n"
    for name, timing in result.timings.items():
        ratio = ""
        if OURS in result.timings and name != OURS:
            ratio = f"{spread(result.ratios(OURS, name))} of its time"
        text += f"| {name} | {timing.median_s:.2f} | {timing.median_cpu_s:.2f} | {ratio} |\n"
    return text


def _result_json(result: Result) -> dict[str, object]:
    return {
        "name": result.case.name,
        "cores": result.cores,
        "bounds": [
            {
                "words": bound.words,
                "peer": bound.peer,
                "of": "CPU seconds" if bound.cpu else "seconds",
                "limit": bound.limit_on(result.cores),
                "figure": round(statistics.median(figures), 3),
                "met": statistics.median(figures) <= bound.limit_on(result.cores),
            }
            for bound in result.case.bounds
            if (figures := result.figures(bound))
        ],
        "commands": {
            name: {
                "seconds": [round(s, 3) for s in timing.seconds],
                "cpu_s": [round(s, 3) for s in timing.cpu_s],
            }
            for name, timing in result.timings.items()
        },
    }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def verdict(ratios: Sequence[float], limit: float) -> str:
    return "met" if statistics.median(ratios) <= limit else "**not met**"


def write_into(page: Path, text: str) -> None:
    """Put `text` in place of what stands between the page's two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} has no {BEGIN} ... {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def machine() -> str:
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if "model name" in line), "?")
    with open("/proc/meminfo") as info:
        memory_gib = int(info.readline().split()[1]) / (1 << 20)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores ({model}), {memory_gib:.0f} GiB of memory, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def file_system(path: Path) -> str:
    """The kind of the file system that `path` lies on."""
    best = ("", "?")
    with open("/proc/mounts") as mounts:
        for line in mounts:
            _, point, kind, *_ = line.split()
            if len(point) > len(best[0]) and path.resolve().is_relative_to(point):
                best = (point, kind)
    return best[1]
