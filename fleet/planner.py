# SPDX-License-Identifier: Apache-2.0
"""The plan of a fleet: which jobs may start now, and of all others why not. Pure.

Nothing is remembered between two plans. What was done (the catalogue's standings) and what runs decide
alone, so a queue that is lost costs nothing: what is missing is due again.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from vmapipe.fleet.inventory import Fleet, FleetMachine, FleetTarget, Policy
from vmapipe.fleet.records import AHEAD_S, RunRecord, Standing, Verb
from vmapipe.fleet.windows import Window, latest_slot, opening

Why = Literal[
    "not-due",
    "running",
    "window",
    "back-off",
    "host-down",
    "skipped",
    "no-place",
    "no-archive",
    "limit-host",
    "limit-drills",
    "limit-storage",
    "limit-target",
    "limit-total",
    "not-together",
    "priority",
]

# The first retry of a failed task, doubled each time, up to half of its interval.
_RETRY_S, _RETRY_MOST = 600.0, 0.5
# So many priorities is one whole interval of delay worth: whoever waits overtakes in the end.
_LATE_WEIGHT = 10.0
# Backups first, and what the same limits hold back last.
_VERB_RANK: Mapping[Verb, float] = {
    "backup": 0.0,
    "copy": -20.0,
    "prune": -20.0,
    "verify": -40.0,
    "drill": -60.0,
}
_NEVER = Standing("", "backup", "")


class FleetTask(NamedTuple):
    """A job that a machine may need. `host`: where it runs; `archive`: the one it is about, if any."""

    machine: str
    verb: Verb
    target: str
    host: str
    storages: tuple[str, ...] = ()
    archive: str = ""
    not_together: str = ""


class Waiting(NamedTuple):
    """A task that does not start now; `until_s`: when that changes by itself, 0: not known."""

    task: FleetTask
    why: Why
    text: str
    until_s: float = 0.0


class FleetPlan(NamedTuple):
    """`starts` in the order in which they should start; `waits` with a reason for each other task."""

    starts: list[FleetTask]
    waits: list[Waiting]


class _Candidate(NamedTuple):
    rank: float
    late: float
    task: FleetTask


class _Slots:
    """What is in use of each limit, by those that run and by those that start now."""

    def __init__(self, fleet: Fleet, running: Sequence[RunRecord], together: Mapping[str, str]):
        self._fleet = fleet
        self.used = Counter[tuple[str, str]]()
        #: Of these, what was taken in this plan.
        self.taken = Counter[tuple[str, str]]()
        for run in running:
            task = FleetTask(
                run.machine,
                run.verb,
                run.target,
                run.host,
                tuple(filter(None, run.storages.split(","))),
                not_together=together.get(run.machine, "") if run.verb == "backup" else "",
            )
            self.used.update(self.keys(task))

    def keys(self, task: FleetTask) -> list[tuple[str, str]]:
        keys = [("total", ""), ("host", task.host), ("target", task.target)]
        if task.verb == "drill":
            keys.append(("drills", task.host))
        keys += [("storage", name) for name in task.storages]
        if task.not_together:
            keys.append(("together", task.not_together))
        return keys

    def limit(self, key: tuple[str, str]) -> float:
        kind, name = key
        fleet = self._fleet
        if kind == "total":
            return fleet.total
        if kind == "together":
            return 1
        if kind == "storage":
            return fleet.storages[name].jobs if name in fleet.storages else math.inf
        if kind == "target":
            return fleet.targets[name].jobs if name in fleet.targets else math.inf
        host = fleet.hosts.get(name)
        if host is None:
            return math.inf
        return host.jobs if kind == "host" else host.drills

    def obstacle(self, task: FleetTask) -> tuple[str, str] | None:
        """Return the first limit that has no place left for a task."""
        for key in self.keys(task):
            if self.used[key] >= self.limit(key):
                return key
        return None

    def take(self, task: FleetTask) -> None:
        keys = self.keys(task)
        self.used.update(keys)
        self.taken.update(keys)


def plan(
    fleet: Fleet,
    machines: Sequence[FleetMachine],
    standings: Mapping[tuple[str, Verb, str], Standing],
    running: Sequence[RunRecord],
    down: Mapping[str, str],
    now_s: float,
) -> FleetPlan:
    """Return what may start now. `running`: runs that have not ended; `down`: hosts, and why."""
    policies = [fleet.policy(machine) for machine in machines]
    together = {m.name: p.not_together for m, p in zip(machines, policies, strict=True)}
    busy = {(run.machine, _lane(run.verb)): run for run in running}
    candidates = list[_Candidate]()
    waits = list[Waiting]()
    for machine, policy in zip(machines, policies, strict=True):
        for item in _tasks(fleet, machine, policy, standings, now_s):
            if isinstance(item, Waiting):
                waits.append(item)
                continue
            task = item.task
            other = busy.get((task.machine, _lane(task.verb)))
            if other is not None:
                text = f"{other.verb} of it runs on {other.host} ({other.run})"
                waits.append(Waiting(task, "running", text))
            elif task.host in down:
                text = f"host {task.host}: {down[task.host]}"
                waits.append(Waiting(task, "host-down", text))
            else:
                candidates.append(item)
    candidates.sort(key=lambda c: (-c.rank, c.task))
    starts, more = _choose(_Slots(fleet, running, together), candidates)
    return FleetPlan(starts, waits + more)


def _lane(verb: Verb) -> str:
    """What reads and removes archives of one machine takes turns; its backup goes on beside that."""
    return "backup" if verb == "backup" else "archives"


def _choose(
    slots: _Slots, candidates: Sequence[_Candidate]
) -> tuple[list[FleetTask], list[Waiting]]:
    """Take what fits, the most urgent first.

    The first that is a whole interval late and does not fit has its places kept free: otherwise what
    needs two storages would wait for ever behind those that need one.
    """
    starts, waits = list[FleetTask](), list[Waiting]()
    lanes = set[tuple[str, str]]()
    kept_for: FleetTask | None = None
    kept = frozenset[tuple[str, str]]()
    for candidate in candidates:
        task = candidate.task
        lane = (task.machine, _lane(task.verb))
        key = slots.obstacle(task)
        if key is not None:
            waits.append(_limited(slots, task, key))
            if kept_for is None and candidate.late >= 1:
                kept_for, kept = task, frozenset(slots.keys(task))
        elif lane in lanes:
            waits.append(Waiting(task, "running", "another job of this machine goes first"))
        elif kept_for is not None and _disturbs(slots, task, kept):
            text = f"a place is kept free for {kept_for.verb} of {kept_for.machine}, which is late"
            waits.append(Waiting(task, "priority", text))
        else:
            slots.take(task)
            lanes.add(lane)
            starts.append(task)
    return starts, waits


def _disturbs(slots: _Slots, task: FleetTask, kept: frozenset[tuple[str, str]]) -> bool:
    """Tell whether a task would take the last place of a limit that somebody waits for."""
    return any(key in kept and slots.used[key] + 1 >= slots.limit(key) for key in slots.keys(task))


def _limited(slots: _Slots, task: FleetTask, key: tuple[str, str]) -> Waiting:
    kind, name = key
    limit = slots.limit(key)
    words = {
        "total": f"{limit} jobs run in the whole fleet",
        "host": f"{limit} jobs run on host {name}",
        "drills": f"{limit} restore tests run on host {name}",
        "storage": f"{limit} jobs read from storage {name}",
        "target": f"{limit} jobs use target {name}",
        "together": f"another machine of {name} is being backed up",
    }
    if slots.used[key] - slots.taken[key] < limit and slots.taken[key]:
        return Waiting(task, "priority", f"{words[kind]}, which go before it")
    whys: Mapping[str, Why] = {
        "total": "limit-total",
        "host": "limit-host",
        "drills": "limit-drills",
        "storage": "limit-storage",
        "target": "limit-target",
        "together": "not-together",
    }
    return Waiting(task, whys[kind], words[kind])


def _tasks(
    fleet: Fleet,
    machine: FleetMachine,
    policy: Policy,
    standings: Mapping[tuple[str, Verb, str], Standing],
    now_s: float,
) -> Iterator[_Candidate | Waiting]:
    """Yield all tasks of a machine: those that are due, and the others with why they are not."""
    name = machine.name
    backup = FleetTask(
        name,
        "backup",
        policy.target,
        machine.host,
        machine.storages,
        not_together=policy.not_together,
    )
    if policy.skip:
        yield Waiting(backup, "skipped", policy.skip)
        return
    target = fleet.targets.get(policy.target)
    if target is None:
        yield Waiting(
            backup, "no-place", f"it has no target (target = …): {policy.target or 'none'}"
        )
        return
    stored = _believed(standings.get((name, "backup", target.name)), now_s)
    at = (machine.first_seen_s or now_s, now_s)
    yield _periodic(backup, policy, policy.every_s, policy.window, standings, at)
    there = target.host or machine.host
    tests: Sequence[tuple[Verb, float]] = (
        ("verify", policy.verify_every_s),
        ("drill", policy.drill_every_s),
    )
    for verb, every_s in tests:
        if every_s:
            task = FleetTask(name, verb, target.name, there, (), stored.archive)
            yield _unreachable(task, target) or _periodic(
                task, policy, every_s, policy.work_window, standings, at
            )
    for place in fleet.copies_of(target.name):
        task = FleetTask(name, "copy", place.name, there, (), stored.archive)
        yield _following(task, target, policy, standings, at)
    for place in (target, *fleet.copies_of(target.name)):
        if place.keep or policy.keep:
            newest = stored
            if place is not target:
                newest = _believed(standings.get((name, "copy", place.name)), now_s)
            # A copy is where its source's host has put it.
            on = place.host or (machine.host if place is target else there)
            task = FleetTask(name, "prune", place.name, on, (), newest.archive)
            yield _following(task, place, policy, standings, at)


def _believed(standing: Standing | None, now_s: float) -> Standing:
    """What is said to be done in the future was told by a wrong clock, and is not done."""
    if standing is None or standing.done_s > now_s + AHEAD_S:
        return _NEVER
    return standing


def _late(last: Standing, every_s: float, since_s: float, now_s: float) -> float:
    """Return how many of its intervals a task is late; one that was never done, since it could be."""
    if last.done_s:
        return (now_s - last.done_s) / every_s - 1
    return max(0.0, now_s - since_s) / every_s


def _periodic(
    task: FleetTask,
    policy: Policy,
    every_s: float,
    windows: tuple[Window, ...],
    standings: Mapping[tuple[str, Verb, str], Standing],
    at: tuple[float, float],
) -> _Candidate | Waiting:
    """A backup, or a look at the newest archive, every so often. `at`: since when it could be, and now."""
    since_s, now_s = at
    last = _believed(standings.get((task.machine, task.verb, task.target)), now_s)
    is_backup = task.verb == "backup"
    # A machine is not backed up and tested at the same time of the day.
    about = task.machine if is_backup else f"{task.verb} {task.machine}"
    slot = latest_slot(about, every_s, windows, policy.time_zone, now_s)
    if last.done_s >= slot:
        return Waiting(task, "not-due", "it was done when it was due", slot + every_s)
    late = _late(last, every_s, since_s, now_s)
    if is_backup and not last.done_s:
        late += 1  # nothing at all is worse than something old
    return _due(task, policy, last, late, every_s, (windows, now_s))


def _following(
    task: FleetTask,
    place: FleetTarget,
    policy: Policy,
    standings: Mapping[tuple[str, Verb, str], Standing],
    at: tuple[float, float],
) -> _Candidate | Waiting:
    """What follows each new archive: its copy, and the end of old ones."""
    since_s, now_s = at
    if obstacle := _unreachable(task, place):
        return obstacle
    last = standings.get((task.machine, task.verb, task.target), _NEVER)
    if last.archive == task.archive:
        return Waiting(task, "not-due", "nothing new was stored since")
    late = _late(last, policy.every_s, since_s, now_s)
    return _due(task, policy, last, late, policy.every_s, (policy.work_window, now_s))


def _unreachable(task: FleetTask, place: FleetTarget) -> Waiting | None:
    if not task.archive:
        return Waiting(task, "no-archive", "nothing of it is stored yet")
    if place.archiver and not place.s3 and not (place.host and place.directory):
        text = f"target {place.name} does not say where its archives are: host = …, directory = …"
        return Waiting(task, "no-place", text)
    return None


def _due(
    task: FleetTask,
    policy: Policy,
    last: Standing,
    late: float,
    every_s: float,
    at: tuple[tuple[Window, ...], float],
) -> _Candidate | Waiting:
    windows, now_s = at
    if last.failures:
        again_s = last.failed_s + back_off_s(last.failures, every_s)
        # A failure of the future was told by a wrong clock.
        if now_s < again_s and last.failed_s <= now_s + AHEAD_S:
            times = f"{last.failures} times, the last one" if last.failures > 1 else "once"
            text = f"it failed {times}: {last.text}"
            return Waiting(task, "back-off", text, again_s)
    state = opening(windows, policy.time_zone, now_s)
    if not state.is_open:
        return Waiting(task, "window", "its window is not open", state.until_s)
    rank = policy.priority + _VERB_RANK[task.verb] + _LATE_WEIGHT * max(0.0, late)
    return _Candidate(rank, late, task)


@functools.lru_cache(maxsize=1024)
def back_off_s(failures: int, every_s: float) -> float:
    """Return how long a task waits after so many failures in a row."""
    return float(min(_RETRY_S * 2 ** min(failures - 1, 20), max(60.0, _RETRY_MOST * every_s)))
