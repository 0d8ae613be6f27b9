# SPDX-License-Identifier: Apache-2.0
"""Asks a monitor which disks it serves."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, Peer, QmpGone, QmpInvalid, QmpRefused
from vmapipe.control.qmp.reader import SHORT_LIMITS
from vmapipe.runtime.errors import Failure

# How an NBD server begins.
_NBD_GREETING = b"NBDMAGIC"


class _Monitor(Peer):
    name = "the monitor"
    greeting_s = 10.0
    limits = SHORT_LIMITS

    def not_reached(self, path: str, why: str) -> QmpGone:
        return QmpGone(f"cannot ask the monitor at {path}: {why}; is it running?")

    def no_greeting(self, path: str) -> QmpGone:
        return QmpGone(
            f"{path}: nobody greets us within {self.greeting_s:.0f} s; is this a monitor's socket?"
        )

    def no_qmp(self, path: str, said: bytes) -> QmpGone:
        if said.startswith(_NBD_GREETING):
            return QmpInvalid(
                f"{path} is an export's socket; --monitor wants the monitor's own (--listen)"
            )
        return QmpInvalid(f"{path}: what answers there is not QMP; is this a monitor's socket?")

    def not_valid(self, path: str, what: str, why: str) -> QmpGone:
        return QmpInvalid(f"{path}: the {what} is not valid: {why}; is this a monitor's socket?")

    def hung_up(self, path: str) -> QmpGone:
        return QmpGone(f"{path}: no monitor answers there, or it has too many clients")


class GuardedDisk(NamedTuple):
    """A disk that a monitor serves; `guard` is the control socket of its guard."""

    name: str
    size_bytes: int
    guard: str


def guarded_disks(monitor: str) -> list[GuardedDisk]:
    """Raises Failure."""
    try:
        qmp = QmpClient(monitor, _Monitor())
        try:
            answer = qmp.execute(Command("query-disks", {}))
        finally:
            qmp.close()
        return [GuardedDisk(disk["name"], disk["size"], disk["guard"]) for disk in answer]
    except QmpRefused as error:
        raise Failure(f"{monitor}: {error}; is it a vmapipe monitor that serves disks?") from error
