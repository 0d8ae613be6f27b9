# SPDX-License-Identifier: Apache-2.0
"""The archiver's loop: carries messages to the job's core and its instructions out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.archiver import instructions as core
from vmapipe.archiver.device import Mark
from vmapipe.archiver.job import Job, Phase
from vmapipe.archiver.jobspec import JobSpec
from vmapipe.archiver.link import Link
from vmapipe.archiver.shared import map_shared, refuse_shared
from vmapipe.archiver.store import Store
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.process import yield_cpu

if TYPE_CHECKING:
    from vmapipe.runtime.keys import ServerKeys

# Often enough for a bar that moves, seldom enough to cost nothing.
PROGRESS_S = 0.25

MakeStore = Callable[[Callable[[], None]], Store[Mark]]


class Listen(NamedTuple):
    """Where producers connect, and for TCP the keys of those that may."""

    endpoint: str
    keys: ServerKeys | None = None
    #: Whether what comes over ipc:// may come from elsewhere: no memory is shared then.
    from_afar: bool = False


def serve(spec: JobSpec, at: Listen, make_store: MakeStore, cancel: Cancel, emit: Emit) -> None:
    """Make one archive. Raises Failure when nothing was stored."""
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    link: Link | None = None
    try:
        store = make_store(lambda: os.eventfd_write(wake_fd, 1))
        try:
            link = Link(at.endpoint, at.keys)
            link.watch(wake_fd)
            link.watch(cancel.fd)
            emit({"event": "listening", "endpoint": link.endpoint})
            shares = link.is_local and not at.from_afar
            job = Job(spec, time.monotonic(), map_shared if shares else refuse_shared)
            _Server(job, link, store, emit).run(wake_fd, cancel)
        finally:
            # Nothing to do where the archive was stored.
            store.abandon()
    finally:
        if link is not None:
            link.close()
        os.close(wake_fd)


class _Server:
    def __init__(self, job: Job, link: Link, store: Store[Mark], emit: Emit) -> None:
        self._job = job
        self._link = link
        self._store = store
        self._emit = emit
        self._next_progress = 0.0
        self._told = False

    def run(self, wake_fd: int, cancel: Cancel) -> None:
        job = self._job
        self._handle(core.Started())
        while not job.over and not (cancel.asked and job.phase is Phase.DONE):
            self._link.wait(1.0)
            for peer, client, parts in self._link.receive():
                self._handle(core.Received(peer, parts, time.monotonic(), client))
                yield_cpu()
            self._look_at_gate(time.monotonic())
            self._hear_store(wake_fd)
            if cancel.asked:
                self._handle(core.GivenUp(cancel.reason))
            self._pass_time(time.monotonic())
        # A stop that comes while the archive gets its name may come too late.
        if job.phase is Phase.FAILED and not self._store.committed:
            if cancel.asked:
                raise Cancelled(cancel.reason, cancel.signum)
            raise Failure(job.reason)
        self._tell_stored()

    def _tell_stored(self) -> None:
        """At once, although a producer whose connection was lost may still have to hear of it."""
        if not self._told:
            self._told = True
            self._progress()
            self._emit(
                {
                    "event": "stored",
                    "archive": self._store.description,
                    "uuid": self._job.uuid.hex(),
                    "stored_bytes": self._store.stored_bytes,
                    "plain_bytes": self._store.plain_bytes,
                }
            )

    def _look_at_gate(self, now: float) -> None:
        for client in self._link.revoked(now):
            self._handle(core.Revoked(client))
        for text in self._link.take_notices():
            self._emit({"event": "notice", "text": text})

    def _handle(self, event: core.Event) -> None:
        for instruction in self._job.handle(event):
            match instruction:
                case core.Send(peer, parts):
                    self._link.send(peer, parts)
                case core.Put(extent):
                    self._store.put(extent)
                case core.Begin(header, raw_header):
                    self._store.begin(header, raw_header)
                    self._emit(
                        {
                            "event": "begun",
                            "uuid": header.uuid.hex(),
                            "devices": [
                                {"dev_id": d.dev_id, "name": d.name, "bytes": d.size_bytes}
                                for d in header.devices
                            ],
                        }
                    )
                case core.Finish():
                    self._store.finish()
                case core.Abandon():
                    self._store.abandon()
                case core.Notice(text):
                    self._emit({"event": "notice", "text": text})

    def _hear_store(self, wake_fd: int) -> None:
        try:
            os.eventfd_read(wake_fd)
        except BlockingIOError:
            return
        for extent in self._store.take_written():
            held = {cluster[0] for cluster in extent.clusters}
            self._handle(core.Written(extent.notes, held))
        if self._store.error is not None:
            self._handle(core.GivenUp(str(self._store.error)))
        elif self._store.committed:
            self._handle(core.Stored())
            self._tell_stored()

    def _pass_time(self, now: float) -> None:
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_S
            self._handle(core.Ticked(now))
            if not self._told:
                self._progress()

    def _progress(self) -> None:
        if not self._job.devices:
            return
        self._emit(
            {
                "event": "progress",
                "stored_bytes": self._store.stored_bytes,
                "plain_bytes": self._store.plain_bytes,
                "devices": [
                    {
                        "name": d.device.name,
                        "bytes": d.device.size_bytes,
                        "done_bytes": d.done_bytes,
                        "zero_bytes": d.zero_bytes,
                    }
                    for d in self._job.devices
                ],
            }
        )
