# SPDX-License-Identifier: Apache-2.0
"""The producer's ZeroMQ connection to the archiver. No other file of this room imports zmq."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import zmq

from vmapipe.protocol import limits
from vmapipe.protocol.schema import Part
from vmapipe.protocol.unfinished import PART_BYTES, MessageLedger
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.process import require_memory

if TYPE_CHECKING:
    from vmapipe.runtime.keys import ClientKeys

# How long a closing socket may still deliver its last words.
_LINGER_MS = 2000
# pyzmq's zero-copy costs a few microseconds a part; a copy of less is cheaper.
_ZERO_COPY_BYTES = 64 * 1024
# The archiver may bind a moment after we start; 100 ms would be felt.
_RECONNECT_MS = 10
# Over a network the user of this class says when, and what is said first: left
# to itself, libzmq would send the next frame to a peer that does not know us.
# Not -1, with which it throws away what has come and was not read: last words.
_NEVER_MS = 24 * 3600 * 1000
# A connection that is dead (a cable, a stopped peer) is noticed and opened anew:
# three beats, so that one lost on the way is none.
_HEARTBEAT_MS = 3000
# The system would wait for minutes, ever longer, for an answer that the cable's
# return does not bring sooner.
_CONNECT_MS = 3000
# A server that cannot read what we send, because its key is another one or we have
# none, just hangs up. So may one that ends at that moment, or has more guests than it
# can take in; but not so often, for so long.
_HANG_UPS, _HANG_UPS_S = 3, 2.0

# As numbers: pyzmq's own flags take a microsecond each time they are combined.
_POLLIN = int(zmq.POLLIN)
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

# What an archiver may have sent and not ended as a message: its messages are some hundred bytes.
_MOST_UNFINISHED_BYTES = 8 << 20
# tcp(7): how much has been received, in struct tcp_info (Linux 4.1).
_RECEIVED_BYTES = struct.Struct("=128xQ")

# How long a last look at a port may take that could not be reached.
_PROBE_S = 1.0

# zmq_socket_monitor(3): an event and its value. pyzmq's own parser imports asyncio,
# which takes longer than all the rest of a start.
_EVENT = struct.Struct("=Hi")
_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class ArchiverConnection:
    """A DEALER socket, connected to one archiver. Closing it takes at most 2 s.

    With `keys` it talks only to the owner of the server key among them.
    """

    def __init__(
        self, endpoint: str, keys: ClientKeys | None = None, connect_timeout_s: int = 0
    ) -> None:
        """`connect_timeout_s`: over TCP, how long no archiver may be reached; 0: no limit."""
        #: True: the archiver is on this host, so that memory can be shared.
        self.is_local = endpoint.startswith("ipc://")
        self.endpoint = endpoint
        self._keys = keys
        self._hang_ups: list[float] = []
        self._linger_ms = _LINGER_MS
        self._was_up = False
        #: The archiver has taken us: how long it may be away is its affair from now on.
        self.is_settled = self.is_local or not connect_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._was_reached = False
        #: Since when there has been no connection; none: there is one.
        self._missing_since: float | None = time.monotonic()
        #: There is no connection any more, or it could not be made: only `reconnect` helps.
        self.lost = False
        require_memory()
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        # libzmq's descriptor of the connection, as long as there is one.
        self._fd = -1
        self._ledger = MessageLedger(_MOST_UNFINISHED_BYTES, _MOST_UNFINISHED_BYTES)
        self._open()

    def watch(self, fd: int) -> None:
        """Let `wait` also end when `fd` becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._poller.unregister(fd)

    def wait(self, timeout_s: float) -> None:
        """Wait for messages. Raises Failure when the archiver refuses our key, or has another one."""
        if not self.is_settled:
            timeout_s = min(timeout_s, self._connect_timeout_s)
        self._poller.poll(int(timeout_s * 1000) + 1 if timeout_s > 0 else 0)
        while self._monitor.poll(0):
            number, value = _EVENT.unpack(self._monitor.recv_multipart()[0])
            if not self.is_local:
                self._know(number, value)
            self._take(number)
        if self._fd >= 0:
            self._check_unfinished()
        if self._missing_since is not None and not self.is_settled:
            self._check_missing(time.monotonic() - self._missing_since)

    def send(self, parts: Sequence[Part]) -> None:
        """The memory of a large part must not change before it is acknowledged."""
        last = len(parts) - 1
        try:
            for index, part in enumerate(parts):
                self._socket.send(
                    part, _MORE if index < last else _LAST, copy=len(part) < _ZERO_COPY_BYTES
                )
        except zmq.Again:
            # libzmq has given the connection up for good: `wait` may tell why.
            self.lost = not self.is_local

    def receive(self) -> list[bytes] | None:
        """One message, or None when there is none."""
        # Asking first is quicker than an exception for "nothing there".
        if not int(self._socket.get(zmq.EVENTS)) & _POLLIN:
            return None
        parts = self._socket.recv_multipart(_LAST)
        if self._fd >= 0:
            count = sum(len(part) + PART_BYTES for part in parts)
            self._ledger.came_out(self._fd, count, time.monotonic())
        return parts

    def reconnect(self) -> None:
        """A new connection; what was not sent yet over the old one is never sent."""
        self._poller.unregister(self._socket)
        self._poller.unregister(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._forget()
        self.lost = False
        self._open()

    def close(self) -> None:
        self._context.destroy(linger=self._linger_ms)

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = _LINGER_MS
        # Credit bounds what is under way; a mark would only be met by losing something.
        self._socket.sndhwm = 0
        self._socket.maxmsgsize = limits.MAX_CONTROL_BYTES
        self._socket.reconnect_ivl = _RECONNECT_MS if self.is_local else _NEVER_MS
        if not self.is_local:
            self._socket.heartbeat_ivl = _HEARTBEAT_MS
            self._socket.heartbeat_timeout = 3 * _HEARTBEAT_MS
            self._socket.connect_timeout = _CONNECT_MS
            self._socket.ipv6 = "[" in self.endpoint
        if self._keys:
            self._socket.curve_serverkey = self._keys.server.encode()
            self._socket.curve_publickey = self._keys.pair.public.encode()
            self._socket.curve_secretkey = self._keys.pair.secret.encode()
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._monitor.linger = 0
        try:
            self._socket.connect(self.endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def _know(self, event: int, fd: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self._forget()
            self._fd = fd
            self._ledger.open(fd)
        elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            self._forget()

    def _forget(self) -> None:
        self._ledger.close(self._fd)
        self._fd = -1

    def _check_unfinished(self) -> None:
        """Raises Failure for a message whose parts have no end: libzmq would hold them all."""
        now = time.monotonic()
        try:
            connection = socket.socket(fileno=self._fd)
        except OSError:
            return  # it is closed; the event that says so comes
        try:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_BYTES.size)
        except OSError:
            return
        finally:
            connection.detach()  # it is libzmq's
        if len(info) == _RECEIVED_BYTES.size:
            (received_bytes,) = _RECEIVED_BYTES.unpack(info)
            self._ledger.came_in(self._fd, received_bytes, now)
            if self._ledger.to_end(now):
                self._give_up("this is not a vmapipe archiver: its messages have no end")

    def _take(self, event: int) -> None:
        match event:
            case zmq.EVENT_CONNECTED:
                self._was_reached, self._missing_since = True, None
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._was_up = True
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._give_up(
                    "the archiver does not know our key; its administrator has to put our "
                    "client.pub into the folder clients of its keys"
                )
            case zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED:
                self.lost = not self.is_local
                if self._missing_since is None:
                    self._missing_since = time.monotonic()
            # Later the same comes of a bad network.
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if self._was_up:
                self.lost = True
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                wanted = "CURVE (--keys)" if self._keys else "plain ZeroMQ (--insecure-plain-tcp)"
                self._give_up(f"the peer does not speak {wanted}")
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if self._was_up or self.is_local:
                self.lost = not self.is_local
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self.lost = True
                now = time.monotonic()
                self._hang_ups.append(now)
                if len(self._hang_ups) >= _HANG_UPS and now - self._hang_ups[0] >= _HANG_UPS_S:
                    self._give_up(
                        "the peer closes the connection; is its key the one in our server.pub, and "
                        "was it started with --keys?"
                        if self._keys
                        else "the peer closes the connection: it may not speak plain ZeroMQ "
                        "(--insecure-plain-tcp); was it started with --keys?"
                    )

    def _check_missing(self, missing_s: float) -> None:
        """Decide after `missing_s` without a connection: fail, or go on waiting by the heartbeat."""
        if missing_s < self._connect_timeout_s:
            return
        self._missing_since = time.monotonic()  # the next look is as far away
        # libzmq does not say why a connection cannot be made: try it once without it.
        host, _, port = self.endpoint.removeprefix("tcp://").rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), _PROBE_S):
                pass  # just now
        except OSError as error:
            if isinstance(error, ConnectionRefusedError) or not self._was_reached:
                self._give_up(
                    f"cannot be reached within {self._connect_timeout_s} s: "
                    f"{os_error_text(error)}; is an archiver running there?"
                )

    def _give_up(self, reason: str) -> NoReturn:
        self._linger_ms = 0  # no peer will take our last words
        raise Failure(f"{self.endpoint}: {reason}")
