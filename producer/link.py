# SPDX-License-Identifier: Apache-2.0
"""The producer's socket to the archiver. The only file of this room that knows ZeroMQ."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from vmapipe.protocol import limits
from vmapipe.protocol.frames import Part

# How long a closing socket may still deliver its last words.
_LINGER_MS = 2000
# pyzmq's zero-copy costs a few microseconds a part; a copy of less is cheaper.
_ZERO_COPY_BYTES = 64 * 1024


class Link:
    """DEALER, connected to one archiver. Closing it in vain delays by 2 s at most."""

    def __init__(self, endpoint: str) -> None:
        #: Whether the archiver is on this host, so that memory can be shared.
        self.is_local = endpoint.startswith("ipc://")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = _LINGER_MS
        # Credit bounds what is under way; the mark is an assertion far above it.
        self._socket.sndhwm = 100_000
        self._socket.maxmsgsize = limits.MAX_CONTROL_BYTES
        # The archiver may bind a moment after we start; 100 ms would be felt.
        self._socket.reconnect_ivl = 10
        try:
            self._socket.connect(endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, fd: int) -> None:
        """Let `wait` also end when `fd` becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        self._poller.poll(int(timeout_s * 1000) + 1 if timeout_s > 0 else 0)

    def send(self, parts: Sequence[Part]) -> None:
        """The memory of a large part must not change before it is acknowledged."""
        last = len(parts) - 1
        for index, part in enumerate(parts):
            self._socket.send(
                part,
                zmq.SNDMORE if index < last else 0,
                copy=len(part) < _ZERO_COPY_BYTES,
            )

    def receive(self) -> list[bytes] | None:
        """One message, or None when there is none."""
        # Asking first is quicker than an exception for "nothing there".
        if not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            return None
        return self._socket.recv_multipart(zmq.NOBLOCK)

    def close(self) -> None:
        self._context.destroy(linger=_LINGER_MS)
