# SPDX-License-Identifier: Apache-2.0
"""What a QMP connection does, and how it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from vmapipe.runtime.errors import Failure

# QEMU answers in milliseconds. A command that first has to see requests of a
# slow disk end (a transaction) may take as long as these.
ANSWER_S = 30.0
# A monitor that serves somebody else takes our connection and says nothing.
GREETING_S = 5.0


class Command(NamedTuple):
    """A QMP command and its arguments."""

    name: str
    arguments: Mapping[str, Any]


class QmpRefused(Failure):
    """QEMU said no; it is as it was before. The text is QEMU's."""


class QmpGone(Failure):
    """QEMU ended, hung up or does not answer."""


class Qmp(Protocol):
    """One connection. `execute` raises QmpRefused, QmpGone."""

    def execute(self, command: Command) -> Any: ...


def no_greeting(path: str) -> QmpGone:
    return QmpGone(
        f"{path}: the QMP monitor does not answer; it serves one client at a time: is another "
        "backup, libvirt or a person connected to it? (give QEMU a second -qmp for backups)"
    )


def not_reached(path: str, why: str) -> QmpGone:
    return QmpGone(f"cannot reach QEMU's monitor at {path}: {why}; is the machine running?")


def hung_up(path: str) -> QmpGone:
    return QmpGone(f"{path}: QEMU has ended or closed its monitor")
