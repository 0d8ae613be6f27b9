# SPDX-License-Identifier: Apache-2.0
"""The process that accepts TCP connections for a ZeroMQ socket, and passes on well-formed ones.

libzmq accepts every connection for as long as there are descriptors, and reserves
for each as much as the largest message has, before the peer has proved anything.
Therefore its socket is at ipc://, and this process relays TCP connections to it. A
connection whose greeting has not come costs the ZeroMQ process nothing; while one
is being authenticated, some hundred bytes of it are passed on and no more.
Why so, and what it costs: docs/decisions/0021-acceptor.md.

A connection is first `greeting` (its first command is awaited), then `queued` (there is
no room behind for it yet), `authenticating` (the socket decides) and `accepted`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Literal

from vmapipe.archiver.listener.connection import RelayedConnection, first_to_close, taken
from vmapipe.archiver.listener.relay import PipeStock, Relay
from vmapipe.protocol.unfinished import AllUnfinished
from vmapipe.protocol.zmtp import HandshakeRefused, Stage, greeting
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import ChildCommands, Emit, finished_in, ignore
from vmapipe.runtime.process import run_child

# A connection must be accepted within this time. Honest peers need a few milliseconds
# and four messages.
_GREETING_S = 10.0
# A connection that is being authenticated makes room for others only after this: a client
# behind a slow network needs some round trips.
_AUTHENTICATION_S = 2.0
# How long a client may still read the last answers after its service has closed.
_CLOSING_S = 2.0
# How long the last messages of the socket may take to go out after a stop was asked for.
_DRAIN_S = 2.5
# How often deadlines are checked.
_POLL_S = 0.25
# How long accept() rests after it found no descriptor; others are closed meanwhile.
_PAUSE_S = 0.1
# Connections accepted in one turn, so that the others are served, too.
_TURN = 64
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class Acceptor:
    """Relays TCP connections to the ZeroMQ socket at `path`.

    Limits: `most_greeting` connections whose first command is awaited, and as many that are
    queued; `most_authenticating` that the socket decides about; `most` of these and the accepted
    ones together; `most_unfinished` bytes of what these have sent and the socket has not answered.
    """

    def __init__(
        self,
        listener: socket.socket,
        options: argparse.Namespace,
        emit: Emit,
        answers: ChildCommands,
        now: float,
    ) -> None:
        self._listener = listener
        self._path: str = options.path
        self._curve: bool = options.curve
        self._most_greeting: int = options.most_greeting
        self._most_authenticating: int = options.most_authenticating
        self._most: int = options.most
        self._pipes = PipeStock(options.most_pipes)
        self._emit = emit
        self._answers = answers
        self._together = AllUnfinished(options.most_unfinished)
        self._by_name: dict[str, RelayedConnection] = {}
        # Connections that are not read until the socket behind us has answered.
        self._waiting: dict[RelayedConnection, None] = {}
        self._epoll = select.epoll()
        self._masks: dict[int, int] = {}
        self._by_fd: dict[int, RelayedConnection] = {}
        # Each connection is in exactly one of these, oldest first.
        self._greeting: dict[RelayedConnection, None] = {}
        self._queued: dict[RelayedConnection, None] = {}
        self._authenticating: dict[RelayedConnection, None] = {}
        self._accepted: dict[RelayedConnection, None] = {}
        # Ended by us, and still a descriptor of the socket behind us: whether it was accepted.
        self._leaving: dict[RelayedConnection, bool] = {}
        self._rejected = 0
        self._was_crowded = False
        self._listens_at = now
        listener.setblocking(False)
        self._set(listener.fileno(), _IN)

    def run(self, cancel: Cancel) -> None:
        """Relay until a stop is asked for and the last messages of the socket are out."""
        self._set(cancel.fd, _IN)
        self._set(self._answers.fd, _IN)
        poll_at, deadline = 0.0, float("inf")
        listener = self._listener.fileno()
        while time.monotonic() < deadline and (self._by_fd or not cancel.asked):
            events = self._epoll.poll(_POLL_S)
            now = time.monotonic()
            for fd, mask in events:
                if fd == listener:
                    self._accept(now)
                elif fd == self._answers.fd:
                    self._take_answers()
                elif connection := self._by_fd.get(fd):
                    self._serve(connection, fd, mask, now)
            if now >= poll_at:
                poll_at = now + _POLL_S
                self._check_deadlines(now)
            self._connect_queued(now)
            if cancel.asked and deadline == float("inf"):
                deadline = now + _DRAIN_S
                self._set(cancel.fd, 0)
                # At once: a process that takes our parent's place needs the port.
                self._set(self._listener.fileno(), 0)
                self._listener.close()
                self._listens_at = float("inf")
                for connection in [*self._greeting, *self._queued]:
                    self._end(connection)

    # --- new connections ---

    def _accept(self, now: float) -> None:
        for _ in range(_TURN):
            try:
                client, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._close_one(self._greeting, "")
                    # Level-triggered: epoll would report it again and again meanwhile.
                    self._set(self._listener.fileno(), 0)
                    self._listens_at = now + _PAUSE_S
                    return
                continue  # the peer has closed already
            connection = RelayedConnection(
                client, str(address[0]), now, self._together, curve=self._curve
            )
            client.setblocking(False)
            self._make_room(self._greeting, connection.host)
            self._greeting[connection] = None
            self._by_fd[client.fileno()] = connection
            try:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.send(greeting(curve=self._curve))
            except OSError:
                self._reject(connection)
                continue
            self._watch(connection)

    def _make_room(self, connections: dict[RelayedConnection, None], host: str) -> None:
        if len(connections) >= self._most_greeting:
            self._close_one(connections, host)

    def _close_one(self, connections: dict[RelayedConnection, None], host: str) -> None:
        if not self._was_crowded:
            self._was_crowded = True
            self._notice(
                f"more than {self._most_greeting} connections that have proved nothing: the oldest "
                "are closed"
            )
        oldest = first_to_close(connections, host)
        if oldest is not None:
            self._reject(oldest)

    # --- traffic ---

    def _serve(self, connection: RelayedConnection, fd: int, mask: int, now: float) -> None:
        try:
            if connection in self._leaving:
                self._leave(connection)
            elif connection.up is None or connection.down is None:
                self._receive_greeting(connection)
            elif connection.closes_at < float("inf"):
                # Closing at once, with unread data, could discard the last messages.
                if _received(connection.client, 1 << 16) == b"":
                    raise HandshakeRefused("the peer has closed")
            else:
                coming, going = (
                    (connection.up, connection.down)
                    if fd == connection.client.fileno()
                    else (connection.down, connection.up)
                )
                if mask & _OUT:
                    going.give()
                if mask & ~_OUT:
                    self._carry(connection, coming, now)
                self._end_if_done(connection, now)
        except (OSError, HandshakeRefused):
            self._reject(connection)
            return
        if fd in self._by_fd and connection not in self._leaving:
            self._watch(connection)

    def _receive_greeting(self, connection: RelayedConnection) -> None:
        data = connection.client.recv(connection.opening.wanted_bytes or 1)
        if not data:
            raise HandshakeRefused("the peer has closed")
        connection.opening.receive(data)
        if connection.opening.stage is Stage.QUEUED:
            del self._greeting[connection]
            self._make_room(self._queued, connection.host)
            self._queued[connection] = None

    def _carry(self, connection: RelayedConnection, coming: Relay, now: float) -> None:
        opening = connection.opening
        if opening.is_accepted():
            is_up = coming is connection.up
            if coming.has_room and (not is_up or connection.unfinished.may_send):
                coming.take()
                coming.give()
            if is_up:
                connection.unfinished.sent(coming.taken_bytes)
                if connection.unfinished.is_due:
                    self._tell(connection)
            return
        if connection.up is None or connection.down is None:
            return
        if coming is connection.up:
            data = _received(connection.client, opening.wanted_bytes)
            if data == b"":
                raise HandshakeRefused("the peer has closed")
            was_authenticating = opening.is_authenticating
            opening.receive(data or b"")
            if opening.is_authenticating and not was_authenticating:
                self._report("authenticating", connection)
            connection.up.put(taken(opening))
            connection.up.give()
            return
        data = _received(coming.source, 1 << 16)
        coming.ended = data == b""
        coming.put(opening.answered(data or b""))
        coming.give()
        if connection in self._authenticating and opening.is_accepted():
            del self._authenticating[connection]
            self._accepted[connection] = None
            self._report("decided", connection)
            connection.up.put(taken(opening))
            connection.up.give()

    def _tell(self, connection: RelayedConnection) -> None:
        sent_bytes = connection.unfinished.tell()
        self._emit({"event": "carried", "name": connection.name, "bytes": sent_bytes})

    def _take_answers(self) -> None:
        """Read on what waited for an answer of the socket behind us."""
        for command in self._answers.take():
            answer = finished_in(command)
            connection = self._by_name.get(answer.name) if answer else None
            if answer is None or connection is None:
                continue
            if answer.finished_bytes < 0:
                self._end(connection)
            else:
                connection.unfinished.answered(answer.sent_bytes, answer.finished_bytes)
        for connection in [*self._waiting]:
            if self._together.is_full:
                return
            if connection.unfinished.may_send:
                self._watch(connection)

    def _ask_again(self) -> None:
        """Ask the socket about connections that wait for it, and about all where there is little room.

        What was told may have been lost, and what is less than TOLD_BYTES was never told.
        """
        asked = self._accepted if self._together.is_half_full else self._waiting
        for connection in asked:
            if connection.unfinished.is_open:
                self._tell(connection)

    def _end_if_done(self, connection: RelayedConnection, now: float) -> None:
        if connection.up is None or connection.down is None:
            return
        if connection.down.lost or (connection.up.ended and connection.up.is_empty):
            self._reject(connection)
        elif connection.down.ended and connection.down.is_empty:
            connection.closes_at = now + _CLOSING_S
            connection.client.shutdown(socket.SHUT_WR)

    # --- connections to the socket ---

    def _connect_queued(self, now: float) -> None:
        """Connect queued connections to the socket, as far as there is room.

        One that we have ended takes room until the socket has closed its half, too: libzmq accepts
        whatever we have begun, and ends its process when no descriptor is left for that.
        """
        for connection in [*self._queued]:
            leaving = sum(not was_accepted for was_accepted in self._leaving.values())
            if len(self._authenticating) + leaving >= self._most_authenticating:
                oldest = first_to_close(self._authenticating, connection.host)
                if not leaving and oldest and now - oldest.since >= _AUTHENTICATION_S:
                    self._reject(oldest)
                return
            inside = len(self._authenticating) + len(self._accepted) + len(self._leaving)
            if inside >= self._most:
                return
            if not self._connect(connection, now):
                return

    def _connect(self, connection: RelayedConnection, now: float) -> bool:
        """Connect one to the socket; False when it has to be tried again."""
        try:
            service = socket.socket(socket.AF_UNIX)
        except OSError:
            return False
        service.setblocking(False)
        try:
            service.bind("")  # the system chooses an unused name
            connection.name = service.getsockname()[1:].decode("ascii")
            service.connect(self._path)
            service.send(connection.opening.take_pending())
        except OSError:
            # The socket's queue is full, or it does not listen yet.
            service.close()
            return False
        del self._queued[connection]
        self._authenticating[connection] = None
        self._by_name[connection.name] = connection
        connection.since = now
        connection.service = service
        connection.up = Relay(connection.client, service, self._pipes)
        connection.down = Relay(service, connection.client, None)
        self._by_fd[service.fileno()] = connection
        self._watch(connection)
        return True

    # --- time, and ends ---

    def _check_deadlines(self, now: float) -> None:
        for connection in [*self._greeting, *self._queued, *self._authenticating]:
            if now - connection.since > _GREETING_S:
                self._reject(connection)
        for connection in [g for g in self._accepted if now >= g.closes_at]:
            self._end(connection)
        for connection in [g for g in self._authenticating if now >= g.closes_at]:
            self._reject(connection)
        self._ask_again()
        if now >= self._listens_at:
            self._set(self._listener.fileno(), _IN)

    def _reject(self, connection: RelayedConnection) -> None:
        """Close a connection, and count it if it was never accepted."""
        if connection.client.fileno() < 0:
            return
        if connection not in self._accepted:
            self._rejected += 1
            # The first, the tenth, the hundredth: no peer may fill the log.
            if str(self._rejected).strip("0") == "1":
                plural = "s" if self._rejected > 1 else ""
                self._notice(
                    f"refused {self._rejected} connection{plural}: unknown key, or not the vmapipe protocol"
                )
        self._end(connection)

    def _end(self, connection: RelayedConnection) -> None:
        was_accepted = connection in self._accepted
        if connection in self._authenticating:
            self._report("decided", connection)
        for connections in (self._greeting, self._queued, self._authenticating, self._accepted):
            connections.pop(connection, None)
        self._waiting.pop(connection, None)
        if self._by_name.get(connection.name) is connection:
            del self._by_name[connection.name]
        connection.unfinished.close()
        self._close(connection.client)
        for relay in (connection.up, connection.down):
            if relay is not None:
                relay.close()
        if connection.service is None:
            return
        if not connection.is_closed_by_service:
            with contextlib.suppress(OSError):
                connection.service.shutdown(socket.SHUT_WR)
                self._leaving[connection] = was_accepted
                self._set(connection.service.fileno(), select.EPOLLHUP)
                return
        self._leave(connection)

    def _leave(self, connection: RelayedConnection) -> None:
        """Close our half of a connection to the socket, which has closed its own."""
        self._leaving.pop(connection, None)
        if connection.service is not None:
            self._close(connection.service)

    def _close(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._set(sock.fileno(), 0)
            self._by_fd.pop(sock.fileno(), None)
            sock.close()

    # --- which descriptors are polled ---

    def _watch(self, connection: RelayedConnection) -> None:
        opening, up, down = connection.opening, connection.up, connection.down
        if connection.service is None or up is None or down is None:
            # Read no further once its first command has come.
            self._set(connection.client.fileno(), 0 if opening.stage is Stage.QUEUED else _IN)
            return
        if opening.is_accepted():
            reads = up.has_room and connection.unfinished.may_send
            if connection.unfinished.may_send:
                self._waiting.pop(connection, None)
            else:
                self._waiting[connection] = None
        else:
            reads = opening.wanted_bytes > 0 and up.is_empty
        leaves = connection.closes_at < float("inf")
        from_client = _IN if reads or leaves else 0
        from_service = _IN if down.has_room and not leaves else 0
        self._set(connection.client.fileno(), from_client | (0 if down.is_empty else _OUT))
        self._set(
            connection.service.fileno(), from_service | (0 if up.is_empty or leaves else _OUT)
        )

    def _set(self, fd: int, mask: int) -> None:
        """Poll `fd` for `mask`; 0: not at all, so that a pending end is not reported again and again."""
        before = self._masks.get(fd, 0)
        if mask == before:
            return
        if not mask:
            del self._masks[fd]
            self._epoll.unregister(fd)
            return
        self._masks[fd] = mask
        if before:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)

    # --- reports to the parent ---

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": text})

    def _report(
        self, event: Literal["authenticating", "decided"], connection: RelayedConnection
    ) -> None:
        """Report the address of a client: the socket itself sees only this process."""
        if self._curve:
            self._emit({"event": event, "address": connection.address})


def _received(sock: socket.socket, most_bytes: int) -> bytes | None:
    """Read at most `most_bytes`. None: nothing now; empty: the peer has closed."""
    if most_bytes <= 0:
        return None
    try:
        return sock.recv(most_bytes)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="vmapipe.archiver.listener.acceptor")
    made.add_argument("--parent-fd", type=int, default=None)
    made.add_argument("--listener-fd", type=int, required=True)
    made.add_argument("--path", required=True)
    made.add_argument("--curve", action="store_true")
    made.add_argument("--most-greeting", type=int, required=True)
    made.add_argument("--most-authenticating", type=int, required=True)
    made.add_argument("--most-pipes", type=int, required=True)
    made.add_argument("--most", type=int, required=True)
    made.add_argument("--most-unfinished", type=int, required=True)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    answers = ChildCommands()

    def work(cancel: Cancel, emit: Emit) -> None:
        # SIGTERM may be sent to all processes of a service: this one carries the last
        # messages of the others, and ends when its parent says so or is gone.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with socket.socket(fileno=options.listener_fd) as listener:
            Acceptor(listener, options, emit, answers, time.monotonic()).run(cancel)

    name = "vmapipe.archiver.listener.acceptor"
    return run_child(name, options.parent_fd, work, ignore, answers.put)


if __name__ == "__main__":
    sys.exit(main())
