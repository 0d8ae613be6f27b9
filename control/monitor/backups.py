# SPDX-License-Identifier: Apache-2.0
"""What a monitor knows of its backups, one at a time. Pure.

A coordinator's events in; status, answers and QMP events out. The members are
those of the RFC's BackupStatus. Also for whoever else hears a coordinator's
events and is asked `query-backup`.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, NamedTuple

from vmapipe.control.monitor.qmp import QmpError
from vmapipe.runtime.events import Event

CANCELED = "backup canceled"
# A client draws a bar from them; more would only be work.
PROGRESS_S = 1.0


class Moment(NamedTuple):
    """Now: seconds since 1970, and by a clock that only goes forward."""

    wall_s: float
    clock_s: float


class Told(NamedTuple):
    """A QMP event for everybody."""

    name: str
    data: dict[str, Any]


class Accepted(NamedTuple):
    """The command `backup` is answered."""

    uuid: str


class Rejected(NamedTuple):
    """It is refused; the status stays what it was."""

    error: QmpError


Outcome = Told | Accepted | Rejected

EVENTS = (
    "BACKUP_CANCELLED",
    "BACKUP_COMPLETED",
    "BACKUP_FAILED",
    "BACKUP_PROGRESS",
    "BACKUP_STARTED",
)


@dataclass
class _Backup:
    """`starts_with`: the event at which the archive's instant is behind us."""

    file: str
    starts_with: str
    uuid: str = ""
    total: int = 0
    transferred: int = 0
    zero_bytes: int = 0
    #: The first error.
    errmsg: str = ""
    canceled: bool = False
    at_instant: bool = False
    started: bool = False
    start_time_s: int = 0
    end_time_s: int = 0
    next_progress_s: float = 0.0

    def status(self) -> dict[str, Any]:
        state = "active"
        if self.end_time_s:
            state = "error" if self.errmsg else "done"
        status: dict[str, Any] = {"status": state}
        if state == "error":
            status["errmsg"] = self.errmsg
        status |= self.counts()
        status["start-time"] = self.start_time_s
        if self.end_time_s:
            status["end-time"] = self.end_time_s
        return {**status, "backupfile": self.file, "uuid": self.uuid}

    def counts(self) -> dict[str, int]:
        return {
            "total": self.total,
            "transferred": self.transferred,
            "zero-bytes": self.zero_bytes,
        }


class Backups:
    """In this order: `begin`, `hear` …, `end` or `refuse`; `cancel` and `status` at any time."""

    def __init__(self) -> None:
        self._running: _Backup | None = None
        # The last one that has started, running or not.
        self._shown: _Backup | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None

    @property
    def canceled(self) -> bool:
        """The one that runs is being cancelled."""
        return self._running is not None and self._running.canceled

    def begin(self, file: str, *, with_state: bool = False) -> None:
        """Raises QmpError when one is running. The answer comes with an outcome.

        Where the machine's memory is saved, too, the instant may be minutes away:
        then the answer does not wait for it.
        """
        if self._running is not None:
            raise QmpError("previous backup not finished")
        self._running = _Backup(file, "begun" if with_state else "instant")

    def hear(self, event: Event, now: Moment) -> list[Outcome]:
        """What the coordinator tells."""
        backup = self._running
        if backup is None:
            return []
        match event["event"]:
            case "begun":
                backup.uuid = str(uuid.UUID(event["uuid"]))
                self._count(backup, event["devices"])
            case "progress":
                self._count(backup, event["devices"])
            case "error":
                backup.errmsg = backup.errmsg or str(event["text"])
        if event["event"] == backup.starts_with:
            backup.at_instant = True
        if not backup.started and backup.at_instant and backup.uuid:
            return self._start(backup, now)
        if (
            backup.started
            and event["event"] == "progress"
            and now.clock_s >= backup.next_progress_s
        ):
            backup.next_progress_s = now.clock_s + PROGRESS_S
            return [Told("BACKUP_PROGRESS", {"uuid": backup.uuid, **backup.counts()})]
        return []

    def cancel(self) -> None:
        """Whoever carries it out has been told to stop, or will be, if anything runs."""
        if self._running is not None and not self._running.errmsg:
            self._running.canceled = True
            self._running.errmsg = CANCELED

    def end(self, verdict: str, now: Moment) -> list[Outcome]:
        """The coordinator has ended; `verdict` says what went wrong, and is empty when all is well."""
        backup = self._running
        if backup is None:
            return []
        self._running = None
        if verdict:
            backup.errmsg = backup.errmsg or verdict
        else:
            # Too late to cancel, and whatever was said on the way: it is stored.
            backup.errmsg, backup.canceled = "", False
            backup.transferred = backup.total
        if not backup.started and backup.errmsg:
            return [Rejected(QmpError(backup.errmsg))]
        first = [] if backup.started else self._start(backup, now)
        backup.end_time_s = max(int(now.wall_s), backup.start_time_s)
        name = "BACKUP_COMPLETED"
        if backup.errmsg:
            # By whomever: `vmapipe cancel` may have done it, too.
            name = "BACKUP_CANCELLED" if backup.errmsg == CANCELED else "BACKUP_FAILED"
        return [*first, Told(name, backup.status())]

    def refuse(self, error: QmpError) -> list[Outcome]:
        """It has come to nothing before there was a coordinator."""
        backup, self._running = self._running, None
        if backup is None:
            return []
        return [Rejected(QmpError(backup.errmsg) if backup.canceled else error)]

    def status(self) -> dict[str, Any]:
        """The answer to `query-backup`: of the last one that has started; {}: there was none."""
        return self._shown.status() if self._shown else {}

    def _start(self, backup: _Backup, now: Moment) -> list[Outcome]:
        backup.started = True
        backup.start_time_s = int(now.wall_s)
        backup.next_progress_s = now.clock_s + PROGRESS_S
        self._shown = backup
        return [Accepted(backup.uuid), Told("BACKUP_STARTED", backup.status())]

    @staticmethod
    def _count(backup: _Backup, devices: list[dict[str, Any]]) -> None:
        backup.transferred = sum(device.get("done_bytes", 0) for device in devices)
        # A memory's size is an estimate, and may be exceeded.
        backup.total = max(backup.transferred, sum(device["bytes"] for device in devices))
        backup.zero_bytes = sum(device.get("zero_bytes", 0) for device in devices)
