# SPDX-License-Identifier: Apache-2.0
"""The clients of a QMP server, in the loop of the process that serves them."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Mapping

from vmapipe.control.monitor.qmp import Command, QmpServer
from vmapipe.control.monitor.sockets import Listener
from vmapipe.runtime.cancel import Cancel

_MAX_CLIENTS = 64
_RECEIVE_BYTES = 1 << 16


class Clients:
    """Who speaks QMP to us. Answers are short and made at once. Owns the listener."""

    def __init__(self, listener: Listener, commands: Mapping[str, Command]) -> None:
        self._listener = listener
        self._commands = commands
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener.socket, selectors.EVENT_READ)
        self._sessions: dict[socket.socket, QmpServer] = {}

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """Readable when `serve` has something to do."""
        fd: int = self._selector.fileno()
        return fd

    def close(self) -> None:
        for sock in list(self._sessions):
            self._drop(sock)
        self._selector.close()
        self._listener.close()

    def watch(self, cancel: Cancel) -> None:
        """Let `serve` also end when a stop is asked for."""
        self._selector.register(cancel.fd, selectors.EVENT_READ)

    def serve(self, timeout_s: float) -> None:
        """Whatever comes within `timeout_s`."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener.socket:
                self._accept()
            elif isinstance(key.fileobj, socket.socket):
                self._hear(key.fileobj)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.socket.accept()
            if len(self._sessions) >= _MAX_CLIENTS:
                sock.close()
                return
            # A client that does not read its answers is dropped, not waited for.
            sock.setblocking(False)
            # Imported here: it takes as long as all the rest of a backup's start.
            from vmapipe.control.main import program_version

            session = QmpServer(self._commands, program_version())
            self._sessions[sock] = session
            self._selector.register(sock, selectors.EVENT_READ)
            self._send(sock, session.greeting())

    def _hear(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        session = self._sessions[sock]
        if not data:
            self._drop(sock)
            return
        self._send(sock, session.feed(data))
        if session.closed and sock in self._sessions:
            self._drop(sock)

    def _send(self, sock: socket.socket, data: bytes) -> None:
        try:
            if data and sock.send(data) < len(data):
                self._drop(sock)
        except OSError:
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._sessions[sock]
        sock.close()
