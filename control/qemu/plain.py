# SPDX-License-Identifier: Apache-2.0
"""A QMP connection for the guardian, and for a moment's question: a blocking socket and JSON."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from vmapipe.control.qemu.qmp import (
    ANSWER_S,
    GREETING_S,
    Command,
    QmpRefused,
    hung_up,
    no_greeting,
    not_reached,
)
from vmapipe.runtime.errors import os_error_text

# query-named-block-nodes of a machine with 254 disks has some 500 KiB.
_MAX_LINE_BYTES = 16 << 20


class PlainQmp:
    """Connected from the start until `close`; events are passed over. Raises QmpGone."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(GREETING_S)
            try:
                self._socket.connect(path)
            except OSError as error:
                raise not_reached(path, os_error_text(error)) from error
            try:
                self._message(time.monotonic() + GREETING_S)
            except TimeoutError as error:
                raise no_greeting(path) from error
            self.execute(Command("qmp_capabilities", {}))
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: Command) -> Any:
        """Raises QmpRefused, QmpGone."""
        deadline = time.monotonic() + ANSWER_S
        request = {"execute": command.name, "arguments": dict(command.arguments)}
        try:
            self._socket.settimeout(ANSWER_S)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while True:
                message = self._message(deadline)
                if "return" in message:
                    return message["return"]
                if "error" in message:
                    raise QmpRefused(str(message["error"].get("desc", "refused")))
        except OSError as error:
            raise hung_up(self.path) from error

    def close(self) -> None:
        self._socket.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        """Raises QmpGone, TimeoutError and other OSErrors."""
        while b"\n" not in self._rest:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data or len(self._rest) > _MAX_LINE_BYTES:
                raise hung_up(self.path)
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise not_reached(self.path, "what answers there is no QMP monitor") from error
        return message if isinstance(message, dict) else {}
