# SPDX-License-Identifier: Apache-2.0
"""The interface of a QMP connection: commands, errors, and what the two kinds of clients have in
common.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from vmapipe.control.qmp.reader import QMP_LIMITS, JsonLimits
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.text import one_line

# QEMU answers in milliseconds. A command that first has to see requests of a
# slow disk end (a transaction) may take as long as these.
ANSWER_S = 30.0
# A monitor that serves another client takes our connection and says nothing.
GREETING_S = 5.0
# QEMU's longest reasons name a node and a file; what a hostile one says has any length.
_WORDS_CHARS = 1000
# The first bytes of other servers that may be at a socket.
_NBD = b"NBDMAGIC"
_HUMAN_MONITOR = b"QEMU "


#: An answer of QEMU, or an object in it, whose shape has been checked.
Answer = Mapping[str, Any]


class Command(NamedTuple):
    """A QMP command and its arguments."""

    name: str
    arguments: Mapping[str, Any]


class QmpRefused(Failure):
    """QEMU refused a command and changed nothing. The text is QEMU's."""


class QmpGone(Failure):
    """QEMU ended, hung up or does not answer."""


class QmpInvalid(QmpGone):
    """The peer sent something that is not valid; the connection is not used any more."""


class Qmp(Protocol):
    """A connection that executes commands. Raises QmpRefused, QmpGone."""

    def execute(self, command: Command) -> Any: ...


def ask_if_known(qmp: Qmp, name: str, **arguments: str) -> Any:
    """Execute a command; None where this QEMU (an old one, a storage daemon) does not know it."""
    try:
        return qmp.execute(Command(name, arguments))
    except QmpRefused:
        return None


class QmpLink(Qmp, Protocol):
    """A connection to QEMU for as long as a backup takes; all but `close` raise QmpGone, too."""

    @property
    def path(self) -> str:
        """The address of its monitor, for messages."""

    @property
    def peer_pid(self) -> int | None:
        """The process at the other end, or the one that made its socket; None: not known."""

    @property
    def is_shared(self) -> bool:
        """True when events are missed, so that a caller has to poll."""

    @property
    def fd(self) -> int:
        """Readable when `events` has something to tell."""

    def events(self) -> list[dict[str, Any]]:
        """Return the events since the last call, in order."""

    def give_fd(self, fd: int, name: str) -> None:
        """QEMU gets a copy of a descriptor, under this name."""

    def add_fd(self, fd: int) -> int:
        """QEMU gets a copy of a descriptor: N, which it opens as /dev/fdset/N."""

    def close(self) -> None: ...


class QmpPeer:
    """Timeouts, limits and error messages for a peer; the defaults are QEMU's."""

    name = "QEMU"
    greeting_s = GREETING_S
    answer_s = ANSWER_S
    limits: JsonLimits = QMP_LIMITS

    def not_reached(self, path: str, why: str) -> QmpGone:
        way_out = (
            "run it as root, or as the user that QEMU runs as"
            if why == os.strerror(errno.EACCES)
            else "is the machine running?"
        )
        return QmpGone(f"cannot reach QEMU's monitor at {path}: {why}; {way_out}")

    def no_greeting(self, path: str) -> QmpGone:
        return QmpGone(
            f"{path}: the QMP monitor does not answer; it serves one client at a time: is another "
            "backup, libvirt or a person connected to it? (give QEMU a second -qmp for backups, or "
            "say --qmp-share where the others connect for a moment only)"
        )

    def no_qmp(self, path: str, said: bytes) -> QmpGone:
        """Return the error for a peer that does not begin with QMP."""
        if said.startswith(_HUMAN_MONITOR) and b"monitor" in said:
            return QmpInvalid(
                f"{path} is a human monitor (-monitor); --qmp wants a QMP monitor: start QEMU "
                "with -qmp unix:PATH,server=on,wait=off, too"
            )
        if said.startswith(_NBD):
            return QmpInvalid(
                f"{path} is an NBD export's socket; --qmp wants the QMP monitor's (QEMU: -qmp)"
            )
        return QmpInvalid(
            f"cannot reach QEMU's monitor at {path}: what answers there is not a QMP monitor: it "
            f"begins with `{one_line(said[:60].decode(errors='replace'))}`"
        )

    def no_answer(self, path: str, command: str) -> QmpGone:
        return QmpGone(f"{path}: {self.name} has not answered {command} for {self.answer_s:.0f} s")

    def hung_up(self, path: str) -> QmpGone:
        return QmpGone(f"{path}: QEMU has ended or closed its monitor")

    def not_valid(self, path: str, what: str, why: str) -> QmpGone:
        """Return the error for `what` (an event, an answer to …) that is not valid, and `why`."""
        return QmpInvalid(f"{path}: {self.name}'s {what} is not valid: {why}")

    def refused(self, command: str, words: str) -> QmpRefused:
        return QmpRefused(one_line(words, _WORDS_CHARS))
