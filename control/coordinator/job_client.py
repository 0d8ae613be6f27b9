# SPDX-License-Identifier: Apache-2.0
"""A connection to the socket of one running backup, for whoever asks it something."""

from __future__ import annotations

from typing import Any

from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone, QmpInvalid, QmpPeer
from vmapipe.control.qmp.reader import SHORT_LIMITS


class _BackupPeer(QmpPeer):
    # A job answers within a second, but not while it waits for QEMU or for a guest's file systems.
    name = "the backup"
    greeting_s = answer_s = 10.0
    limits = SHORT_LIMITS

    def not_reached(self, path: str, why: str) -> QmpGone:
        return QmpGone(f"{path}: {why}; has the backup ended?")

    def no_greeting(self, path: str) -> QmpGone:
        return QmpGone(f"{path}: the backup has not answered for {self.answer_s:.0f} s")

    def no_qmp(self, path: str, said: bytes) -> QmpGone:
        return QmpInvalid(f"{path}: what answers there is not QMP; is it a backup's socket?")

    def not_valid(self, path: str, what: str, why: str) -> QmpGone:
        return QmpInvalid(f"{path}: the {what} is not valid: {why}; is it a backup's socket?")

    def hung_up(self, path: str) -> QmpGone:
        return QmpGone(f"{path}: the backup has just ended")


class JobClient:
    """A connection to one job. Every method raises Failure."""

    def __init__(self, path: str) -> None:
        self._qmp = QmpClient(path, _BackupPeer())

    def __enter__(self) -> JobClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._qmp.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        return self._qmp.execute(Command(command, arguments))

    def wait_for_end(self, timeout_s: float) -> bool:
        """Tell whether the job has ended, and closed its end, by then."""
        return self._qmp.wait_for_end(timeout_s)
