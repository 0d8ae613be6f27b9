# SPDX-License-Identifier: Apache-2.0
"""One round of `vmapipe fleet run`: plan, start, watch, plan again, until nothing more may start.

The same steps serve `fleet serve`, whose carrier is the engine: `Dispatcher` knows neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from vmapipe.fleet.carrier import SubprocessCarrier, ToldEvent
from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.inventory import Fleet, FleetMachine
from vmapipe.fleet.jobs import request_of
from vmapipe.fleet.outcome import UntoldEnds, location_in, new_run
from vmapipe.fleet.planner import FleetPlan, FleetTask, Waiting, plan
from vmapipe.fleet.records import CancelRecord, RunRecord
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError

_WAIT_S = 1.0
# For somebody who makes room: the next round would back up once more what is not told.
_UNTOLD_S = 60.0
# A plan of 10,000 machines takes a second: not for each job that ends.
_PLAN_S = 2.0

Say = Callable[[str], None]


class Carrier(Protocol):
    """Whoever brings requests to hosts: `run` names a job in all that is said of it."""

    def start(self, run: str, host: str, request: Mapping[str, Any]) -> None: ...
    def cancel(self, run: str) -> None: ...


class Dispatcher:
    """Plans, and gives what may start to a carrier; every job is in the catalogue before it starts."""

    def __init__(self, fleet: Fleet, catalogue: Catalogue, carrier: Carrier) -> None:
        self.fleet, self._catalogue, self._carrier = fleet, catalogue, carrier

    def plan(
        self, machines: Sequence[FleetMachine], down: Mapping[str, str], now_s: float
    ) -> FleetPlan:
        """Return what may start. Raises Failure."""
        return plan(
            self.fleet,
            machines,
            self._catalogue.standings(),
            self._catalogue.running(),
            down,
            now_s,
        )

    def start(self, task: FleetTask, machine: FleetMachine, now_s: float) -> RunRecord | Waiting:
        """Start a task; or return why it cannot be. Raises Failure of the catalogue."""
        run = new_run(task, task.archive, now_s)
        try:
            location = location_in(self._catalogue, self.fleet, task, machine)
            request = request_of(self.fleet, task, machine, location, run.run, now_s)
        except UsageError as error:
            return Waiting(task, "no-place", str(error))
        if task.verb == "backup":
            run = dataclasses.replace(run, archive=str(request.get("archive", "")))
        # Without this line in the catalogue nothing may run: the next plan would start it again.
        self._catalogue.put(run)
        self._carrier.start(run.run, task.host, request)
        return run


def lose_all(catalogue: Catalogue, now_s: float) -> list[RunRecord]:
    """Give up all runs that have not ended: whoever ran them has died. Raises Failure."""
    lost = [
        dataclasses.replace(
            run, state="lost", ended_s=now_s, text="whoever ran it has ended before it"
        )
        for run in catalogue.running()
    ]
    for run in lost:
        catalogue.finish(run)
    return lost


@contextlib.contextmanager
def only_one(path: str, what: str) -> Iterator[None]:
    """Hold the lock of a catalogue. Raises Failure where another one has it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Failure(f"cannot lock {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise Failure(f"{what} ({path} is locked); `vmapipe fleet status` shows it") from None
        yield
    finally:
        os.close(fd)


class Round:
    """A round with subprocesses and ssh: `run` it once, then read `ended` and `refused`."""

    def __init__(self, fleet: Fleet, catalogue: Catalogue, say: Say, cancel: Cancel) -> None:
        self._fleet, self._catalogue = fleet, catalogue
        self._say, self._cancel = say, cancel
        self._carrier = SubprocessCarrier(fleet.hosts)
        self._dispatcher = Dispatcher(fleet, catalogue, self._carrier)
        self._runs = dict[str, RunRecord]()
        self._tried = set[tuple[str, str, str, str]]()
        # Without the catalogue what runs goes on, and nothing new starts.
        self._untold = UntoldEnds(fleet, self._say_end)
        self._trouble: Failure | None = None
        self.ended = list[RunRecord]()
        #: Tasks that no host would take.
        self.refused = list[Waiting]()

    def run(
        self, machines: Sequence[FleetMachine], down: Mapping[str, str], limit_s: float
    ) -> list[Waiting]:
        """Work until nothing more may start; return what waits then. Raises Failure, Cancelled.

        A catalogue that fails meanwhile (a full disk) ends no job: what runs is waited for, then it is told.
        After `limit_s` seconds nothing is started any more.
        """
        by_name = {machine.name: machine for machine in machines}
        self._down = dict(down)
        deadline = time.monotonic() + limit_s
        waits = list[Waiting]()
        planned, give_up = -_PLAN_S, 0.0
        with self._surviving():
            self._catalogue.forget_old(time.time())
            self._catalogue.remove(CancelRecord)  # of jobs that have ended long ago
        try:
            while True:
                self._cancel.check()
                if time.monotonic() - planned >= _PLAN_S or not self._runs:
                    with self._surviving():
                        self._untold.tell(self._catalogue)
                        if time.monotonic() < deadline:
                            waits = self._start_more(by_name)
                    planned = time.monotonic()
                    if not self._runs:
                        if self._trouble is None:
                            return waits
                        if not self._untold or time.monotonic() >= give_up:
                            raise self._trouble
                if self._runs:
                    give_up = time.monotonic() + _UNTOLD_S
                self._hear(_WAIT_S)
                with contextlib.suppress(Failure):
                    self._cancel_wished()
        finally:
            self._end_all()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Note that the catalogue fails, or works again."""
        try:
            yield
            self._trouble = None
        except Failure as failure:
            if self._trouble is None and self._runs:
                self._say(f"what runs goes on, and nothing new is started: {failure}")
            self._trouble = failure

    def _start_more(self, by_name: Mapping[str, FleetMachine]) -> list[Waiting]:
        now = time.time()
        found = self._dispatcher.plan(list(by_name.values()), self._down, now)
        waits = list(found.waits)
        for task in found.starts:
            # A job that was lost or cancelled in this round is the next one's; one of a newer archive is not.
            key = (task.machine, task.verb, task.target, task.archive)
            if key in self._tried:
                continue
            self._tried.add(key)
            started = self._dispatcher.start(task, by_name[task.machine], now)
            if isinstance(started, Waiting):
                self.refused.append(started)
            else:
                self._runs[started.run] = started
                self._say(f"{started.run}: {task.verb} of {task.machine} on {task.host}")
        return waits

    def _hear(self, wait_s: float) -> None:
        """Take what has been told; wait for something if there is nothing."""
        try:
            told = self._carrier.events.get(timeout=wait_s)
        except queue.Empty:
            return
        while True:
            self._take(told)
            try:
                told = self._carrier.events.get_nowait()
            except queue.Empty:
                return

    def _take(self, told: ToldEvent) -> None:
        run, event, now = self._runs.get(told.run), told.event, time.time()
        if run is None:
            return
        match event.get("event"):
            case "begun":
                run = dataclasses.replace(run, state="running", started_s=now, seen_s=now)
                self._runs[run.run] = run
                # The same: its end says when it began, too.
                with contextlib.suppress(Failure):
                    self._catalogue.put(run)
            case "progress":
                done, total = (_number(event.get(f"{n}_bytes")) for n in ("done", "total"))
                rate = float(_number(event.get("rate_bytes_s")))
                # Progress is for people: a full disk must not end the jobs.
                with contextlib.suppress(Failure):
                    self._catalogue.beat(run.run, now, done, total, rate)
            case "ended":
                self._end(run, event, now)

    def _end(self, run: RunRecord, event: Mapping[str, Any], now: float) -> None:
        self._carrier.forget(run.run)
        del self._runs[run.run]
        if event.get("is_down") and run.state == "waiting":
            self._down[run.host] = str(event.get("text"))
        if not run.started_s:
            run = dataclasses.replace(run, started_s=run.planned_s)
        self._untold.add(run, event, now)
        with self._surviving():
            self._untold.tell(self._catalogue)

    def _say_end(self, run: RunRecord, text: str) -> None:
        self.ended.append(run)
        words = f": {text}" if text else ""
        self._say(f"{run.run}: {run.verb} of {run.machine} {run.state}{words}")

    def _cancel_wished(self) -> None:
        for record in self._catalogue.select(CancelRecord):
            if record.run in self._runs:
                self._carrier.cancel(record.run)

    def _end_all(self) -> None:
        """End what runs, in order; an agent that is lost ends itself when its pipe closes."""
        for name in list(self._runs):
            self._carrier.cancel(name)
        while self._runs:
            self._hear(_WAIT_S)


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 62 else 0
