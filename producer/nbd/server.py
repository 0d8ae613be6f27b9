# SPDX-License-Identifier: Apache-2.0
"""Listening sockets, the clients that come to them, and an end to all of it."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmapipe.producer.nbd.backend import Backend
from vmapipe.producer.nbd.connection import Connection
from vmapipe.producer.nbd.workers import Workers
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.export import Export
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import Session

# A client that has not come to an end of its greeting by then is none.
_HANDSHAKE_S = 30.0
# Each costs two threads' stacks and 2 MiB of buffers when busy; nbdcopy and
# QEMU use up to 16 and 1.
MAX_CLIENTS = 128
# What is under way when we are asked to end gets so long: less than our parent
# waits for us (10 s), so that the image is still closed in order.
DRAIN_S = 5.0


# A thread that computes gives way to one that has a request to answer after
# this; the default of 5 ms is what a guest would feel.
_SWITCH_S = 0.0005


def answer_promptly() -> None:
    """For a process whose clients are guests. Call it before it serves."""
    sys.setswitchinterval(_SWITCH_S)


class Offer(NamedTuple):
    """One export and what stands behind it."""

    export: Export
    backend: Backend


class Server:
    """Serves `offers` on every socket of `listeners`, which it owns, until `stop`."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        offers: Sequence[Offer],
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._listeners = listeners
        self._exports = [offer.export for offer in offers]
        self._backends = {offer.export.name: offer.backend for offer in offers}
        self._report = report
        self._workers = Workers("nbd-worker")
        self._lock = threading.Lock()
        self._sockets: dict[threading.Thread, socket.socket] = {}
        self._connections: dict[threading.Thread, Connection] = {}
        self._stopping = False

    def start(self) -> None:
        for listener in self._listeners:
            threading.Thread(
                target=self._accept, args=(listener,), name="nbd-accept", daemon=True
            ).start()

    @property
    def clients(self) -> int:
        with self._lock:
            return len(self._sockets)

    def stop(self) -> None:
        """No new clients and requests; what is under way is finished, within a bound."""
        self.close_intake()
        self.finish(time.monotonic() + DRAIN_S)

    def close_intake(self) -> None:
        """The first half of `stop`."""
        with self._lock:
            self._stopping = True
            connections = list(self._connections.values())
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # ends accept()
            listener.close()
        for connection in connections:
            connection.stop()

    def finish(self, deadline: float) -> None:
        """The second half: whoever is not done then (a client that does not read) is cut off."""
        with self._lock:
            threads = list(self._sockets)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            late = list(self._sockets.values())
        for sock in late:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                if self._stopping:
                    return
                # Out of descriptors or memory: those who are here come first.
                time.sleep(0.1)
                continue
            thread = threading.Thread(
                target=self._serve, args=(sock,), name="nbd-client", daemon=True
            )
            with self._lock:
                welcome = not self._stopping and len(self._sockets) < MAX_CLIENTS
                if welcome:
                    self._sockets[thread] = sock
            if welcome:
                thread.start()
            else:
                sock.close()
                self._report(f"a client was turned away: there are {MAX_CLIENTS} already")

    def _serve(self, sock: socket.socket) -> None:
        thread = threading.current_thread()
        try:
            handshake = NbdServerHandshake(self._exports)
            session = self._shake_hands(sock, handshake)
            if session is not None:
                backend = self._backends[session.export.name]
                connection = Connection(sock, session, backend, self._workers)
                with self._lock:
                    self._connections[thread] = connection
                    if self._stopping:
                        connection.stop()
                connection.serve(handshake.unread)
        except NbdProtocolError as error:
            with contextlib.suppress(OSError):
                sock.sendall(error.unsent)
            self._report(f"a client broke the NBD protocol and was disconnected: {error}")
        except OSError:
            pass  # the client is gone; what it had not been answered was its loss
        finally:
            with self._lock:
                del self._sockets[thread]
                self._connections.pop(thread, None)
            sock.close()

    def _shake_hands(self, sock: socket.socket, handshake: NbdServerHandshake) -> Session | None:
        """None: the client has left. Raises NbdProtocolError, OSError."""
        deadline = time.monotonic() + _HANDSHAKE_S
        if sock.family != socket.AF_UNIX:
            # Requests and replies are small, and the next waits for them.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A host that has vanished is found out in the end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.settimeout(_HANDSHAKE_S)
        sock.sendall(handshake.greeting())
        while handshake.wanted_bytes:
            # One byte every half minute is no handshake either.
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = sock.recv(handshake.wanted_bytes)
            if not data:
                return None
            sock.sendall(handshake.feed(data))
        sock.settimeout(None)
        return handshake.session
