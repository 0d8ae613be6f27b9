# SPDX-License-Identifier: Apache-2.0
"""The service's sockets: one that all peers come to, and one to an archiver for each producer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import zmq

from vmapipe.archiver.connections import Connections
from vmapipe.archiver.gate import Gate
from vmapipe.archiver.link import DEAD_MS, HEARTBEAT_MS, make_way
from vmapipe.protocol import limits
from vmapipe.protocol.frames import Part
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.keys import ServerKeys

# How long a closing socket may still deliver its last words.
_LINGER_MS = 2000
# Messages a peer may have waiting here: we pass them on at once, so that only a
# flood ever fills it, and each may have 4 MiB.
_RECEIVE_MARK = 8
# Answers waiting for a peer that does not read, or from an archiver: see archiver/link.py.
_ANSWER_MARK = 10_000
# Credit bounds what is under way to an archiver (jobs.SLACK_BYTES, counted with at
# least 72 bytes a message): this is an assertion above it.
_FORWARD_MARK = 500_000
# Messages taken in one turn, from all peers or from one archiver, so that
# everybody gets a turn.
_TURN = 64
# CURVE is work: a thread for it, and one for the sockets beside it.
_IO_THREADS = 2
# A connection must have proved who it is by then.
_HANDSHAKE_MS = 10_000
# CURVE adds 33 bytes to a part (nonce, flags, authenticator), and ZeroMQ counts them.
_CURVE_BYTES = 64
# Sockets of one context; the descriptors that a process may have are a closer bound.
_MAX_SOCKETS = 65_000

# Connections of clients: twenty jobs have some sixty, and each takes 2 descriptors.
_MAX_CLIENTS = 4096

Frames = Sequence[zmq.Frame]


class FrontLink:
    """ROUTER, bound to the service's endpoint, and a DEALER for each producer."""

    def __init__(self, endpoint: str, keys: ServerKeys | None) -> None:
        self._endpoint = endpoint
        #: Whether producers are on this host, so that memory can be shared.
        self.is_local = endpoint.startswith("ipc://")
        if self.is_local:
            make_way(endpoint.removeprefix("ipc://"))
        self._context = zmq.Context(_IO_THREADS)
        self._context.max_sockets = _MAX_SOCKETS
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = _LINGER_MS
        self._socket.rcvhwm = _RECEIVE_MARK
        self._socket.sndhwm = _ANSWER_MARK
        self._socket.maxmsgsize = limits.MAX_PAYLOAD_BYTES + _CURVE_BYTES
        self._socket.handshake_ivl = _HANDSHAKE_MS
        if not self.is_local:
            self._socket.heartbeat_ivl = HEARTBEAT_MS
            self._socket.heartbeat_timeout = DEAD_MS
            self._socket.ipv6 = "[" in endpoint
        self._gate = Gate(self._context, keys) if keys else None
        if self._gate:
            self._gate.secure(self._socket)
        # On one host only its owner can open the socket's folder.
        self._connections = (
            None if self.is_local else Connections(self._socket, most_proven=_MAX_CLIENTS)
        )
        # The socket file is for its owner alone.
        old_mask = os.umask(0o077)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise Failure(f"cannot listen on {endpoint}: {error.strerror}") from error
        finally:
            os.umask(old_mask)
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}
        self._peers: dict[zmq.Socket[bytes], bytes] = {}
        self._ready: list[zmq.Socket[bytes]] = []
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        if self._gate:
            self._poller.register(self._gate.socket, zmq.POLLIN)
        if self._connections:
            self._poller.register(self._connections.monitor, zmq.POLLIN)

    @property
    def endpoint(self) -> str:
        """The endpoint as bound: a port of 0 or * has become a real one."""
        return self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def watch(self, fd: int) -> None:
        """Let `wait` also end when `fd` becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._poller.unregister(fd)

    def wait(self, timeout_s: float) -> None:
        ready = self._poller.poll(int(timeout_s * 1000))
        self._ready = [sock for sock, _ in ready if sock in self._peers]
        if self._gate:
            self._gate.answer()
        if self._connections:
            self._connections.look()

    def receive(self) -> Iterator[tuple[bytes, str, list[zmq.Frame]]]:
        """What has come: (peer, client, parts), the parts as ZeroMQ received them."""
        for _ in range(_TURN):
            # Asking first is quicker than an exception for "nothing there".
            if not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                return
            peer, *parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            if self._connections:
                self._connections.heard(peer)
            client = self._gate.name_of(peer) if self._gate else ""
            if client is not None:
                yield peer.bytes, client, parts

    def answers(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """What archivers have said: (to which peer, parts)."""
        for sock in self._ready:
            for _ in range(_TURN):
                peer = self._peers.get(sock)
                if peer is None or not int(sock.get(zmq.EVENTS)) & zmq.POLLIN:
                    break
                yield peer, sock.recv_multipart(zmq.NOBLOCK)

    def attach(self, peer: bytes, endpoint: str) -> None:
        """Open a connection to an archiver for what this peer sends."""
        sock = self._context.socket(zmq.DEALER)
        sock.linger = _LINGER_MS
        sock.sndhwm = _FORWARD_MARK
        sock.rcvhwm = _ANSWER_MARK
        sock.maxmsgsize = limits.MAX_CONTROL_BYTES
        sock.connect(endpoint)
        self._dealers[peer] = sock
        self._peers[sock] = peer
        self._poller.register(sock, zmq.POLLIN)

    def detach(self, peer: bytes) -> None:
        sock = self._dealers.pop(peer)
        del self._peers[sock]
        self._poller.unregister(sock)
        sock.close()

    def forward(self, peer: bytes, parts: Frames) -> None:
        """Pass a message on to the peer's archiver, without a copy."""
        # Above the mark it is lost; the archiver then misses its number, and says so.
        with contextlib.suppress(zmq.Again):
            self._dealers[peer].send_multipart(parts, zmq.NOBLOCK, copy=False)

    def send(self, peer: bytes, parts: Sequence[Part]) -> None:
        """A peer that is gone loses its message."""
        self._socket.send_multipart([peer, *parts])

    def revoked(self, now: float) -> list[str]:
        """Clients that are no longer on the list. Each once."""
        return self._gate.revoked(now) if self._gate else []

    def take_notices(self) -> list[str]:
        """What is worth a line in the log, once."""
        watchers = [watcher for watcher in (self._gate, self._connections) if watcher]
        return [text for watcher in watchers for text in watcher.take_notices()]

    def close(self) -> None:
        self._context.destroy(linger=_LINGER_MS)
        if self.is_local:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._endpoint.removeprefix("ipc://"))
