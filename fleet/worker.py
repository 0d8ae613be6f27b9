# SPDX-License-Identifier: Apache-2.0
"""`vmapipe fleet worker`: does the jobs of one host's queue, and tells what machines the host has.

Each job is an agent's, a child, as for `fleet run`: it checks the request once more, and ends when its
worker does. A worker that has not reached the database for a while ends its jobs, since they count as
lost by then, and another one may be started. How a job has ended is kept until the database takes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from vmapipe.fleet.carrier import call, probe
from vmapipe.fleet.engine import (
    STALLED_S,
    DatabaseCatalogue,
    DatabaseLost,
    open_database,
    request_of_job,
    run_worker,
)
from vmapipe.fleet.inventory import Fleet
from vmapipe.fleet.jobs import check
from vmapipe.fleet.outcome import UntoldEnds
from vmapipe.fleet.records import HostRecord, RunRecord
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.syscalls import readable

BEAT_S, PROBE_S = 5.0, 60.0
# Before the server gives a worker up that it does not hear.
_LOST_S = STALLED_S * 2 / 3
_RETRY_S = 2.0

Say = Callable[[str], None]


def work(fleet: Fleet, host: str, dsn: str, say: Say, cancel: Cancel) -> None:
    """Work until a signal comes; a database that is lost is tried again. Raises Failure.

    While another worker of the same host is at work, it waits for that one's end.
    """
    worker = _HostWorker(fleet, host, dsn, say)
    beats = threading.Thread(target=worker.beat, name="beats", daemon=True)
    beats.start()
    told, is_again = "", False
    try:
        while not cancel.asked:
            try:
                jobs = max(1, fleet.hosts[host].jobs)
                run_worker(dsn, host, jobs, worker.do, cancel, worker.begin, is_again=is_again)
            except DatabaseLost as failure:
                is_again = is_again or worker.at_work.is_set()
                worker.at_work.clear()
                if str(failure) != told:
                    told = str(failure)
                    say(f"{told}; trying again")
                readable([cancel.fd], _RETRY_S)
    finally:
        worker.stop.set()
        worker.at_work.set()
        beats.join(BEAT_S)


class _HostWorker:
    def __init__(self, fleet: Fleet, host: str, dsn: str, say: Say) -> None:
        self._fleet, self._dsn, self._say = fleet, dsn, say
        # Whatever the server needs to reach it, this is the host.
        self._host = dataclasses.replace(fleet.hosts[host], ssh="")
        self.stop, self.at_work = threading.Event(), threading.Event()
        self._untold = UntoldEnds(fleet, self._say_end, DatabaseLost)

    def begin(self) -> None:
        """Be the host's only worker. Raises DatabaseLost as long as it cannot be told how jobs have ended."""
        if self._untold:
            with contextlib.closing(open_database(self._dsn)) as catalogue:
                self._untold.tell(catalogue)
        self.at_work.set()

    def beat(self) -> None:
        """Tell again and again that this host is there, and what machines it has."""
        beats, answer, down, probed = 0, "", "", -PROBE_S
        catalogue: DatabaseCatalogue | None = None
        while not self.stop.is_set():
            # A second one says nothing: it may be on another host by mistake.
            if not self.at_work.wait(BEAT_S) or self.stop.is_set():
                continue
            if time.monotonic() - probed >= PROBE_S:
                found, down = probe(self._host)
                answer, probed = (json.dumps(found) if found is not None else ""), time.monotonic()
            beats += 1
            try:
                catalogue = catalogue or open_database(self._dsn)
                now = catalogue.now_s()
                catalogue.put(HostRecord(self._host.name, now, beats, down, answer))
            except Failure:
                if catalogue is not None:
                    catalogue.close()
                catalogue = None
            self.stop.wait(BEAT_S)
        if catalogue is not None:
            catalogue.close()

    def do(self, job: Mapping[str, Any], stop: threading.Event) -> None:
        """Do one job. What fails is told in the catalogue, and does not fail the queue."""
        try:
            run, request = request_of_job(job)
            catalogue = open_database(self._dsn)
        except Failure as failure:
            self._say(str(failure))
            return
        try:
            self._carry(catalogue, run, request, stop)
        except Failure as failure:
            self._say(f"{run}: {failure}")
        finally:
            catalogue.close()
        # A job that is gone before its end is told counts as lost, and is done again.
        while self._untold and not stop.wait(_RETRY_S):
            with (
                contextlib.suppress(Failure),
                contextlib.closing(open_database(self._dsn)) as catalogue,
            ):
                self._untold.tell(catalogue)

    def _carry(
        self,
        catalogue: DatabaseCatalogue,
        name: str,
        request: Mapping[str, Any],
        stop: threading.Event,
    ) -> None:
        known = catalogue.select(RunRecord, run=name)
        if not known or known[0].state != "waiting":
            return  # somebody has done it, or given it up
        now = catalogue.now_s()
        run = dataclasses.replace(known[0], state="running", started_s=now, seen_s=now)
        try:
            check(request)
        except Failure as failure:
            refused = dataclasses.replace(
                run, state="failed", ended_s=now, exit_code=failure.exit_code, text=str(failure)
            )
            catalogue.finish(refused)
            return
        catalogue.put(run)
        self._say(f"{name}: {run.verb} of {run.machine}")
        ends = list[Mapping[str, Any]]()
        heard = [time.monotonic()]

        def tell(event: Mapping[str, Any]) -> None:
            if event.get("event") == "ended":
                ends.append(event)
            elif event.get("event") == "progress":
                try:
                    numbers = [int(event[f"{word}_bytes"]) for word in ("done", "total")]
                    rate = float(event["rate_bytes_s"])
                    catalogue.beat(name, catalogue.now_s(), numbers[0], numbers[1], rate)
                    heard[0] = time.monotonic()
                except (Failure, KeyError, TypeError, ValueError):
                    if time.monotonic() - heard[0] > _LOST_S:
                        stop.set()

        ending = call(self._host, request, tell, stop)
        event: Mapping[str, Any] = (
            ends[0] if ends else {"exit_code": ending.code, "text": ending.text, "lost": True}
        )
        self._untold.add(run, event, catalogue.now_s())
        self._untold.tell(catalogue)

    def _say_end(self, run: RunRecord, text: str) -> None:
        self._say(f"{run.run}: {run.verb} of {run.machine} {run.state}{': ' * bool(text)}{text}")
