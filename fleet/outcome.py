# SPDX-License-Identifier: Apache-2.0
"""The catalogue's records of a job: made when it is planned, while it runs, and of what came of it."""

from __future__ import annotations

import base64
import dataclasses
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

from vmapipe.access.drill.result import PICTURE
from vmapipe.access.drill.screen import MAX_PNG_BYTES, is_png
from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.inventory import Fleet, FleetMachine
from vmapipe.fleet.jobs import location_of
from vmapipe.fleet.planner import FleetTask
from vmapipe.fleet.records import (
    ArchiveRecord,
    CancelRecord,
    DrillRecord,
    DrillVerdict,
    PictureRecord,
    Record,
    RunRecord,
    RunState,
    VerificationRecord,
)
from vmapipe.runtime.errors import EXIT_DAMAGED, Failure
from vmapipe.runtime.text import one_line

_TEXT_CHARS = 2000


def new_run(task: FleetTask, archive: str, now_s: float) -> RunRecord:
    """Return the record of a job that is planned now."""
    return RunRecord(
        secrets.token_hex(6),
        task.verb,
        task.machine,
        task.host,
        task.target,
        archive,
        planned_s=now_s,
        storages=",".join(task.storages),
    )


def location_in(catalogue: Catalogue, fleet: Fleet, task: FleetTask, machine: FleetMachine) -> str:
    """Return where the archive of a task is, as its target's host sees it; empty: it has none."""
    if not task.archive:
        return ""
    target = fleet.targets[task.target]
    source = target.copy_from if task.verb == "copy" else target.name
    known = catalogue.select(
        ArchiveRecord, machine=task.machine, target=source, archive=task.archive
    )
    if known and known[0].location:
        return known[0].location
    return location_of(fleet.targets[source], machine.host, task.archive)


def ended(
    fleet: Fleet, catalogue: Catalogue, run: RunRecord, event: Mapping[str, Any], now_s: float
) -> tuple[RunRecord, list[Record]]:
    """Return a run with its end, out of an agent's last event, and what came of it."""
    code = event.get("exit_code")
    code = code if isinstance(code, int) and 0 <= code < 256 else -1
    state: RunState = "done" if code == 0 else "failed"
    if event.get("cancelled"):
        state = "cancelled"
    elif event.get("lost"):
        state = "lost"
    result = event.get("result")
    result = result if isinstance(result, dict) else {}
    run = dataclasses.replace(
        run,
        state=state,
        ended_s=now_s,
        seen_s=now_s,
        exit_code=code,
        text=one_line(str(event.get("text", "")), _TEXT_CHARS) if state != "done" else "",
        done_bytes=_whole(event.get("done_bytes")),
        total_bytes=_whole(event.get("total_bytes")),
    )
    makers = {
        "backup": _stored,
        "copy": _copied,
        "verify": _verified,
        "drill": _drilled,
        "prune": _pruned,
    }
    return makers[run.verb](fleet, catalogue, run, result)


class UntoldEnds:
    """How jobs have ended, as long as the catalogue has not taken it: its disk is full, or it is away.

    A job whose end is forgotten would be done again. Threads may share it. `said` hears of each that was taken;
    `passes`: the failures after which it is tried again. One that fails otherwise would fail each time, and is let go.
    """

    def __init__(
        self, fleet: Fleet, said: Callable[[RunRecord, str], None], passes: type[Failure] = Failure
    ) -> None:
        self._fleet, self._said, self._passes = fleet, said, passes
        self._ends = list[tuple[RunRecord, Mapping[str, Any], float]]()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._ends)

    def add(self, run: RunRecord, event: Mapping[str, Any], at_s: float) -> None:
        self._ends.append((run, event, at_s))

    def tell(self, catalogue: Catalogue) -> None:
        """Store them, with what came of the jobs. Raises `passes`; none is forgotten by that."""
        with self._lock:
            while self._ends:
                run, event, at_s = self._ends[0]
                try:
                    if event.get("cancelled") and not catalogue.select(CancelRecord, run=run.run):
                        # Nobody has wished it: it ended with who ran it, and the machine has not failed.
                        event = {**event, "cancelled": False, "lost": True}
                    record, results = ended(self._fleet, catalogue, run, event, at_s)
                    catalogue.finish(record, *results)
                    self._said(record, record.text)
                except self._passes:
                    raise
                except Failure as failure:
                    self._said(dataclasses.replace(run, state="lost"), str(failure))
                del self._ends[0]


def _whole(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 62 else 0


def _stored(
    fleet: Fleet, catalogue: Catalogue, run: RunRecord, result: Mapping[str, Any]
) -> tuple[RunRecord, list[Record]]:
    del catalogue
    stored = result.get("stored")
    if run.state != "done" or not isinstance(stored, dict):
        return run, []
    done = result.get("done")
    done = done if isinstance(done, dict) else {}
    place = str(stored.get("archive", ""))
    # A Proxmox VE machine's archive has its name from the host.
    archive = os.path.basename(place) or run.archive
    run = dataclasses.replace(run, archive=archive)
    target = fleet.targets.get(run.target)
    is_here = target is None or not target.archiver
    location = place if is_here else location_of(target, run.host, archive) if target else ""
    record = ArchiveRecord(
        run.machine,
        run.target,
        archive,
        location,
        run.host,
        str(stored.get("uuid", "")),
        instant_s=run.started_s,
        stored_s=run.ended_s,
        seconds=run.ended_s - run.started_s,
        disk_bytes=run.total_bytes,
        plain_bytes=_whole(stored.get("plain_bytes")),
        size_bytes=_whole(stored.get("stored_bytes")),
        transferred_bytes=_whole(done.get("read_bytes")),
        shared_bytes=_whole(stored.get("shared_bytes")),
        base=os.path.basename(str(stored.get("base", ""))),
    )
    return run, [record]


def _copied(
    fleet: Fleet, catalogue: Catalogue, run: RunRecord, result: Mapping[str, Any]
) -> tuple[RunRecord, list[Record]]:
    del result
    if run.state != "done" or run.target not in fleet.targets:
        return run, []
    target = fleet.targets[run.target]
    known = catalogue.select(
        ArchiveRecord, machine=run.machine, target=target.copy_from, archive=run.archive
    )
    original = known[0] if known else ArchiveRecord(run.machine, target.copy_from, run.archive)
    copy = dataclasses.replace(
        original,
        target=run.target,
        location=location_of(target, original.host, run.archive),
        stored_s=run.ended_s,
        seconds=run.ended_s - run.started_s,
        copy_of=target.copy_from,
        removed_s=0.0,
    )
    return run, [copy]


def _verified(
    fleet: Fleet, catalogue: Catalogue, run: RunRecord, result: Mapping[str, Any]
) -> tuple[RunRecord, list[Record]]:
    del fleet, catalogue
    verified = result.get("verified")
    if run.state not in ("done", "failed"):
        return run, []
    verified = verified if isinstance(verified, dict) else {}
    is_damaged = run.exit_code == EXIT_DAMAGED
    record = VerificationRecord(
        run.machine,
        run.target,
        run.archive,
        run.ended_s,
        "ok" if run.state == "done" else "damaged" if is_damaged else "failed",
        bool(verified.get("data_checked")),
        run.ended_s - run.started_s,
        run.text,
    )
    return run, [record]


def _drilled(
    fleet: Fleet, catalogue: Catalogue, run: RunRecord, result: Mapping[str, Any]
) -> tuple[RunRecord, list[Record]]:
    del fleet, catalogue
    drilled = result.get("drilled")
    if run.state not in ("done", "failed"):
        return run, []
    drilled = drilled if isinstance(drilled, dict) else {}
    seconds = drilled.get("seconds")
    evidence = drilled.get("evidence")
    record = DrillRecord(
        run.machine,
        run.target,
        run.archive,
        run.ended_s,
        drill_verdict(drilled.get("verdict")),
        float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e9 else 0.0,
        one_line(str(drilled.get("proof", "")), 200),
        f"{evidence}/{PICTURE}" if isinstance(evidence, str) else "",
        run.ended_s - run.started_s,
        one_line(str(drilled.get("reason") or run.text), _TEXT_CHARS),
    )
    picture = result.get("picture")
    if decode_picture(picture) is None:
        return run, [record]
    return run, [
        record,
        PictureRecord(run.machine, run.target, run.archive, run.ended_s, str(picture)),
    ]


def decode_picture(told: object) -> bytes | None:
    """Return a picture as it travels, and as the catalogue has it (base 64); None: it is not one of ours."""
    if not isinstance(told, str) or len(told) > 2 * MAX_PNG_BYTES:
        return None
    try:
        png = base64.b64decode(told, validate=True)
    except ValueError:
        return None
    return png if is_png(png) else None


def drill_verdict(told: object) -> DrillVerdict:
    """Return what `vmapipe drill` has said as the catalogue has it. Pure."""
    match told:
        case "booted":
            return "booted"
        case "not booted":
            return "not-booted"
    return "undecided"


def _pruned(
    fleet: Fleet, catalogue: Catalogue, run: RunRecord, result: Mapping[str, Any]
) -> tuple[RunRecord, list[Record]]:
    del fleet
    removed = result.get("removed")
    names = [str(name) for name in removed] if isinstance(removed, list) else []
    gone = catalogue.select(
        ArchiveRecord, machine=run.machine, target=run.target, archive=names[:10_000]
    )
    return run, [dataclasses.replace(archive, removed_s=run.ended_s) for archive in gone]
