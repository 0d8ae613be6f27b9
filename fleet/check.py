# SPDX-License-Identifier: Apache-2.0
"""The promise of each machine against what was done: what `vmapipe fleet check` says to Nagios. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vmapipe.fleet.catalogue import AHEAD_S, DrillRecord, Standing, Verb, VerificationRecord
from vmapipe.fleet.inventory import Fleet, FleetMachine
from vmapipe.runtime.text import human_age, one_line

#: An archive is late so many intervals after the last one, and a machine untested after so many.
LATE, UNTESTED = 1.5, 2.0

State = Literal["ok", "warning", "critical", "unknown"]
EXIT_CODES: Mapping[State, int] = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}
# A plugin's first line is shown in tables and sent in messages.
_LINE_CHARS = 900


class Trouble(NamedTuple):
    """What is wrong with a machine or a host."""

    state: State
    what: str  # late, failed, untested, damaged, not-booted, host-down, no-target
    name: str
    text: str


class Checked(NamedTuple):
    """The verdict, all troubles (the worst first), and figures."""

    state: State
    troubles: list[Trouble]
    machines: int
    oldest_s: float


def judge(
    fleet: Fleet,
    machines: Sequence[FleetMachine],
    standings: Mapping[tuple[str, Verb, str], Standing],
    tests: tuple[Sequence[VerificationRecord], Sequence[DrillRecord]],
    down: Mapping[str, str],
    now_s: float,
) -> Checked:
    """Hold each machine against its promise. `tests`: verifications and drills, of which the last counts."""
    troubles = [Trouble("warning", "host-down", h, why) for h, why in sorted(down.items())]
    until_s = now_s + AHEAD_S
    looks = (v for v in tests[0] if v.checked_s <= until_s)
    verified = {v.machine: v for v in sorted(looks, key=lambda v: v.checked_s)}
    boots = (d for d in tests[1] if d.tested_s <= until_s)
    drilled = {d.machine: d for d in sorted(boots, key=lambda d: d.tested_s)}
    oldest_s, counted = 0.0, 0
    for machine in machines:
        policy = fleet.policy(machine)
        if policy.skip:
            continue
        counted += 1
        name = machine.name
        if policy.target not in fleet.targets:
            troubles.append(Trouble("critical", "no-target", name, "it has no target"))
            continue
        last = standings.get((name, "backup", policy.target)) or Standing(
            name, "backup", policy.target
        )
        done_s = last.done_s if last.done_s <= until_s else 0.0
        age_s = max(0.0, now_s - (done_s or machine.first_seen_s or now_s))
        oldest_s = max(oldest_s, age_s)
        why = f"; it failed {last.failures} times: {last.text}" if last.failures else ""
        if age_s > LATE * policy.every_s:
            what = (
                f"stored {human_age(age_s)} ago"
                if done_s
                else f"never stored, known for {human_age(age_s)}"
            )
            promise = f"{what}, promised every {human_age(policy.every_s)}"
            troubles.append(Trouble("critical", "late", name, promise + why))
        elif last.failures:
            troubles.append(Trouble("warning", "failed", name, why[2:]))
        troubles += _tests(machine, policy.drill_every_s, drilled.get(name), now_s)
        seen = verified.get(name)
        if seen is not None and seen.verdict == "damaged":
            troubles.append(Trouble("critical", "damaged", name, f"{seen.archive}: {seen.text}"))
    troubles.sort(key=lambda t: (-EXIT_CODES[t.state], t.what, t.name))
    state: State = troubles[0].state if troubles else "ok"
    if not machines:
        state = "unknown"
    return Checked(state, troubles, counted, oldest_s)


def _tests(
    machine: FleetMachine, every_s: float, last: DrillRecord | None, now_s: float
) -> list[Trouble]:
    if not every_s:
        return []
    if last is not None and last.verdict == "not-booted":
        text = f"{last.archive} did not boot: {last.text}"
        return [Trouble("critical", "not-booted", machine.name, text)]
    since_s = last.tested_s if last and last.verdict == "booted" else machine.first_seen_s or now_s
    age_s = now_s - since_s
    if age_s <= UNTESTED * every_s:
        return []
    what = f"tested {human_age(age_s)} ago" if last else "never tested"
    return [
        Trouble("warning", "untested", machine.name, f"{what}, promised every {human_age(every_s)}")
    ]


def plugin_lines(checked: Checked) -> list[str]:
    """Return a plugin's output: one line with figures behind a bar, and a line a trouble."""
    if checked.state == "unknown":
        return ["FLEET UNKNOWN - no machine is known: vmapipe fleet scan"]
    counts = {
        what: sum(t.what == what for t in checked.troubles)
        for what in ("late", "failed", "untested", "damaged", "not-booted", "host-down")
    }
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
