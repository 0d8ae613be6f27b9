# SPDX-License-Identifier: Apache-2.0
"""The state of a monitor's backups, one at a time. Pure.

A coordinator's events in; status, answers and QMP events out. The members are
those of the RFC's BackupStatus, which a running backup's own socket answers, too.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vmapipe.control.qmp.server import QmpError
from vmapipe.runtime.events import Event
from vmapipe.runtime.text import one_line


@dataclass
class BackupStatus:
    """Times are seconds since 1970; `archive` is called as its user called it."""

    archive: str
    started: float = 0.0
    #: In hex; empty until the archive's header is written.
    uuid: str = ""
    #: The first error.
    errmsg: str = ""
    #: 0: it is running.
    ended: float = 0.0
    total_bytes: int = 0
    done_bytes: int = 0
    zero_bytes: int = 0

    @property
    def status(self) -> str:
        if not self.ended:
            return "active"
        return "error" if self.errmsg else "done"

    def take(self, event: Event, now: float) -> None:
        """Take an event of the backup's coordinator into account."""
        match event["event"]:
            case "begun":
                self.uuid = event["uuid"]
                self._count(event["devices"])
            case "progress" if "devices" in event:
                self._count(event["devices"])

    def fail(self, reason: str, now: float) -> None:
        """Record a failure, unless it has ended already."""
        if not self.ended:
            self.errmsg = self.errmsg or one_line(reason)
            self.ended = max(now, self.started)

    def succeed(self, now: float) -> None:
        """Record success, whatever was reported on the way."""
        self.errmsg = ""
        self.done_bytes = self.total_bytes
        self.ended = max(now, self.started)

    def members(self) -> dict[str, Any]:
        """The answer to `query-backup`; what is not known yet is left out."""
        members: dict[str, Any] = {"status": self.status}
        if members["status"] == "error":
            members["errmsg"] = self.errmsg
        members |= self.counts()
        members["start-time"] = int(self.started)
        if self.ended:
            members["end-time"] = int(self.ended)
        members["backupfile"] = self.archive
        if self.uuid:
            members["uuid"] = str(uuid.UUID(self.uuid))
        return members

    def counts(self) -> dict[str, int]:
        return {
            "total": self.total_bytes,
            "transferred": self.done_bytes,
            "zero-bytes": self.zero_bytes,
        }

    def _count(self, devices: Sequence[Mapping[str, Any]]) -> None:
        self.done_bytes = sum(device.get("done_bytes", 0) for device in devices)
        # A memory's size is an estimate, and may be exceeded.
        self.total_bytes = max(self.done_bytes, sum(device["bytes"] for device in devices))
        self.zero_bytes = sum(device.get("zero_bytes", 0) for device in devices)


CANCELED = "backup canceled"
# A client draws a bar from them; more would only be work.
PROGRESS_S = 1.0


class Moment(NamedTuple):
    """Now: seconds since 1970, and by a clock that only goes forward."""

    wall_s: float
    clock_s: float


class QmpEvent(NamedTuple):
    """A QMP event for all clients."""

    name: str
    data: dict[str, Any]


class Accepted(NamedTuple):
    """The command `backup` is answered."""

    uuid: str


class Rejected(NamedTuple):
    """The command `backup` is refused; the status stays what it was."""

    error: QmpError


Outcome = QmpEvent | Accepted | Rejected

EVENTS = (
    "BACKUP_CANCELLED",
    "BACKUP_COMPLETED",
    "BACKUP_FAILED",
    "BACKUP_PROGRESS",
    "BACKUP_STARTED",
)


@dataclass
class _Backup(BackupStatus):
    """A backup and its state. `starts_with`: the event at which the archive's instant is behind us."""

    starts_with: str = ""
    canceled: bool = False
    at_instant: bool = False
    next_progress_s: float = 0.0


class Backups:
    """A monitor's backups.

    In this order: `begin`, `handle_event` …, `end` or `refuse`; `cancel` and `status` at any time.
    """

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
        """Begin a backup; the answer comes with an outcome. Raises QmpError when one is running.

        Where the machine's memory is saved, too, the instant may be minutes away:
        then the answer does not wait for it.
        """
        if self._running is not None:
            raise QmpError("previous backup not finished")
        self._running = _Backup(file, starts_with="begun" if with_state else "instant")

    def handle_event(self, event: Event, now: Moment) -> list[Outcome]:
        """Take an event of the coordinator; return what follows from it."""
        backup = self._running
        if backup is None:
            return []
        backup.take(event, now.wall_s)
        if event["event"] == "error":
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
            return [QmpEvent("BACKUP_PROGRESS", {"uuid": _name(backup), **backup.counts()})]
        return []

    def cancel(self) -> None:
        """Record that the running backup is being cancelled."""
        if self._running is not None and not self._running.errmsg:
            self._running.canceled = True
            self._running.errmsg = CANCELED

    def end(self, verdict: str, now: Moment) -> list[Outcome]:
        """The coordinator has ended; `verdict` says what went wrong, and is empty when all is well."""
        backup = self._running
        if backup is None:
            return []
        self._running = None
        if verdict and not backup.started:
            return [Rejected(QmpError(backup.errmsg or verdict))]
        first = [] if backup.started else self._start(backup, now)
        if verdict:
            backup.fail(verdict, now.wall_s)
            # By whomever: `vmapipe cancel` may have done it, too.
            name = "BACKUP_CANCELLED" if backup.errmsg == CANCELED else "BACKUP_FAILED"
        else:
            # Also when it was cancelled too late.
            backup.succeed(now.wall_s)
            name = "BACKUP_COMPLETED"
        return [*first, QmpEvent(name, backup.members())]

    def refuse(self, error: QmpError) -> list[Outcome]:
        """End a backup that failed before there was a coordinator."""
        backup, self._running = self._running, None
        if backup is None:
            return []
        return [Rejected(QmpError(backup.errmsg) if backup.canceled else error)]

    def status(self) -> dict[str, Any]:
        """The answer to `query-backup`: of the last one that has started; {}: there was none."""
        return self._shown.members() if self._shown else {}

    def _start(self, backup: _Backup, now: Moment) -> list[Outcome]:
        backup.started = now.wall_s
        backup.next_progress_s = now.clock_s + PROGRESS_S
        self._shown = backup
        return [Accepted(_name(backup)), QmpEvent("BACKUP_STARTED", backup.members())]


def _name(backup: _Backup) -> str:
    return str(backup.members().get("uuid", ""))
