# SPDX-License-Identifier: Apache-2.0
"""A guest agent that the test plays: what it was asked, and answers that are not as they should be."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

from tests.machine import LIMIT_S


class Agent(threading.Thread):
    """What qemu-ga does, as far as a backup sees it; one client after the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self._frozen = False
        self.commands: list[str] = []
        self.thawed = threading.Event()
        #: Answers that are not as they should be, by command: objects, or bytes as they are; with a
        #: number as well, the first so many times only.
        self.answers: dict[str, Any] = {}
        self.odd_times: dict[str, int] = {}
        #: A command that is never answered.
        self.silent = ""
        #: It has come.
        self.is_silent = threading.Event()
        #: What an earlier client has left in the channel.
        self.left_over = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def is_frozen(self) -> bool:
        return self._frozen

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(ConnectionError):
                client.sendall(self.left_over)
                for line in client.makefile("rb"):
                    self._do(client, line)

    def _do(self, client: socket.socket, line: bytes) -> None:
        request = json.loads(line.rpartition(b"\xff")[2])
        command = request["execute"]
        self.commands.append(command)
        answer: Any = {"return": 1}
        prefix = b""
        if command == "guest-sync-delimited":
            answer, prefix = {"return": request["arguments"]["id"]}, b"\xff"
        if command == self.silent:
            self.is_silent.set()
            return
        if command == "guest-fsfreeze-freeze":
            self._frozen = True
        is_odd = command in self.answers and self.odd_times.get(command, 1 << 30) > 0
        if is_odd:
            answer = self.answers[command]
            if command in self.odd_times:
                self.odd_times[command] -= 1
        elif command == "guest-fsfreeze-thaw":
            self._frozen = False
            self.thawed.set()
        if isinstance(answer, bytes):
            client.sendall(answer)
        else:
            client.sendall(prefix + json.dumps(answer).encode() + b"\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join(LIMIT_S)
        self._listener.close()
