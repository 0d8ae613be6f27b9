# SPDX-License-Identifier: Apache-2.0
"""A wire between a backup and QEMU's monitor that a test can cut, while QEMU runs on."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

from tests.machine import LIMIT_S
from vmapipe.runtime.syscalls import readable


class Wire(threading.Thread):
    """Stands between a backup and QEMU's monitor; `cut` closes what is connected, once."""

    def __init__(self, path: Path, monitor: Path) -> None:
        super().__init__(daemon=True)
        self._monitor = str(monitor)
        self._cut = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def cut(self) -> None:
        self._cut.set()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                with ours, socket.socket(socket.AF_UNIX) as theirs:
                    theirs.connect(self._monitor)
                    self._carry({ours: theirs, theirs: ours})

    def _carry(self, other: dict[socket.socket, socket.socket]) -> None:
        while True:
            ready = readable([end.fileno() for end in other], 0.01)
            if self._cut.is_set():
                self._cut.clear()
                return
            for end in (end for end in other if end.fileno() in ready):
                data = end.recv(65536)
                if not data:
                    return
                other[end].sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join(LIMIT_S)
        self._listener.close()
