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
from vmapipe.producer.nbd.workers import Pool, Workers
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import Export, NbdSession

# A client that has not come to an end of its greeting by then is none.
_HANDSHAKE_S = 30.0
# Each costs two threads' stacks and 2 MiB of buffers when busy; nbdcopy and
# QEMU use up to 16 and 1. Beside them is room for those that are being shut out.
MAX_CLIENTS = 128
# Where all places are taken, a newcomer gets that of a client which has been silent: in its
# greeting for a tenth of a second (an honest one needs milliseconds, also on a busy host),
# in the middle of a request or without ever having sent one for a second, or for a minute
# after its last request. A guest whose disk that was comes back when it needs it.
_GREETING_S = 0.1
_UNPROVEN_S = 1.0
_SILENT_S = 60.0
# So long a newcomer waits for that, and everybody behind it.
_PLACE_S = 2.0
# A client that was shut out has left by then, if it has no request under way.
_LEAVE_S = 0.25
# Words about strange clients: at most so often.
_TELL_S = 1.0
# Different failures that are told of in so long a time: more of them say nothing new, and a log has an end.
_FAILURES_S = 60.0
_MAX_FAILURES = 256
# So long a server tries to get its first thread. QEMU tries to reconnect for 30 s.
_THREAD_S = 10.0
# After a moment without descriptors, memory or threads.
_PAUSE_S = 0.1
# What is under way when we are asked to end gets so long: less than our parent
# waits for us (10 s), so that the image is still closed in order.
DRAIN_S = 5.0


# A thread that computes gives way to one that has a request to answer after
# this; the default of 5 ms is what a guest would feel.
_SWITCH_S = 0.0005


def answer_promptly() -> None:
    """Shorten thread switches in a process whose clients are guests. Call it before serving."""
    sys.setswitchinterval(_SWITCH_S)


class Offer(NamedTuple):
    """One export and what stands behind it."""

    export: Export
    backend: Backend


class _Client:
    """One that has come, from its greeting on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connection: Connection | None = None
        self.is_shut = False
        self._came_at = time.monotonic()

    def silence(self, now: float) -> float:
        """Return its silence as a fraction of what is allowed when others need its place."""
        if self.connection is None:
            return (now - self._came_at) / _GREETING_S
        silent_s = now - self.connection.idle_since
        if self.connection.requests and not self.connection.is_amid:
            return silent_s / _SILENT_S
        return silent_s / _UNPROVEN_S

    def shut(self) -> None:
        """Shut its socket down: its thread sees that, and ends."""
        self.is_shut = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Server:
    """Serves `offers` on every socket of `listeners`, which it owns, until `stop`."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        offers: Sequence[Offer],
        report: Callable[[str], None] = lambda text: None,
        pool: Pool | None = None,
        request_limit_s: float | None = None,
        *,
        reports_failures: bool = False,
    ) -> None:
        """`pool`: shared with other servers; `request_limit_s`: see Connection.

        `reports_failures`: also call `report` with each request that a backend failed.
        """
        self._listeners = listeners
        self._exports = [offer.export for offer in offers]
        self._backends = {offer.export.name: offer.backend for offer in offers}
        self._report = report
        self._workers = Workers("nbd-worker")
        self._pool = pool or Pool()
        self._request_limit_s = request_limit_s
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._clients: dict[threading.Thread, _Client] = {}
        self._tell_at = 0.0
        self._untold = 0
        self._reports_failures = reports_failures
        # Failures that were told of, since when, and how many were not.
        self._failures: set[str] = set()
        self._failures_since = 0.0
        self._untold_failures = 0
        self._stopping = False

    def start(self) -> None:
        """Raises RuntimeError when no thread can be had for long: a guest may wait for this one."""
        for listener in self._listeners:
            deadline = time.monotonic() + _THREAD_S
            while True:
                thread = threading.Thread(
                    target=self._accept, args=(listener,), name="nbd-accept", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_PAUSE_S)
                else:
                    break

    @property
    def clients(self) -> int:
        with self._lock:
            return len(self._clients)

    def stop(self) -> None:
        """No new clients and requests; what is under way is finished, within a bound."""
        self.close_intake()
        self.finish(time.monotonic() + DRAIN_S)

    def close_intake(self) -> None:
        """The first half of `stop`."""
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
            clients = list(self._clients.values())
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # ends accept()
            listener.close()
        for client in clients:
            if client.connection:
                client.connection.stop()

    def finish(self, deadline: float) -> None:
        """The second half: a client that is not done by then (one that does not read) is cut off."""
        with self._lock:
            threads = list(self._clients)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            late = list(self._clients.values())
        for client in late:
            client.shut()

    def _accept(self, listener: socket.socket) -> None:
        """Accept clients; after a lack of descriptors, memory or threads, go on when they are there again."""
        while not self._stopping:
            sock = None
            try:
                sock, _ = listener.accept()
                self._let_in(sock)
            except (OSError, RuntimeError, MemoryError) as error:
                if sock is not None:
                    sock.close()
                    self._tell(f"a client was turned away: {error}")
                if not self._stopping:
                    # Out of descriptors, memory or threads: those who are here come first.
                    time.sleep(_PAUSE_S)

    def _let_in(self, sock: socket.socket) -> None:
        """Serve a client in a thread of its own. Raises RuntimeError, MemoryError: there is none."""
        client = _Client(sock)
        thread = threading.Thread(
            target=self._serve, args=(client,), name="nbd-client", daemon=True
        )
        with self._changed:
            has_place = self._make_place()
            if has_place:
                self._clients[thread] = client
                try:
                    thread.start()
                except BaseException:
                    del self._clients[thread]
                    raise
        if not has_place:
            sock.close()
            if not self._stopping:
                self._tell(f"a client was turned away: there are {MAX_CLIENTS} already")

    def _make_place(self) -> bool:
        """Make room for a client, the lock being held; False: none could be had soon."""
        deadline = time.monotonic() + _PLACE_S
        while not self._stopping and len(self._clients) >= MAX_CLIENTS:
            now = time.monotonic()
            if now >= deadline:
                return False
            staying = [client for client in self._clients.values() if not client.is_shut]
            pause_s = _GREETING_S / 4
            if staying:
                most_silent = max(staying, key=lambda client: client.silence(now))
                if most_silent.silence(now) >= 1:
                    most_silent.shut()
                    pause_s = _LEAVE_S
            self._changed.wait(pause_s)
        return not self._stopping

    def _tell(self, text: str) -> None:
        """Hostile clients come by the thousand: not all of them are worth a line."""
        with self._lock:
            now = time.monotonic()
            if now < self._tell_at:
                self._untold += 1
                return
            untold, self._untold, self._tell_at = self._untold, 0, now + _TELL_S
        self._report(f"{text} (and {untold} such lines before it)" if untold else text)

    def _tell_failure(self, text: str) -> None:
        """A client may try the same again and again: each failure is told once in a while."""
        if not self._reports_failures:
            return
        untold = 0
        with self._lock:
            now = time.monotonic()
            if now >= self._failures_since + _FAILURES_S:
                self._failures.clear()
                self._failures_since = now
                untold, self._untold_failures = self._untold_failures, 0
            is_new = text not in self._failures and len(self._failures) < _MAX_FAILURES
            if is_new:
                self._failures.add(text)
            else:
                self._untold_failures += 1
        if is_new:
            self._report(f"{text} (and {untold} such lines before it)" if untold else text)

    def _serve(self, client: _Client) -> None:
        sock = client.sock
        try:
            handshake = NbdServerHandshake(self._exports)
            session = self._shake_hands(sock, handshake)
            if session is not None:
                backend = self._backends[session.export.name]
                connection = Connection(
                    sock,
                    session,
                    backend,
                    self._workers,
                    self._pool,
                    self._request_limit_s,
                    self._tell_failure,
                )
                with self._lock:
                    client.connection = connection
                    if self._stopping:
                        connection.stop()
                connection.serve(handshake.unread)
        except NbdProtocolError as error:
            with contextlib.suppress(OSError):
                sock.sendall(error.unsent)
            self._tell(f"a client broke the NBD protocol and was disconnected: {error}")
        except (OSError, MemoryError):
            pass  # the client is gone; what it had not been answered was its loss
        finally:
            with self._changed:
                del self._clients[threading.current_thread()]
                self._changed.notify_all()
            sock.close()

    def _shake_hands(self, sock: socket.socket, handshake: NbdServerHandshake) -> NbdSession | None:
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
