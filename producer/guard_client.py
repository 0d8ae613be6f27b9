# SPDX-License-Identifier: Apache-2.0
"""The producer's end of the connection to a guard: claims, and what was saved for it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence

from vmapipe.protocol.guard import (
    MAX_PACKET_BYTES,
    Attached,
    Claim,
    FromGuard,
    GuardAskFelt,
    GuardAttach,
    GuardCopied,
    GuardFailed,
    GuardRefused,
    GuardRelease,
    ToGuard,
    decode_from_guard,
    encode,
)
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.logs import TRACE, Trace, shown
from vmapipe.runtime.syscalls import receive_fds

_log = Trace(__name__)

# A guard answers at once; only one that was stopped or hangs does not.
_ANSWER_S = 10.0
_AT_ONCE = int(socket.MSG_DONTWAIT)  # see descriptors.py


class GuardClient:
    """An attached backup. Every method raises Failure when the guard refuses or is gone."""

    def __init__(self, name: str, path: str, attach: GuardAttach, fds: Sequence[int]) -> None:
        self._name = name
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(_ANSWER_S)
            try:
                self._socket.connect(path)
                socket.send_fds(self._socket, [encode(attach)], fds)
                message, received = self._packet()
            except OSError as error:
                raise Failure(
                    f"disk {name!r}: cannot reach its guard at {path}: {os_error_text(error)}; "
                    "is the monitor still running?"
                ) from error
            if not isinstance(message, Attached) or len(received) != 1:
                raise Failure(f"disk {name!r}: its guard answers out of turn")
            # Blocking again, because with a timeout MSG_DONTWAIT would wait; but not for ever.
            self._socket.settimeout(None)
            limit = struct.pack("ll", int(_ANSWER_S), 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            #: The disk's size in bytes, and a descriptor to read it by.
            self.size_bytes = message.size_bytes
            self.disk_fd = received[0]
        except BaseException:
            self._socket.close()
            raise

    @property
    def fd(self) -> int:
        """A descriptor that is readable when there is a message."""
        return self._socket.fileno()

    def receive(self) -> FromGuard | None:
        """A message, or None when there is none now."""
        try:
            return self._packet(_AT_ONCE)[0]
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._gone() from error

    def claim(self, most: int) -> None:
        self._send(Claim(most))

    def copied(self, clusters: int) -> None:
        self._send(GuardCopied(clusters))

    def release(self, slots: Sequence[int]) -> None:
        self._send(GuardRelease(tuple(slots)))

    def ask_felt(self, bound_s: float) -> None:
        """Ask what guests have felt; a GuardFelt answers."""
        self._send(GuardAskFelt(max(1, round(bound_s * 1e6))))

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            os.close(self.disk_fd)
            self._socket.close()

    def _send(self, message: ToGuard) -> None:
        if _log.has(TRACE):
            _log.log(TRACE, "%s to the guard: %s", self._name, shown(message))
        try:
            self._socket.send(encode(message))
        except OSError as error:
            raise self._gone() from error

    def _packet(self, flags: int = 0) -> tuple[FromGuard, list[int]]:
        packet, fds = receive_fds(self._socket, MAX_PACKET_BYTES, 1, flags)
        if not packet:
            raise self._gone()
        message = decode_from_guard(packet)
        if _log.has(TRACE):
            _log.log(TRACE, "%s from the guard: %s", self._name, shown(message))
        if isinstance(message, GuardRefused | GuardFailed):
            raise Failure(message.reason)
        return message, fds

    def _gone(self) -> Failure:
        return Failure(
            f"disk {self._name!r}: its guard is gone or does not answer; "
            "if the monitor was ended, start it and the backup again"
        )
