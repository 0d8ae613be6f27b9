# SPDX-License-Identifier: Apache-2.0
"""What `vmapipe fleet check` says to Nagios: the report's problems, and hosts that do not answer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from vmapipe.fleet.report.facts import FleetReport, ProblemKind, Severity
from vmapipe.runtime.text import one_line

State = Literal["ok", "warning", "critical", "unknown"]
EXIT_CODES: Mapping[State, int] = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}
# A plugin's first line is shown in tables and sent in messages.
_LINE_CHARS = 900
_DOWN = "host-down"
_WHATS = (*get_args(ProblemKind), _DOWN)


class Trouble(NamedTuple):
    """What is wrong with a machine or a host. `what`: a problem's kind, or host-down."""

    state: Severity
    what: str
    name: str
    text: str


class Checked(NamedTuple):
    """The verdict, all troubles (the worst first), and figures."""

    state: State
    troubles: list[Trouble]
    machines: int
    oldest_s: float


def judge(report: FleetReport, down: Mapping[str, str]) -> Checked:
    """Return the verdict of a report. `down`: hosts that do not answer, and why."""
    troubles = [Trouble("warning", _DOWN, host, why) for host, why in sorted(down.items())]
    rows = [row for row in report.machines if not row.skip]
    troubles += [
        Trouble(problem.severity, problem.kind, row.machine, problem.text)
        for row in rows
        for problem in row.problems
        if problem.severity != "ok"
    ]
    troubles.sort(key=lambda t: (-EXIT_CODES[t.state], t.what, t.name))
    state: State = troubles[0].state if troubles else "ok"
    oldest_s = max((row.age_s for row in rows), default=0.0)
    return Checked(state if report.machines else "unknown", troubles, len(rows), oldest_s)


def plugin_lines(checked: Checked) -> list[str]:
    """Return a plugin's output: one line with figures behind a bar, and a line a trouble."""
    if checked.state == "unknown":
        return ["FLEET UNKNOWN - no machine is known: vmapipe fleet scan"]
    counts = {what: sum(t.what == what for t in checked.troubles) for what in _WHATS}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    first = f": {checked.troubles[0].name} {checked.troubles[0].text}" if checked.troubles else ""
    words = f"{checked.machines} machines" + (f", {told}{first}" if told else ", all as promised")
    figures = " ".join(
        [
            f"machines={checked.machines};;;0",
            *(f"{what.replace('-', '_')}={count};;;0" for what, count in counts.items()),
            f"oldest={checked.oldest_s:.0f}s;;;0",
        ]
    )
    # A bar in a text would begin the figures.
    head = one_line(f"FLEET {checked.state.upper()} - {words}".replace("|", "/"), _LINE_CHARS)
    return [
        f"{head} | {figures}",
        *(
            one_line(f"{t.state}: {t.name}: {t.text}".replace("|", "/"), _LINE_CHARS)
            for t in checked.troubles
        ),
    ]
