# SPDX-License-Identifier: Apache-2.0
"""The clients of a QMP server: their connections, commands and events.

The server never waits for a client. What a client does not read is kept for it up to a bound,
then it is dropped; one that says nothing gives way to others.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from vmapipe.control.qmp.server import CommandHandler, QmpError, QmpServer
from vmapipe.control.qmp.sockets import Listener
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.process import program_version
from vmapipe.runtime.syscalls import receive_fds

MAX_CLIENTS = 64
# Some thousand events: a client that is that far behind does not read at all.
MAX_UNREAD_BYTES = 1 << 20
# A client negotiates at once; a port scan never does.
_NEGOTIATE_S = 30.0
# When all places are taken, the client that has been silent for longest, and so long, is dropped.
_IDLE_S = 60.0
_RECEIVE_BYTES = 1 << 16
# Linux passes 253 in one message; `add-fd` needs one.
_MAX_FDS = 16
# Back-off after accept() fails (EMFILE, ENOMEM); the client stays in the listen queue.
_PAUSE_S = 1.0
_WITHOUT_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Client:
    """A client's connection. `fds` are descriptors that came with its commands, oldest first."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.fds: list[int] = []
        self.server = QmpServer({}, "")
        self.unread = b""
        self.connected_at = self.received_at = time.monotonic()

    def take_fd(self) -> int:
        """The descriptor that came with a command; it is the caller's then. Raises QmpError."""
        if not self.fds:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self.fds.pop(0)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.socket.close()


class Clients:
    """Serves `listener`, which it owns. `commands` makes the table of commands of one client."""

    def __init__(
        self,
        listener: Listener,
        commands: Callable[[Client], Mapping[str, CommandHandler]],
        left: Callable[[Client], None] = lambda client: None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Register the listener.

        `left` is called for each client that has gone, `notice` with trouble.
        """
        self._listener = listener
        self._commands = commands
        self._left = left
        self._notice = notice
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener.socket, selectors.EVENT_READ)
        #: Until when no client is accepted; 0: not paused.
        self._paused_until = 0.0
        self._is_told = False
        self._clients: dict[socket.socket, Client] = {}

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
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.close()
        self._listener.close()

    def watch(self, fd: int) -> None:
        """Let `serve` also end when `fd` becomes readable."""
        self._selector.register(fd, selectors.EVENT_READ)

    def serve(self, timeout_s: float) -> None:
        """Process what comes within `timeout_s`."""
        if self._paused_until and time.monotonic() >= self._paused_until:
            self._paused_until = 0.0
            self._selector.register(self._listener.socket, selectors.EVENT_READ)
        for key, ready in self._selector.select(timeout_s):
            if key.fileobj is self._listener.socket:
                self._accept()
            elif isinstance(key.data, Client):
                if ready & selectors.EVENT_READ:
                    self._receive(key.data)
                if ready & selectors.EVENT_WRITE:
                    self._send(key.data, b"")
        self._end_silent()

    def go_on(self) -> None:
        """Answers that were waited for may have come."""
        for client in list(self._clients.values()):
            self._send(client, client.server.go_on())

    def send_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Send an event to all clients that have negotiated."""
        now = time.time()
        for client in list(self._clients.values()):
            self._send(client, client.server.event(name, data, now))

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.socket.accept()
        except OSError as error:
            if error.errno in _WITHOUT_ROOM:
                self._pause(error)
            return
        self._is_told = False
        if len(self._clients) >= MAX_CLIENTS and not self._make_room():
            sock.close()
            return
        sock.setblocking(False)
        client = Client(sock)
        client.server = QmpServer(self._commands(client), program_version())
        self._clients[sock] = client
        self._selector.register(sock, selectors.EVENT_READ, client)
        self._send(client, client.server.greeting())

    def _pause(self, error: OSError) -> None:
        self._selector.unregister(self._listener.socket)
        self._paused_until = time.monotonic() + _PAUSE_S
        if not self._is_told:
            self._is_told = True
            self._notice(f"a client has to wait: {os_error_text(error)}")

    def _make_room(self) -> bool:
        quietest = min(self._clients.values(), key=lambda client: client.received_at)
        if time.monotonic() - quietest.received_at < _IDLE_S:
            return False
        self._drop(quietest)
        return True

    def _end_silent(self) -> None:
        now = time.monotonic()
        for client in list(self._clients.values()):
            if not client.server.negotiated and now - client.connected_at > _NEGOTIATE_S:
                self._drop(client)

    def _receive(self, client: Client) -> None:
        try:
            data, fds = receive_fds(client.socket, _RECEIVE_BYTES, _MAX_FDS)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        client.fds += fds
        while len(client.fds) > _MAX_FDS:
            os.close(client.fds.pop(0))
        if not data:
            self._drop(client)
            return
        client.received_at = time.monotonic()
        self._send(client, client.server.feed(data))
        if client.server.closed:
            self._drop(client)

    def _send(self, client: Client, data: bytes) -> None:
        """Send data; what the client does not read now goes out when it does."""
        if client.socket not in self._clients:
            return
        client.unread += data
        try:
            if client.unread:
                client.unread = client.unread[client.socket.send(client.unread) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.unread) > MAX_UNREAD_BYTES:
            self._drop(client)
            return
        self._watch_for(client)

    def _watch_for(self, client: Client) -> None:
        wanted = selectors.EVENT_READ if client.server.takes_more else 0
        wanted |= selectors.EVENT_WRITE if client.unread else 0
        known = self._selector.get_map().get(client.socket)
        if known is not None and known.events == wanted:
            return
        if known is not None:
            self._selector.unregister(client.socket)
        if wanted:
            self._selector.register(client.socket, wanted, client)

    def _drop(self, client: Client) -> None:
        if self._clients.pop(client.socket, None) is None:
            return
        if client.socket in self._selector.get_map():
            self._selector.unregister(client.socket)
        client.close()
        self._left(client)
