# SPDX-License-Identifier: Apache-2.0
"""The service's sockets: one that all peers come to, and one to an archiver for each producer."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence

import zmq

from vmapipe.archiver.listening import ANSWER_MARK, LINGER_MS, TURN, ListeningSocket
from vmapipe.protocol import limits
from vmapipe.runtime.keys import ServerKeys

# We pass messages on at once, so that only a flood ever fills it, and each may have 4 MiB.
_RECEIVE_MARK = 8
# Credit bounds what is under way to an archiver (jobs.SLACK_BYTES, counted with at
# least 72 bytes a message): this is an assertion above it.
_FORWARD_MARK = 500_000
# CURVE is work: a thread for it, and one for the sockets beside it.
_IO_THREADS = 2
# Sockets of one context; the descriptors that a process may have are a closer bound.
_MAX_SOCKETS = 65_000

Frames = Sequence[zmq.Frame]


class FrontLink(ListeningSocket):
    """All peers come to its endpoint; and there is a DEALER for each producer."""

    def __init__(self, endpoint: str, keys: ServerKeys | None) -> None:
        """Raises Failure."""
        super().__init__(
            endpoint,
            keys,
            receive_mark=_RECEIVE_MARK,
            io_threads=_IO_THREADS,
            max_sockets=_MAX_SOCKETS,
        )
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}
        self._peers: dict[zmq.Socket[bytes], bytes] = {}
        self._ready: list[zmq.Socket[bytes]] = []

    def wait(self, timeout_s: float) -> list[tuple[object, int]]:
        ready = super().wait(timeout_s)
        self._ready = [
            sock for sock, _ in ready if isinstance(sock, zmq.Socket) and sock in self._peers
        ]
        return ready

    def receive(self) -> Iterator[tuple[bytes, str, list[zmq.Frame]]]:
        """What has come: (peer, client, parts), the parts as ZeroMQ received them."""
        return self._messages()

    def answers(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """What archivers have said: (to which peer, parts)."""
        for sock in self._ready:
            for _ in range(TURN):
                peer = self._peers.get(sock)
                if peer is None or not int(sock.get(zmq.EVENTS)) & zmq.POLLIN:
                    break
                yield peer, sock.recv_multipart(zmq.NOBLOCK)

    def attach(self, peer: bytes, endpoint: str) -> bool:
        """Open a connection to an archiver for what this peer sends; False: no descriptor is left."""
        try:
            sock = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return False
        sock.linger = LINGER_MS
        sock.sndhwm = _FORWARD_MARK
        sock.rcvhwm = ANSWER_MARK
        sock.maxmsgsize = limits.MAX_CONTROL_BYTES
        sock.connect(endpoint)
        self._dealers[peer] = sock
        self._peers[sock] = peer
        self._poller.register(sock, zmq.POLLIN)
        return True

    def detach(self, peer: bytes) -> None:
        sock = self._dealers.pop(peer)
        del self._peers[sock]
        self._poller.unregister(sock)
        sock.close()

    def forward(self, peer: bytes, parts: Frames) -> None:
        """Pass a message on to the peer's archiver, without a copy."""
        # Above the mark it is lost; the archiver then misses its number, and says so.
        dealer = self._dealers.get(peer)
        with contextlib.suppress(zmq.Again):
            if dealer is not None:
                dealer.send_multipart(parts, zmq.NOBLOCK, copy=False)
