# SPDX-License-Identifier: Apache-2.0
"""`vmapipe fleet serve`: plans every few seconds, and puts what may start into the queues of its host.

It may be killed at any time: all that it knows is in the database. The database may be killed, too: it is
started or tried again, and the next plan sees what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator

from vmapipe.fleet.engine import DatabaseCatalogue, DatabaseLost, JobQueue, open_database, shown
from vmapipe.fleet.inventory import Fleet, FleetMachine
from vmapipe.fleet.planner import Waiting
from vmapipe.fleet.postgres import PrivatePostgres
from vmapipe.fleet.records import CancelRecord, HostRecord, RunRecord
from vmapipe.fleet.rounds import Dispatcher
from vmapipe.fleet.scan import known_machines, put_together
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.process import notify
from vmapipe.runtime.syscalls import readable

_ROUND_S = 3.0
_RETRY_S = 2.0
#: A host whose worker has told nothing for so long does not answer.
SILENT_S = 30.0
_FORGET_S = 6 * 3600.0
# A job that was deferred just now may not be seen yet.
_YOUNG_S = 10.0

Say = Callable[[str], None]


def serve(fleet: Fleet, dsn: str, state: str, say: Say, cancel: Cancel) -> None:
    """Serve until `cancel`; with an empty DSN on a PostgreSQL of our own in `state`. Raises Failure."""
    with contextlib.ExitStack() as stack:
        own = None
        if not dsn:
            own = stack.enter_context(PrivatePostgres(state))
            dsn = own.dsn
        say(f"database: {shown(dsn)}")
        is_first, told = True, set[str]()

        def tell(text: str) -> None:
            # Once: it may be the disk of what is said that is full.
            if text not in told:
                told.add(text)
                say(text)

        while not cancel.asked:
            try:
                if own is not None and not own.is_alive:
                    tell("PostgreSQL has ended: it is started again")
                    _start_again(own)
                with _connected(dsn) as (catalogue, queue):
                    server = _FleetServer(fleet, catalogue, queue, say)
                    if is_first:
                        notify("READY=1")
                        say(f"serving {len(fleet.hosts)} hosts")
                        is_first = False
                    while not cancel.asked:
                        began = time.monotonic()
                        server.round()
                        if told:
                            say("the fleet's database does its work again")
                            told.clear()
                        # A plan of a large fleet takes a second, and must not take a processor.
                        pause = max(_ROUND_S, 4 * (time.monotonic() - began))
                        readable([cancel.fd], pause)
            except DatabaseLost as failure:
                if is_first and own is None:
                    raise
                tell(f"{failure}; trying again")
                readable([cancel.fd], _RETRY_S)
        notify("STOPPING=1")


def _start_again(own: PrivatePostgres) -> None:
    try:
        own.start()
    except Failure as failure:  # a full disk, which will have room again
        raise DatabaseLost(str(failure)) from failure


@contextlib.contextmanager
def _connected(dsn: str) -> Iterator[tuple[DatabaseCatalogue, JobQueue]]:
    catalogue = open_database(dsn)
    try:
        queue = JobQueue(dsn, catalogue)
        try:
            yield catalogue, queue
        finally:
            queue.close()
    finally:
        catalogue.close()


class _FleetServer:
    def __init__(
        self, fleet: Fleet, catalogue: DatabaseCatalogue, queue: JobQueue, say: Say
    ) -> None:
        self._fleet, self._catalogue, self._queue = fleet, catalogue, queue
        self._say = say
        self._dispatcher = Dispatcher(fleet, catalogue, queue)
        self._answers = dict[str, str]()
        self._machines = list[FleetMachine](known_machines(catalogue))
        self._told = dict[str, str]()
        self._forget_s = 0.0

    def round(self) -> None:
        """Look who is there, give up what is lost, plan, and start. Raises Failure."""
        now = self._catalogue.now_s()
        if now >= self._forget_s:
            self._catalogue.forget_old(now)
            self._forget_s = now + _FORGET_S
        down = self._look(now)
        self._give_up(now)
        for record in self._catalogue.select(CancelRecord):
            self._queue.cancel(record.run)
        by_name = {machine.name: machine for machine in self._machines}
        plan = self._dispatcher.plan(self._machines, down, now)
        for task in plan.starts:
            started = self._dispatcher.start(task, by_name[task.machine], now)
            if isinstance(started, Waiting):
                self._tell(f"{task.verb} of {task.machine}", started.text)
            else:
                self._say(f"{started.run}: {task.verb} of {task.machine} to {task.host}")

    def _look(self, now: float) -> dict[str, str]:
        """Return the hosts that do not answer, and why; the machines of the others are noted."""
        hosts = {h.host: h for h in self._catalogue.select(HostRecord)}
        down = dict[str, str]()
        for name in self._fleet.hosts:
            record = hosts.get(name)
            if record is None:
                down[name] = "no worker has ever been there (vmapipe fleet worker)"
            elif now - record.seen_s > SILENT_S:
                down[name] = f"its worker has said nothing for {now - record.seen_s:.0f} s"
            elif record.down:
                down[name] = record.down
        answers = {name: hosts[name].answer for name in self._fleet.hosts if name not in down}
        for name, why in down.items():
            if name in hosts and hosts[name].down != why:
                # For `fleet check`; a worker that comes back writes over it.
                self._catalogue.put(dataclasses.replace(hosts[name], down=why))
        if answers != self._answers:
            found = put_together(
                self._fleet,
                self._catalogue,
                {name: (_decoded(answers.get(name, "")), "") for name in self._fleet.hosts},
                now,
            )
            self._machines, self._answers = found.machines, answers
            for notice in found.notices:
                self._tell(notice, notice)
            for word in ("new", "vanished", "moved"):
                for text in getattr(found, word):
                    self._say(f"{word}: {text}")
        return down

    def _give_up(self, now: float) -> None:
        """Runs without a job are lost: their worker was killed, or the queue was."""
        live = self._queue.live()
        for run in self._catalogue.running():
            if run.run not in live and now - run.planned_s > _YOUNG_S:
                self._lose(run, now)
        for record in self._catalogue.select(CancelRecord):
            if record.run not in live:
                self._catalogue.remove(CancelRecord, run=record.run)

    def _lose(self, run: RunRecord, now: float) -> None:
        wished = self._catalogue.select(CancelRecord, run=run.run)
        lost = dataclasses.replace(
            run,
            state="cancelled" if wished else "lost",
            started_s=run.started_s or run.planned_s,
            ended_s=now,
            text="cancelled before it began" if wished else "its worker, or its queue, is gone",
        )
        if self._catalogue.finish(lost):
            self._say(f"{run.run}: {run.verb} of {run.machine} {lost.state}: {lost.text}")

    def _tell(self, about: str, text: str) -> None:
        """Say it once, not in each round."""
        if self._told.get(about) != text:
            self._told[about] = text
            self._say(f"{about}: {text}" if about != text else text)


def _decoded(answer: str) -> dict[str, object] | None:
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
