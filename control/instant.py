# SPDX-License-Identifier: Apache-2.0
"""One instant for all disks of a backup: hold the writes of all, begin everywhere, let go.

While every disk is held no write is under way anywhere. Whatever was
acknowledged before is on all disks, and whatever comes after finds the backup
begun on all of them: it does not matter that they are let go one by one.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.protocol import limits
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.guarding import (
    MAX_PACKET_BYTES,
    Begin,
    Begun,
    FromGuard,
    Held,
    Hold,
    Refused,
    ToGuard,
    decode_from_guard,
    encode,
)
from vmapipe.runtime.errors import Failure, os_error_text

# A guard gives up holding after 5 s; a little longer, so that it says why.
_ANSWER_S = 6.0


class Instant(NamedTuple):
    """For how long a guest's writes, or the guest itself, stood still for the instant.

    `how` its memory was saved; empty: it was not.
    """

    how: str
    seconds: float


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
            _say(names, sock, Begin())
        for names, sock in connections:
            _expect(names, sock, Begun)
    return time.monotonic() - started


def _say(names: str, sock: socket.socket, message: ToGuard) -> None:
    with _naming(names):
        sock.send(encode(message))


def _expect(names: str, sock: socket.socket, kind: type[FromGuard]) -> None:
    with _naming(names):
        packet = sock.recv(MAX_PACKET_BYTES)
        message = decode_from_guard(packet) if packet else None
    if isinstance(message, Refused):
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
