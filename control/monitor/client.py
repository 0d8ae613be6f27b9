# SPDX-License-Identifier: Apache-2.0
"""The client's side of a monitor: its disks, and one instant for all of them.

For the instant the writes of all disks are held, the backup begins on all, then all are released.
While every disk is held no write is under way anywhere. Whatever was acknowledged before is on all
disks, and whatever comes after finds the backup begun on all of them: it does not matter that they
are released one by one.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone, QmpInvalid, QmpPeer, QmpRefused
from vmapipe.control.qmp.reader import SHORT_LIMITS
from vmapipe.protocol import limits
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.guard import (
    MAX_PACKET_BYTES,
    FromGuard,
    GuardBegin,
    GuardBegun,
    GuardRefused,
    Held,
    Hold,
    ToGuard,
    decode_from_guard,
    encode,
)
from vmapipe.runtime.errors import Failure, os_error_text

# How an NBD server begins.
_NBD_GREETING = b"NBDMAGIC"


class _Monitor(QmpPeer):
    name = "the monitor"
    greeting_s = 10.0
    limits = SHORT_LIMITS

    def not_reached(self, path: str, why: str) -> QmpGone:
        return QmpGone(f"cannot ask the monitor at {path}: {why}; is it running?")

    def no_greeting(self, path: str) -> QmpGone:
        return QmpGone(
            f"{path}: no greeting came within {self.greeting_s:.0f} s; is this a monitor's socket?"
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
    """Return the disks that a monitor serves. Raises Failure."""
    try:
        qmp = QmpClient(monitor, _Monitor())
        try:
            answer = qmp.execute(Command("query-disks", {}))
        finally:
            qmp.close()
        return [GuardedDisk(disk["name"], disk["size"], disk["guard"]) for disk in answer]
    except QmpRefused as error:
        raise Failure(f"{monitor}: {error}; is it a vmapipe monitor that serves disks?") from error


# A guard gives up holding after 5 s; a little longer, so that it says why.
_ANSWER_S = 6.0


def begin_together(guards: Mapping[str, Sequence[str]], job: bytes) -> float:
    """The disks of each guard (by its control socket) begin; returns for how long they were held.

    Raises Failure; the disks are then served on, as ever.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        connections: list[tuple[str, socket.socket]] = []
        for path, disks in guards.items():
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            names = ", ".join(map(repr, disks))
            connections.append((names, sock))
            sock.settimeout(_ANSWER_S)
            with _naming(names):
                sock.connect(path)
                sock.send(encode(Hold(limits.VERSION, job, tuple(disks))))
        for names, sock in connections:
            _expect(names, sock, Held)
        for names, sock in connections:
            _say(names, sock, GuardBegin())
        for names, sock in connections:
            _expect(names, sock, GuardBegun)
    return time.monotonic() - started


def _say(names: str, sock: socket.socket, message: ToGuard) -> None:
    with _naming(names):
        sock.send(encode(message))


def _expect(names: str, sock: socket.socket, kind: type[FromGuard]) -> None:
    with _naming(names):
        packet = sock.recv(MAX_PACKET_BYTES)
        message = decode_from_guard(packet) if packet else None
    if isinstance(message, GuardRefused):
        raise Failure(message.reason)
    if not isinstance(message, kind):
        raise Failure(f"disk {names}: its guard is gone, or answers out of turn")


@contextlib.contextmanager
def _naming(names: str) -> Iterator[None]:
    """Errors of a socket say whose it is."""
    try:
        yield
    except OSError as error:
        raise Failure(
            f"disk {names}: no instant could be found for the backup: {os_error_text(error)}"
        ) from error
    except ProtocolError as error:
        raise Failure(f"disk {names}: {error}") from error
