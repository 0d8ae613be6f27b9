# SPDX-License-Identifier: Apache-2.0
"""The process that takes TCP connections for a ZeroMQ socket, and shows it only those that mean well.

libzmq takes every connection that comes, for as long as there are descriptors,
and holds for each as much as the largest message has, before anybody has
proved anything. So its socket is at ipc://, and this process stands before it:
whoever has not yet said its first word costs the process behind it nothing; and
of whoever is being judged it passes on some hundred bytes and no more.
Why so, and what it costs: docs/decisions/0021-acceptor.md.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

from vmapipe.archiver.listener.relay import PipeStock, Relay
from vmapipe.protocol.zmtp import ConnectionOpening, HandshakeRefused, Stage, greeting
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.process import run_child

# Who has connected must be let in by then. Honest ones need a few milliseconds
# and four messages.
_OPENING_S = 10.0
# Who is being judged makes way for others that wait only after this: a client
# behind a slow network needs some round trips.
_JUDGING_S = 2.0
# After its service has hung up a client may still read what that said last.
_LEAVING_S = 2.0
# What goes out when we are told to end: the last words of the socket behind us.
_DRAIN_S = 2.5
# Deadlines are looked at so often.
_LOOK_S = 0.25
# With no descriptor left: others are closed, and it is tried again.
_PAUSE_S = 0.1
# Taken in one turn, so that those that are inside get theirs.
_TURN = 64
# The socket behind us hears so often how much a connection has sent: by that it notices a
# message without an end (socket.py).
_TOLD_BYTES = 4 << 20
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class _Guest:
    """One connection. `service`: its other half, once it has said its first word."""

    def __init__(self, client: socket.socket, address: str, now: float, *, curve: bool) -> None:
        self.client = client
        self.address = address
        self.host = _host_of(address)
        self.since = now
        self.opening = ConnectionOpening(curve=curve)
        self.service: socket.socket | None = None
        self.up: Relay | None = None
        self.down: Relay | None = None
        #: Its service has hung up; it may read the rest until then.
        self.leaves_at = float("inf")
        #: Of its other half, by which the socket behind us knows it; and what that was told.
        self.name = ""
        self.told_bytes = 0

    @property
    def sockets(self) -> list[socket.socket]:
        return [self.client] if self.service is None else [self.client, self.service]


class Acceptor:
    """`most_waiting`: connections whose first word is awaited, and as many that have said it and
    wait to be shown in; `most_judged`: those that the socket at `path` decides about; `most`:
    these and all that were let in.
    """

    def __init__(
        self, listener: socket.socket, options: argparse.Namespace, emit: Emit, now: float
    ) -> None:
        self._listener = listener
        self._path: str = options.path
        self._curve: bool = options.curve
        self._most_waiting: int = options.most_waiting
        self._most_judged: int = options.most_judged
        self._most: int = options.most
        self._pipes = PipeStock(options.most_pipes)
        self._emit = emit
        self._epoll = select.epoll()
        self._masks: dict[int, int] = {}
        self._by_fd: dict[int, _Guest] = {}
        # Each guest is in one of these, in the order of its coming there.
        self._waiting: dict[_Guest, None] = {}
        self._knocking: dict[_Guest, None] = {}
        self._judged: dict[_Guest, None] = {}
        self._inside: dict[_Guest, None] = {}
        self._refused = 0
        self._was_crowded = False
        self._listens_at = now
        listener.setblocking(False)
        self._set(listener.fileno(), _IN)

    def run(self, cancel: Cancel) -> None:
        """Until a stop is asked for, and the last words of the socket behind us are out."""
        self._set(cancel.fd, _IN)
        look_at, deadline = 0.0, float("inf")
        listener = self._listener.fileno()
        while time.monotonic() < deadline and (self._by_fd or not cancel.asked):
            events = self._epoll.poll(_LOOK_S)
            now = time.monotonic()
            for fd, mask in events:
                if fd == listener:
                    self._accept(now)
                elif guest := self._by_fd.get(fd):
                    self._serve(guest, fd, mask, now)
            if now >= look_at:
                look_at = now + _LOOK_S
                self._look(now)
            self._show_in(now)
            if cancel.asked and deadline == float("inf"):
                deadline = now + _DRAIN_S
                self._set(cancel.fd, 0)
                # At once: whoever is started in our parent's place needs the port.
                self._set(self._listener.fileno(), 0)
                self._listener.close()
                self._listens_at = float("inf")
                for guest in [*self._waiting, *self._knocking]:
                    self._end(guest)

    # --- who comes ---

    def _accept(self, now: float) -> None:
        for _ in range(_TURN):
            try:
                client, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._close_one(self._waiting, "")
                    # Level-triggered: it would be told again and again meanwhile.
                    self._set(self._listener.fileno(), 0)
                    self._listens_at = now + _PAUSE_S
                    return
                continue  # it has gone already
            guest = _Guest(client, str(address[0]), now, curve=self._curve)
            client.setblocking(False)
            self._make_room(self._waiting, guest.host)
            self._waiting[guest] = None
            self._by_fd[client.fileno()] = guest
            try:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.send(greeting(curve=self._curve))
            except OSError:
                self._refuse(guest)
                continue
            self._watch(guest)

    def _make_room(self, guests: dict[_Guest, None], host: str) -> None:
        if len(guests) >= self._most_waiting:
            self._close_one(guests, host)

    def _close_one(self, guests: dict[_Guest, None], host: str) -> None:
        if not self._was_crowded:
            self._was_crowded = True
            self._notice(
                f"more than {self._most_waiting} connections that have proved nothing: the oldest "
                "are closed"
            )
        oldest = _first_to_go(guests, host)
        if oldest is not None:
            self._refuse(oldest)

    # --- who is here ---

    def _serve(self, guest: _Guest, fd: int, mask: int, now: float) -> None:
        try:
            if guest.up is None or guest.down is None:
                self._hear_first(guest)
            elif guest.leaves_at < float("inf"):
                # Closing at once, with something unread, could cost it the last words.
                if _received(guest.client, 1 << 16) == b"":
                    raise HandshakeRefused("it has gone")
            else:
                coming, going = (
                    (guest.up, guest.down)
                    if fd == guest.client.fileno()
                    else (guest.down, guest.up)
                )
                if mask & _OUT:
                    going.give()
                if mask & ~_OUT:
                    self._carry(guest, coming, now)
                self._end_if_done(guest, now)
        except (OSError, HandshakeRefused):
            self._refuse(guest)
            return
        if fd in self._by_fd:
            self._watch(guest)

    def _hear_first(self, guest: _Guest) -> None:
        data = guest.client.recv(guest.opening.wanted_bytes or 1)
        if not data:
            raise HandshakeRefused("it has gone")
        guest.opening.hear(data)
        if guest.opening.stage is Stage.KNOCKED:
            del self._waiting[guest]
            self._make_room(self._knocking, guest.host)
            self._knocking[guest] = None

    def _carry(self, guest: _Guest, coming: Relay, now: float) -> None:
        opening = guest.opening
        if opening.is_in():
            if coming.has_room:
                coming.take()
                coming.give()
            if coming is guest.up and coming.taken_bytes - guest.told_bytes >= _TOLD_BYTES:
                guest.told_bytes = coming.taken_bytes
                self._emit({"event": "carried", "name": guest.name, "bytes": coming.taken_bytes})
            return
        if guest.up is None or guest.down is None:
            return
        if coming is guest.up:
            data = _received(guest.client, opening.wanted_bytes)
            if data == b"":
                raise HandshakeRefused("it has gone")
            was_judged = opening.is_judged
            opening.hear(data or b"")
            if opening.is_judged and not was_judged:
                self._tell("judged", guest)
            guest.up.put(_taken(opening))
            guest.up.give()
            return
        data = _received(coming.source, 1 << 16)
        coming.ended = data == b""
        coming.put(opening.answered(data or b""))
        coming.give()
        if guest in self._judged and opening.is_in():
            del self._judged[guest]
            self._inside[guest] = None
            self._tell("decided", guest)
            guest.up.put(_taken(opening))
            guest.up.give()

    def _end_if_done(self, guest: _Guest, now: float) -> None:
        if guest.up is None or guest.down is None:
            return
        if guest.down.lost or (guest.up.ended and guest.up.is_empty):
            self._refuse(guest)  # nobody to talk to
        elif guest.down.ended and guest.down.is_empty:
            guest.leaves_at = now + _LEAVING_S
            guest.client.shutdown(socket.SHUT_WR)

    # --- who is let in ---

    def _show_in(self, now: float) -> None:
        """Those that have said a fitting first word, as far as there is room."""
        for guest in [*self._knocking]:
            if len(self._judged) >= self._most_judged:
                oldest = _first_to_go(self._judged, guest.host)
                if oldest is None or now - oldest.since < _JUDGING_S:
                    return
                self._refuse(oldest)
            if len(self._judged) + len(self._inside) >= self._most:
                return
            if not self._connect(guest, now):
                return

    def _connect(self, guest: _Guest, now: float) -> bool:
        """False when it has to be tried again."""
        try:
            service = socket.socket(socket.AF_UNIX)
        except OSError:
            return False
        service.setblocking(False)
        try:
            service.bind("")  # the system chooses a name that nobody else has
            guest.name = service.getsockname()[1:].decode("ascii")
            service.connect(self._path)
            service.send(guest.opening.let_in())
        except OSError:
            # Its queue is full, or it is not there yet.
            service.close()
            return False
        del self._knocking[guest]
        self._judged[guest] = None
        guest.since = now
        guest.service = service
        guest.up = Relay(guest.client, service, self._pipes)
        guest.down = Relay(service, guest.client, None)
        self._by_fd[service.fileno()] = guest
        self._watch(guest)
        return True

    # --- time, and ends ---

    def _look(self, now: float) -> None:
        for guest in [*self._waiting, *self._knocking, *self._judged]:
            if now - guest.since > _OPENING_S:
                self._refuse(guest)
        for guest in [g for g in self._inside if now >= g.leaves_at]:
            self._end(guest)
        for guest in [g for g in self._judged if now >= g.leaves_at]:
            self._refuse(guest)
        if now >= self._listens_at:
            self._set(self._listener.fileno(), _IN)

    def _refuse(self, guest: _Guest) -> None:
        """Its end; it counts if it was never let in."""
        if guest.client.fileno() < 0:
            return
        if guest not in self._inside:
            self._refused += 1
            # The first, the tenth, the hundredth: a log that strangers can fill is no log.
            if str(self._refused).strip("0") == "1":
                plural = "s" if self._refused > 1 else ""
                self._notice(
                    f"refused {self._refused} connection{plural}: no known key, or none of our words"
                )
        self._end(guest)

    def _end(self, guest: _Guest) -> None:
        if guest in self._judged:
            self._tell("decided", guest)
        for guests in (self._waiting, self._knocking, self._judged, self._inside):
            guests.pop(guest, None)
        for sock in guest.sockets:
            self._set(sock.fileno(), 0)
            self._by_fd.pop(sock.fileno(), None)
            sock.close()
        for flow in (guest.up, guest.down):
            if flow is not None:
                flow.close()

    # --- what is waited for ---

    def _watch(self, guest: _Guest) -> None:
        opening, up, down = guest.opening, guest.up, guest.down
        if guest.service is None or up is None or down is None:
            # One that knocks is read no further: what it has said is enough.
            knocks = opening.stage is Stage.KNOCKED
            self._set(guest.client.fileno(), 0 if knocks else _IN)
            return
        reads = up.has_room if opening.is_in() else opening.wanted_bytes > 0 and up.is_empty
        leaves = guest.leaves_at < float("inf")
        from_client = _IN if reads or leaves else 0
        from_service = _IN if down.has_room and not leaves else 0
        self._set(guest.client.fileno(), from_client | (0 if down.is_empty else _OUT))
        self._set(guest.service.fileno(), from_service | (0 if up.is_empty or leaves else _OUT))

    def _set(self, fd: int, mask: int) -> None:
        """0: not at all, so that an end that is to be heard later is not told again and again."""
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

    # --- what is told ---

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": text})

    def _tell(self, event: str, guest: _Guest) -> None:
        """From where the keys come that the socket sees: it sees only us."""
        if self._curve:
            self._emit({"event": event, "address": guest.address})


def _first_to_go(guests: dict[_Guest, None], host: str) -> _Guest | None:
    """The oldest; of the newcomer's own host where that has half of them."""
    own = [guest for guest in guests if guest.host == host] if host else []
    return next(iter(own if 2 * len(own) >= len(guests) else guests), None)


def _received(sock: socket.socket, most_bytes: int) -> bytes | None:
    """None: nothing now; empty: its end."""
    if most_bytes <= 0:
        return None
    try:
        return sock.recv(most_bytes)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _taken(opening: ConnectionOpening) -> bytes:
    data, opening.pending = opening.pending, b""
    return data


def _host_of(address: str) -> str:
    """Who is counted as one: an address, of IPv6 the network that a site has."""
    text = address.partition("%")[0]
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(text).version == 6:
            mapped = ipaddress.IPv6Address(text).ipv4_mapped
            return str(mapped or ipaddress.ip_network((text, 64), strict=False))
    return text


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="vmapipe.archiver.listener.acceptor")
    made.add_argument("--parent-fd", type=int, default=None)
    made.add_argument("--listener-fd", type=int, required=True)
    made.add_argument("--path", required=True)
    made.add_argument("--curve", action="store_true")
    made.add_argument("--most-waiting", type=int, required=True)
    made.add_argument("--most-judged", type=int, required=True)
    made.add_argument("--most-pipes", type=int, required=True)
    made.add_argument("--most", type=int, required=True)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)

    def work(cancel: Cancel, emit: Emit) -> None:
        # Whoever stops a service may mean all its processes: this one carries the last
        # words of the others, and ends when its parent says so or is gone.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with socket.socket(fileno=options.listener_fd) as listener:
            Acceptor(listener, options, emit, time.monotonic()).run(cancel)

    return run_child("vmapipe.archiver.listener.acceptor", options.parent_fd, work, _print)


def _print(event: Event) -> None:
    """It has always a parent."""


if __name__ == "__main__":
    sys.exit(main())
