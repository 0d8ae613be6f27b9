# SPDX-License-Identifier: Apache-2.0
"""What a report says: of each machine its days, its age against the promise, its tests, what is wrong and the way out. Pure.

The records of a catalogue go in; what comes out is the same for the page, for JSON and for Prometheus.
Times are seconds since 1970, sizes bytes.
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from vmapipe.fleet.records import (
    AHEAD_S,
    ArchiveRecord,
    DrillRecord,
    MachineRecord,
    RunRecord,
    VerificationRecord,
)
from vmapipe.fleet.windows import DAY_S
from vmapipe.runtime.text import human_age

#: What a day of a machine shows, from the best proof that its archives have; "": nothing happened.
Cell = Literal["", "stored", "verified", "booted", "failed", "damaged"]
Severity = Literal["ok", "warning", "critical"]
ProblemKind = Literal[
    "damaged",
    "never",
    "late",
    "not-booted",
    "no-target",
    "failed",
    "unproved",
    "untested",
    "unverified",
    "vanished",
    "new",
]
_CRITICAL: frozenset[ProblemKind] = frozenset(
    {"damaged", "never", "late", "not-booted", "no-target"}
)
#: An archive is late so many intervals after the last one; a machine untested, or its archives unverified, after so many.
LATE, UNTESTED = 1.5, 2.0
_RANK: Mapping[Severity, int] = {"critical": 0, "warning": 1, "ok": 2}


class Promise(NamedTuple):
    """What was promised for a machine; 0: nothing. `skip`: why it is not backed up, or empty."""

    every_s: float = DAY_S
    drill_every_s: float = 0.0
    verify_every_s: float = 0.0
    skip: str = ""
    has_target: bool = True


class ReportInput(NamedTuple):
    """Records of all machines; of `runs` the ended ones of the days that are shown are enough."""

    machines: Sequence[MachineRecord]
    archives: Iterable[ArchiveRecord]
    verifications: Iterable[VerificationRecord] = ()
    drills: Iterable[DrillRecord] = ()
    runs: Iterable[RunRecord] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in a sentence, and what to do about it."""

    kind: ProblemKind
    text: str
    way_out: str

    @property
    def severity(self) -> Severity:
        if self.kind == "new":
            return "ok"
        return "critical" if self.kind in _CRITICAL else "warning"


@dataclasses.dataclass(frozen=True, slots=True)
class MachineReport:
    """A machine's line. `sizes`: of each day the newest archive's size, 0: there is none."""

    machine: str
    host: str
    tags: str
    severity: Severity
    problems: list[Problem]
    skip: str
    archives: int
    stored_bytes: int
    newest: ArchiveRecord | None
    age_s: float
    promised_s: float
    transferred_bytes: int  # on the days that are shown
    shared_bytes: int
    verified: VerificationRecord | None
    drill: DrillRecord | None
    days: list[Cell]
    sizes: list[int]

    @property
    def is_late(self) -> bool:
        """Whether the promise is broken by now; for the page's template."""
        return bool(self.promised_s) and self.age_s > LATE * self.promised_s and not self.skip


@dataclasses.dataclass(frozen=True, slots=True)
class TargetReport:
    """A place of archives."""

    target: str
    machines: int
    archives: int
    stored_bytes: int
    shared_bytes: int
    newest_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class FleetReport:
    """The whole of it. `first_day`: of `days` cells, in ISO's form; `sizes`: what was stored on each day."""

    title: str
    made_s: float
    zone: str
    first_day: str
    days: int
    machines: list[MachineReport]
    targets: list[TargetReport]
    sizes: list[int]
    transferred: list[int]

    def count(self, severity: Severity) -> int:
        return sum(machine.severity == severity for machine in self.machines)

    @property
    def stored_bytes(self) -> int:
        return sum(target.stored_bytes for target in self.targets)

    @property
    def shared_bytes(self) -> int:
        return sum(target.shared_bytes for target in self.targets)

    @property
    def archives(self) -> int:
        return sum(target.archives for target in self.targets)


class _Days:
    """The days that are shown, by the clock on a wall in `zone`."""

    def __init__(self, now_s: float, zone: str, days: int) -> None:
        self._zone = ZoneInfo(zone)
        self.count = days
        today = datetime.datetime.fromtimestamp(now_s, self._zone).date()
        self.first = today - datetime.timedelta(days=days - 1)
        midnight = datetime.datetime.combine(self.first, datetime.time(), self._zone)
        self.from_s = midnight.timestamp()
        # Begins of the days; one more than there are. A day has 23 to 25 hours.
        self._begins = [
            datetime.datetime.combine(
                self.first + datetime.timedelta(days=n), datetime.time(), self._zone
            ).timestamp()
            for n in range(days + 1)
        ]

    def index(self, at_s: float) -> int:
        """Return the number of a time's day, or -1: it is not shown."""
        index = bisect.bisect_right(self._begins, at_s) - 1
        return index if index < self.count else -1


class _Machine:
    """All records of one machine, and, after `settle`, what is there of its archives.

    A report has hundreds of thousands of archives: each is looked at once here, and once for its day.
    """

    def __init__(self, record: MachineRecord) -> None:
        self.record = record
        self.archives: list[ArchiveRecord] = []
        self.verified: dict[tuple[str, str], VerificationRecord] = {}
        self.drilled: dict[tuple[str, str], DrillRecord] = {}
        self.runs: list[RunRecord] = []
        self.there: list[ArchiveRecord] = []
        # The last one by its time, and the last one whose time can be believed.
        self.last: ArchiveRecord | None = None
        self.last_dated: ArchiveRecord | None = None
        self.first_s = self.stored_s = 0.0

    def settle(self, until_s: float) -> None:
        """No machine is safe because a clock was wrong: a time after `until_s` is not believed."""
        last_s = dated_s = -math.inf
        first_s = math.inf
        for archive in self.archives:
            if archive.removed_s:
                continue
            self.there.append(archive)
            at_s = archive.instant_s or archive.stored_s
            if at_s > last_s:
                self.last, last_s = archive, at_s
            if dated_s < at_s <= until_s:
                self.last_dated, dated_s = archive, at_s
            first_s = min(first_s, at_s)
            self.stored_s = max(self.stored_s, archive.stored_s)
        self.first_s = first_s if self.there else 0.0

    def tested_there(
        self,
    ) -> tuple[list[tuple[ArchiveRecord, VerificationRecord]], list[DrillRecord]]:
        """Return the verifications and the restore tests of what is there."""
        if not (self.verified or self.drilled):
            return [], []
        keys = {(archive.target, archive.archive): archive for archive in self.there}
        verified = [(keys[key], seen) for key, seen in self.verified.items() if key in keys]
        return verified, [drill for key, drill in self.drilled.items() if key in keys]


def shown_from_s(now_s: float, zone: str, days: int) -> float:
    """Return when the first of the days that are shown begins."""
    return _Days(now_s, zone, days).from_s


def make_report(
    records: ReportInput,
    promises: Mapping[str, Promise],
    now_s: float,
    zone: str = "UTC",
    days: int = 31,
    title: str = "Backups",
) -> FleetReport:
    """`promises` of machines by their names; "" is for all that are not in it."""
    shown = _Days(now_s, zone, days)
    machines = _gather(records, now_s + AHEAD_S)
    default = promises.get("", Promise())
    sizes, transferred = [0] * days, [0] * days
    rows = []
    for name, machine in machines.items():
        machine.settle(now_s + AHEAD_S)
        on_days = _days_of(machine, shown)
        rows.append(_row(machine, promises.get(name, default), now_s, on_days))
        for index, size, moved in on_days.stored:
            sizes[index] += size
            transferred[index] += moved
    rows.sort(key=lambda row: (_RANK[row.severity], -_overdue(row), row.machine))
    return FleetReport(
        title,
        now_s,
        zone,
        shown.first.isoformat(),
        days,
        rows,
        _targets(machines.values(), now_s),
        sizes,
        transferred,
    )


def _gather(records: ReportInput, until_s: float) -> dict[str, _Machine]:
    """Return the machines with their records; a look or a test of a later time was told by a wrong clock."""
    machines = {record.machine: _Machine(record) for record in records.machines}

    def of(name: str) -> _Machine:
        if name not in machines:
            machines[name] = _Machine(MachineRecord(name, "", "", ""))
        return machines[name]

    for archive in records.archives:
        of(archive.machine).archives.append(archive)
    # The latest first: of each archive that one stays.
    for seen in sorted(records.verifications, key=lambda seen: seen.checked_s, reverse=True):
        verified = of(seen.machine).verified
        if seen.checked_s <= until_s:
            verified.setdefault((seen.target, seen.archive), seen)
    for drill in sorted(records.drills, key=lambda drill: drill.tested_s, reverse=True):
        drilled = of(drill.machine).drilled
        if drill.tested_s <= until_s:
            drilled.setdefault((drill.target, drill.archive), drill)
    for run in records.runs:
        of(run.machine).runs.append(run)
    return machines


def _row(machine: _Machine, promise: Promise, now_s: float, on_days: _OnDays) -> MachineReport:
    there = machine.there
    newest = machine.last_dated or machine.last
    verified = max(machine.verified.values(), key=lambda seen: seen.checked_s, default=None)
    drill = max(machine.drilled.values(), key=lambda drill: drill.tested_s, default=None)
    problems = [] if promise.skip else list(_problems(machine, promise, now_s))
    problems.sort(key=lambda problem: _RANK[problem.severity])
    severity: Severity = problems[0].severity if problems else "ok"
    return MachineReport(
        machine=machine.record.machine,
        host=machine.record.host or (newest.host if newest else ""),
        tags=machine.record.tags,
        severity=severity,
        problems=problems,
        skip=promise.skip,
        archives=len(there),
        stored_bytes=sum([archive.size_bytes for archive in there]),
        newest=newest,
        age_s=now_s - _instant(newest) if newest else 0.0,
        promised_s=promise.every_s,
        transferred_bytes=sum([moved for _, _, moved in on_days.stored]),
        shared_bytes=sum([archive.shared_bytes for archive in there]),
        verified=verified,
        drill=drill,
        days=on_days.cells,
        sizes=on_days.sizes,
    )


def _instant(archive: ArchiveRecord) -> float:
    return archive.instant_s or archive.stored_s


class _OnDays(NamedTuple):
    """A machine's days. `stored`: of each archive that was stored on one, its number, size, and what was transferred."""

    cells: list[Cell]
    sizes: list[int]
    stored: list[tuple[int, int, int]]


def _days_of(machine: _Machine, shown: _Days) -> _OnDays:
    cells: list[Cell] = [""] * shown.count
    sizes = [0] * shown.count
    stored = list[tuple[int, int, int]]()
    order: Mapping[Cell, int] = {"": 0, "failed": 1, "stored": 2, "verified": 3, "booted": 4}
    is_tested = bool(machine.verified or machine.drilled)
    for archive in machine.archives:
        index = shown.index(archive.stored_s)
        if index < 0:
            continue
        cell = _cell(machine, archive) if is_tested else "stored"
        # Damage is seen whatever else was stored on that day.
        if cell == "damaged" or order[cell] > order.get(cells[index], 9):
            cells[index] = cell
        sizes[index] = archive.size_bytes
        stored.append((index, archive.size_bytes, archive.transferred_bytes))
    for run in machine.runs:
        index = shown.index(run.ended_s)
        if index >= 0 and not cells[index] and run.verb == "backup" and run.state == "failed":
            cells[index] = "failed"
    return _OnDays(cells, sizes, stored)


def _cell(machine: _Machine, archive: ArchiveRecord) -> Cell:
    key = (archive.target, archive.archive)
    seen, drill = machine.verified.get(key), machine.drilled.get(key)
    if (seen and seen.verdict == "damaged") or (drill and drill.verdict == "not-booted"):
        return "damaged"
    if drill and drill.verdict == "booted":
        return "booted"
    return "verified" if seen and seen.verdict == "ok" else "stored"


def _problems(machine: _Machine, promise: Promise, now_s: float) -> Iterable[Problem]:
    there = machine.there
    verified, tested = machine.tested_there()
    for archive, seen in verified:
        if seen.verdict == "damaged":
            yield Problem(
                "damaged",
                f"{_name(archive)} is damaged: {seen.text or 'verify says where'}",
                f"back the machine up again; `vmapipe verify {archive.location or archive.archive}` "
                "names the disks and the bytes, `vmapipe restore --salvage` saves the rest",
            )
    last = max(tested, key=lambda drill: drill.tested_s, default=None)
    if last and last.verdict != "booted":
        yield Problem(
            "not-booted" if last.verdict == "not-booted" else "unproved",
            f"{last.archive} did not boot in its restore test: {last.text or last.verdict}"
            if last.verdict == "not-booted"
            else f"the restore test of {last.archive} came to no verdict: {last.text}",
            "look at its picture and its serial log; `vmapipe drill --help` tells how to give it a plan",
        )
    if machine.record.vanished_s:
        # It cannot be backed up, nor has what was stored to be tested for it.
        yield Problem(
            "vanished",
            f"no scan has found it for {human_age(now_s - machine.record.vanished_s)}",
            "if it is gone for good, `skip` in the inventory says so; its archives stay",
        )
        return
    yield from _backup_problems(machine, promise, now_s)
    checked_s = max((seen.checked_s for _, seen in verified), default=0.0)
    since_s = checked_s or (machine.first_s if there else now_s)
    if promise.verify_every_s and now_s - since_s > UNTESTED * promise.verify_every_s:
        said = f"for {human_age(now_s - since_s)}" if checked_s else "ever"
        yield Problem(
            "unverified",
            f"no archive was verified {said}; one every {human_age(promise.verify_every_s)} was promised",
            f"vmapipe verify {_last_place(machine)}",
        )
    if there and promise.drill_every_s:
        since_s = last.tested_s if last else machine.first_s
        if now_s - since_s > UNTESTED * promise.drill_every_s:
            said = f"for {human_age(now_s - since_s)}" if last else "ever"
            yield Problem(
                "untested",
                f"no restore test {said}; one every {human_age(promise.drill_every_s)} was promised",
                f"vmapipe drill {_last_place(machine)}",
            )


def _last_place(machine: _Machine) -> str:
    return (machine.last.location or machine.last.archive) if machine.last else "ARCHIVE"


def _backup_problems(machine: _Machine, promise: Promise, now_s: float) -> Iterable[Problem]:
    if not promise.has_target:
        yield Problem(
            "no-target", "it has no target", "target = … in fleet.toml, for it or for all"
        )
        return
    # A failure counts until a later backup was stored.
    backups = sorted(
        (r for r in machine.runs if r.verb == "backup" and r.ended_s > machine.stored_s),
        key=lambda run: run.ended_s,
    )
    failures = [run for run in backups if run.state == "failed"]
    failed = bool(backups) and backups[-1].state == "failed"
    times = f"it failed {len(failures)} times, the last one: " if len(failures) > 1 else ""
    cause = times + backups[-1].text if failed else ""
    way = (
        "vmapipe fleet history names each try"
        if failures
        else "vmapipe doctor says what would fail"
    )
    if machine.last is None:
        known_s = now_s - machine.record.first_seen_s
        is_new = machine.record.first_seen_s and not (failed or machine.archives)
        if is_new and known_s <= LATE * promise.every_s:
            yield Problem("new", f"known for {human_age(known_s)}, and not stored yet", way)
        else:
            yield Problem("never", f"no archive of it{_because(cause)}", way)
        return
    if machine.last_dated is None:
        yield Problem(
            "late",
            f"the time of {_name(machine.last)} is still to come: a clock was wrong{_because(cause)}",
            "set the clock of its host, and back the machine up again",
        )
        return
    age_s = now_s - _instant(machine.last_dated)
    if promise.every_s and age_s > LATE * promise.every_s:
        yield Problem(
            "late",
            f"the newest archive is {human_age(age_s)} old; one every "
            f"{human_age(promise.every_s)} was promised{_because(cause)}",
            way,
        )
    elif failed:
        yield Problem("failed", f"the last backup failed{_because(cause)}", way)


def _because(cause: str) -> str:
    return f": {cause}" if cause else ""


def _name(archive: ArchiveRecord) -> str:
    return f"{archive.archive} on {archive.target}" if archive.target else archive.archive


def _overdue(row: MachineReport) -> float:
    return row.age_s / row.promised_s if row.promised_s else 0.0


def _targets(machines: Iterable[_Machine], now_s: float) -> list[TargetReport]:
    found: dict[str, list[ArchiveRecord]] = defaultdict(list)
    for machine in machines:
        for archive in machine.there:
            found[archive.target].append(archive)
    return [
        TargetReport(
            target,
            len({archive.machine for archive in archives}),
            len(archives),
            sum([archive.size_bytes for archive in archives]),
            sum([archive.shared_bytes for archive in archives]),
            max([a.stored_s for a in archives if a.stored_s <= now_s + AHEAD_S], default=0.0),
        )
        for target, archives in sorted(found.items())
    ]
