# SPDX-License-Identifier: Apache-2.0
"""`vmapipe fleet report`, `check` and `rescan`: the catalogue against the promise, and made again from the archives."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vmapipe.control.cli.report import beside_archive, check_report_options, give_out
from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.inventory import Fleet, FleetTarget
from vmapipe.fleet.jobs import directory_of, safe_name
from vmapipe.fleet.outcome import decode_picture
from vmapipe.fleet.records import (
    AHEAD_S,
    ArchiveRecord,
    DrillRecord,
    HostRecord,
    MachineRecord,
    PictureRecord,
    RunRecord,
    Standing,
    Verb,
    VerificationRecord,
)
from vmapipe.fleet.report.check import EXIT_CODES, judge, plugin_lines
from vmapipe.fleet.report.facts import FleetReport, Promise, ReportInput, make_report, shown_from_s
from vmapipe.fleet.rescan import PlaceRecords, read_place
from vmapipe.fleet.scan import machine_of
from vmapipe.places.place import open_place
from vmapipe.runtime.errors import Failure

# A failure that is older, and was followed by no other and no success, is late by then.
_CHECK_DAYS = 31
# Of restore tests and verifications: more than the longest interval between two that anybody promises.
_KNOWN_S = 400 * 86400
# Both databases take more than 30,000 values in a question.
_NAMES_AT_ONCE = 1000


def report(fleet: Fleet, catalogue: Catalogue, options: argparse.Namespace) -> None:
    """Make the report of all that the catalogue knows. Raises Failure, NotSafe."""
    zone = check_report_options(options)
    with _without_collector():
        made = facts_of(fleet, catalogue, zone, options.days, options.title)
        give_out(made, options, lambda drill: _picture(catalogue, drill))


def _picture(catalogue: Catalogue, drill: DrillRecord) -> bytes | None:
    """Return what the screen showed: as the host of the test has told it, or from beside the archive."""
    for record in catalogue.select(PictureRecord, machine=drill.machine, target=drill.target):
        if record.archive == drill.archive and (png := decode_picture(record.png)):
            return png
    return beside_archive(drill)


def show_check(fleet: Fleet, catalogue: Catalogue, *, as_json: bool) -> int:
    """Print what a Nagios plugin says; return its exit code. Raises Failure."""
    down = {h.host: h.down for h in catalogue.select(HostRecord) if h.down}
    checked = judge(
        problems_of(fleet, catalogue),
        {host: why for host, why in down.items() if host in fleet.hosts},
    )
    if as_json:
        whole = checked._asdict() | {"troubles": [t._asdict() for t in checked.troubles]}
        print(json.dumps(whole))
    else:
        print("\n".join(plugin_lines(checked)))
    return EXIT_CODES[checked.state]


def facts_of(
    fleet: Fleet, catalogue: Catalogue, zone: str, days: int, title: str = ""
) -> FleetReport:
    """Hold all that the catalogue knows against what is promised. Raises Failure."""
    now = time.time()
    from_s = shown_from_s(now, zone, days)
    machines = catalogue.select(MachineRecord)
    records = ReportInput(
        machines,
        catalogue.archives_since(from_s),
        [
            *catalogue.select_since(VerificationRecord, {"checked_s": now - _KNOWN_S}),
            *catalogue.select(VerificationRecord, verdict="damaged"),
        ],
        catalogue.select_since(DrillRecord, {"tested_s": now - _KNOWN_S}),
        _failures(catalogue, from_s),
    )
    return make_report(records, _promises(fleet, machines), now, zone, days, title)


def problems_of(fleet: Fleet, catalogue: Catalogue) -> FleetReport:
    """Return a report whose problems and ages alone are right: it reads no more than they need. Raises Failure."""
    now = time.time()
    with _without_collector():
        machines = catalogue.select(MachineRecord)
        there = catalogue.telling_archives(now + AHEAD_S)
        stored = {archive.machine for archive in there}
        bare = [record.machine for record in machines if record.machine not in stored]
        # A machine that had an archive is not new.
        gone = [
            archive
            for n in range(0, len(bare), _NAMES_AT_ONCE)
            for archive in catalogue.select_since(
                ArchiveRecord, {"removed_s": 1.0}, machine=bare[n : n + _NAMES_AT_ONCE]
            )
        ]
        records = ReportInput(
            machines,
            [*there, *gone],
            catalogue.tests_of_what_is_there(VerificationRecord),
            catalogue.tests_of_what_is_there(DrillRecord),
            _failures(catalogue, shown_from_s(now, "UTC", _CHECK_DAYS)),
        )
        return make_report(records, _promises(fleet, machines), now, days=1)


def _failures(catalogue: Catalogue, from_s: float) -> list[RunRecord]:
    return catalogue.select_since(RunRecord, {"ended_s": from_s}, verb="backup", state="failed")


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Hundreds of thousands of records, none in a cycle: a search for cycles would double the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _promises(fleet: Fleet, machines: list[MachineRecord]) -> Mapping[str, Promise]:
    policies = {record.machine: fleet.policy(machine_of(record)) for record in machines}
    return {
        name: Promise(
            p.every_s, p.drill_every_s, p.verify_every_s, p.skip, p.target in fleet.targets
        )
        for name, p in policies.items()
    } | {"": Promise(0.0, skip="no scan knows it")}


def rescan(fleet: Fleet, catalogue: Catalogue) -> tuple[int, list[str]]:
    """Put what the archives of all targets say into the catalogue.

    Return how many archives there are, and a line for each target that could not be looked at from here.
    What the catalogue knows of an archive already stays: it is more than the archive tells.
    """
    names = {safe_name(m.machine): m.machine for m in catalogue.select(MachineRecord)}
    count, lines = 0, []
    for target in fleet.targets.values():
        try:
            before = _known(catalogue, target)
            # All folders of a target at once: what is in one of them is not gone from another.
            found = [_read(place, target.name, names) for place in _places(fleet, target)]
            whole = PlaceRecords(
                [archive for one in found for archive in one.archives],
                [look for one in found for look in one.verifications],
                [test for one in found for test in one.drills],
            )
            count += _take(catalogue, whole, target, before)
        except Failure as failure:
            lines.append(f"target {target.name}: {failure}")
    return count, lines


def _places(fleet: Fleet, target: FleetTarget) -> Iterator[str]:
    if target.directory:
        if target.host and fleet.hosts[target.host].ssh:
            raise Failure(
                f"its archives are on host {target.host}: run `vmapipe fleet rescan` there, "
                "or mount its folder here"
            )
        hosts = fleet.hosts if "{host}" in target.directory else [""]
        yield from {directory_of(target, host): None for host in hosts}
    elif target.s3:
        yield f"{target.s3}/"
    else:
        raise Failure("it has no directory and no s3")


def _read(place: str, target: str, names: Mapping[str, str]) -> PlaceRecords:
    with contextlib.closing(open_place(place)) as opened:
        return read_place(opened, target, names, is_utc=True)


class _Known(NamedTuple):
    """What the catalogue has of a target."""

    archives: dict[tuple[str, str], ArchiveRecord]
    standings: dict[tuple[str, Verb, str], Standing]


def _known(catalogue: Catalogue, target: FleetTarget) -> _Known:
    archives = catalogue.select(ArchiveRecord, target=target.name)
    return _Known({(a.machine, a.archive): a for a in archives}, catalogue.standings())


def _take(catalogue: Catalogue, found: PlaceRecords, target: FleetTarget, before: _Known) -> int:
    """Store what was found. `before`: as the catalogue was then; what a job has told since is newer, and stays."""
    with catalogue.transaction():
        known = _known(catalogue, target)
        there = {(a.machine, a.archive) for a in found.archives}
        now = time.time()
        for archive in found.archives:
            key = (archive.machine, archive.archive)
            is_gone = key in known.archives and known.archives[key].removed_s
            if key not in known.archives or (
                is_gone and known.archives[key] == before.archives.get(key)
            ):
                catalogue.put(archive)
        for key, archive in known.archives.items():
            if key not in there and not archive.removed_s and archive == before.archives.get(key):
                catalogue.put(archive.removed(now))
        catalogue.put(*found.verifications, *found.drills)
        catalogue.put(
            *(
                standing
                for standing in _standings(known.standings, found, target, now)
                if known.standings.get(at := (standing.machine, standing.verb, standing.target))
                == before.standings.get(at)
            )
        )
    return len(found.archives)


def _standings(
    known: Mapping[tuple[str, Verb, str], Standing],
    found: PlaceRecords,
    target: FleetTarget,
    now_s: float,
) -> Iterator[Standing]:
    """Yield where tasks stand by what is there: else all would be backed up again after a lost catalogue."""
    verb: Verb = "copy" if target.copy_from else "backup"
    there = {(a.machine, a.archive) for a in found.archives}
    made = [(a.instant_s, verb, a.machine, a.archive) for a in found.archives]
    looks: list[tuple[float, Verb, str, str]] = [
        (v.checked_s, "verify", v.machine, v.archive)
        for v in found.verifications
        if v.verdict == "ok"
    ]
    looks += [
        (d.tested_s, "drill", d.machine, d.archive) for d in found.drills if d.verdict == "booted"
    ]
    done = dict[tuple[str, Verb, str], Standing]()
    for at_s, task, machine, archive in sorted(made + looks):
        if at_s <= now_s + AHEAD_S:
            key = (machine, task, target.name)
            done[key] = Standing(machine, task, target.name, at_s, at_s, archive)
    for key, standing in done.items():
        if key not in known:
            yield standing
    for key, before in known.items():
        machine, task, place = key
        # What it was about was removed behind our back: what is left counts, or nothing.
        if (task, place) == (verb, target.name) and (machine, before.archive) not in there:
            left = done.get(key, Standing(machine, verb, place))
            yield dataclasses.replace(
                before, done_s=left.done_s, ended_s=left.ended_s, archive=left.archive
            )
