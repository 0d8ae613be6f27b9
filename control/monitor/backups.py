# SPDX-License-Identifier: Apache-2.0
"""The state of a monitor's backups, one at a time. Pure.

A coordinator's events in; status, answers and QMP events out. The members are
those of the RFC's BackupStatus, which a running backup's own socket answers, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vmapipe.control.qmp.backup_status import BackupStatus
from vmapipe.control.qmp.server import QmpError
from vmapipe.runtime.events import Event

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


class _Backup(BackupStatus):
    """A backup and its state. `starts_with`: the event at which the archive's instant is behind us."""

    def __init__(self, archive: str, starts_with: str) -> None:
        super().__init__(archive)
        self.starts_with = starts_with
        self.canceled = False
        self.at_instant = False
        self.next_progress_s = 0.0


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
        self._running = _Backup(file, "begun" if with_state else "instant")

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
