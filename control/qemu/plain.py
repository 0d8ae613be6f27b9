# SPDX-License-Identifier: Apache-2.0
"""A QMP connection that blocks: for the guardian, and for a moment's question to whomever."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from vmapipe.control.qemu.qmp import (
    ANSWER_S,
    GREETING_S,
    Command,
    QmpGone,
    QmpRefused,
    hung_up,
    no_greeting,
    not_reached,
)
from vmapipe.runtime.errors import os_error_text

# query-named-block-nodes of a machine with 254 disks has some 500 KiB.
_MAX_LINE_BYTES = 16 << 20


class Peer:
    """Who is at the other end: how long he may take, and how his failures are told. Here: QEMU."""

    greeting_s = GREETING_S
    answer_s = ANSWER_S

    def not_reached(self, path: str, why: str) -> QmpGone:
        return not_reached(path, why)

    def no_greeting(self, path: str) -> QmpGone:
        return no_greeting(path)

    def no_qmp(self, path: str, said: bytes) -> QmpGone:
        """He began with what is no QMP."""
        return self.not_reached(path, "what answers there is no QMP monitor")

    def no_answer(self, path: str) -> QmpGone:
        return hung_up(path)

    def hung_up(self, path: str) -> QmpGone:
        return hung_up(path)


_QEMU = Peer()


class PlainQmp:
    """Connected from the start until `close`; events are passed over. Raises QmpGone."""

    def __init__(self, path: str, peer: Peer = _QEMU) -> None:
        self.path = path
        self._peer = peer
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(peer.greeting_s)
            try:
                self._socket.connect(path)
            except OSError as error:
                raise peer.not_reached(path, os_error_text(error)) from error
            self._greet()
            self.execute(Command("qmp_capabilities", {}))
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: Command) -> Any:
        """Raises QmpRefused, QmpGone."""
        deadline = time.monotonic() + self._peer.answer_s
        request = {"execute": command.name, "arguments": dict(command.arguments)}
        try:
            self._socket.settimeout(self._peer.answer_s)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while True:
                message = self._message(deadline)
                if "return" in message:
                    return message["return"]
                if "error" in message:
                    raise QmpRefused(str(message["error"].get("desc", "refused")))
        except TimeoutError as error:
            raise self._peer.no_answer(self.path) from error
        except OSError as error:
            raise self._peer.hung_up(self.path) from error

    def wait_for_end(self, timeout_s: float) -> bool:
        """Whether the other end has closed by then; whatever it says is passed over."""
        deadline = time.monotonic() + timeout_s
        try:
            while (left := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(1 << 16):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True  # it was killed
        return False

    def close(self) -> None:
        self._socket.close()

    def _greet(self) -> None:
        """Raises QmpGone."""
        try:
            self._message(time.monotonic() + self._peer.greeting_s)
        except TimeoutError as error:
            # Other servers greet, too, and may do so without a line end.
            if self._rest:
                raise self._peer.no_qmp(self.path, self._rest) from error
            raise self._peer.no_greeting(self.path) from error
        except OSError as error:
            raise self._peer.hung_up(self.path) from error

    def _message(self, deadline: float) -> dict[str, Any]:
        """Raises QmpGone, TimeoutError and other OSErrors."""
        while b"\n" not in self._rest:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data or len(self._rest) > _MAX_LINE_BYTES:
                raise self._peer.hung_up(self.path)
            self._rest += data
            if self._rest.lstrip()[:1] not in (b"", b"{"):
                raise self._peer.no_qmp(self.path, self._rest)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise self._peer.no_qmp(self.path, line) from error
        return message if isinstance(message, dict) else {}
