# SPDX-License-Identifier: Apache-2.0
"""The processes of a monitor's backups: each is a `vmapipe backup` of its own.

So nothing of a backup happens in the process that owns the guards, and whatever
becomes of a backup, they do not notice.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.control.monitor.backups import Accepted, Backups, Moment, Outcome, QmpEvent, Rejected
from vmapipe.control.qmp.server import DeferredAnswer, QmpError
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.events import speed_command
from vmapipe.runtime.syscalls import readable

# A backup that is told to stop gives its own processes 10 s, and a QEMU that is
# slow to end its jobs 60 s. After that it is killed: then its guardian goes on.
_STOP_S = 90.0
_NAME = "the backup process"


class BackupRequest(NamedTuple):
    """A backup to run: `file` as the client spelled it; `argv` and descriptors for the process."""

    file: str
    argv: Sequence[str]
    fds: Sequence[int] = ()


class BackupRunner:
    """Runs one backup at a time. `fd` is readable when `poll` has something to do."""

    def __init__(self) -> None:
        #: Sends a QMP event to all clients.
        self.send_event: Callable[[str, Mapping[str, Any]], None] = lambda name, data: None
        self._backups = Backups()
        self._children = Children()
        self._child: Child | None = None
        self._started: DeferredAnswer | None = None
        self._cancels: list[DeferredAnswer] = []
        self._kill_at = float("inf")

    @property
    def fd(self) -> int:
        return self._children.fd

    @property
    def busy(self) -> bool:
        return self._backups.busy

    def status(self) -> dict[str, Any]:
        return self._backups.status()

    def begin(self, file: str, *, with_state: bool) -> DeferredAnswer:
        """Reserve the one place; `start` or `give_up` follow. Raises QmpError."""
        self._backups.begin(file, with_state=with_state)
        self._started = DeferredAnswer()
        return self._started

    def start(self, request: BackupRequest) -> None:
        """The request's descriptors are closed here. Never raises."""
        try:
            if self._backups.canceled:
                self.give_up(QmpError("backup canceled"))
                return
            self._child = self._children.start(
                _NAME, "vmapipe.control.cli.backup", request.argv, request.fds
            )
        except (OSError, ValueError) as error:
            # No memory for it, too many descriptors; a name that no file can have.
            why = os_error_text(error) if isinstance(error, OSError) else str(error)
            self.give_up(QmpError(f"cannot start {_NAME}: {why}"))
        finally:
            for fd in request.fds:
                os.close(fd)

    def give_up(self, error: QmpError) -> None:
        self._carry_out(self._backups.refuse(error))
        self._answer_cancels()

    def cancel(self) -> DeferredAnswer:
        """Answered when nothing runs any more: at once, if nothing does."""
        over = DeferredAnswer()
        if not self.busy:
            over.answer({})
            return over
        self._cancels.append(over)
        self._backups.cancel()
        self._stop()
        return over

    def set_speed(self, bytes_per_s: int) -> None:
        """Change the speed of the running backup."""
        if self._child is not None:
            self._child.tell(speed_command(bytes_per_s))

    def poll(self) -> None:
        """Process what the backup has reported. Never raises for that."""
        child = self._child
        if child is None:
            return
        if time.monotonic() > self._kill_at:
            child.send_signal(signal.SIGKILL)
        try:
            happened = self._children.wait(0)
            for _, event in happened:
                if event is not None:
                    self._carry_out(self._backups.handle_event(event, _now()))
        except (AttributeError, LookupError, TypeError, ValueError):
            # It is not what it was, or has gone mad: it must not take us with it.
            child.error = child.error or f"{_NAME} tells what makes no sense"
            child.send_signal(signal.SIGKILL)
            return
        if not child.running:
            self._child, self._kill_at = None, float("inf")
            self._children.all.remove(child)
            self._carry_out(self._backups.end(child.verdict(), _now()))
            self._answer_cancels()

    def close(self) -> None:
        """End the one that runs, in order, within a bound."""
        if self._child is not None:
            self._backups.cancel()
            self._stop()
        while self._child is not None:
            readable([self.fd], 1.0)
            self.poll()
        with self._children:
            pass  # none is left; what it holds is closed

    def _stop(self) -> None:
        if self._child is not None and self._child.running:
            self._child.send_signal(signal.SIGTERM)
            self._kill_at = min(self._kill_at, time.monotonic() + _STOP_S)

    def _answer_cancels(self) -> None:
        """Answer all `backup-cancel`: nothing runs any more."""
        waiting, self._cancels = self._cancels, []
        for over in waiting:
            over.answer({})

    def _carry_out(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case QmpEvent(name, data):
                    self.send_event(name, data)
                case Accepted(uuid) if self._started:
                    self._started.answer(uuid)
                case Rejected(error) if self._started:
                    self._started.refuse(error)


def _now() -> Moment:
    return Moment(time.time(), time.monotonic())
