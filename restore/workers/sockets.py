# SPDX-License-Identifier: Apache-2.0
"""The sockets between reader and workers. The only file of this room that knows ZeroMQ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import zmq

from vmapipe.protocol.limits import MAX_CONTROL_BYTES
from vmapipe.protocol.restore import MAX_SETUP_BYTES
from vmapipe.protocol.schema import Part
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import made_with
from vmapipe.runtime.process import require_memory

# How long a closing socket may still deliver its last messages.
_LINGER_MS = 2000


class ReaderLink:
    """ROUTER, bound to an ipc endpoint. Workers are known by their names."""

    def __init__(self, endpoint: str) -> None:
        require_memory()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = _LINGER_MS
        # What is under way is bounded by the work handed out, so the marks
        # must never be met: a ROUTER would lose messages.
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = MAX_CONTROL_BYTES
        try:
            with made_with(0o700):
                self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise Failure(f"cannot listen on {endpoint}: {error.strerror}") from error

    def wait(self, timeout_s: float, fds: Sequence[int]) -> None:
        """Until a message or something on one of `fds` is there to be read."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        for fd in fds:
            poller.register(fd, zmq.POLLIN)
        poller.poll(int(timeout_s * 1000) + 1 if timeout_s > 0 else 0)

    def receive(self) -> Iterator[tuple[str, list[Part]]]:
        """Yield what has come, as (worker, parts)."""
        while True:
            try:
                worker, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield worker.decode("ascii", "replace"), list(parts)

    def send(self, worker: str, parts: Sequence[Part]) -> None:
        """Raises Failure when the worker is gone."""
        try:
            self._socket.send_multipart([worker.encode("ascii"), *parts])
        except zmq.ZMQError as error:
            raise Failure(f"{worker} cannot be reached: {error.strerror}") from error

    def close(self, *, in_order: bool) -> None:
        """`in_order`: what was sent is still delivered, for some seconds at most."""
        self._context.destroy(linger=_LINGER_MS if in_order else 0)


class WorkerLink:
    """DEALER, connected to the reader."""

    def __init__(self, endpoint: str, name: str) -> None:
        require_memory()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = _LINGER_MS
        self._socket.identity = name.encode("ascii")
        self._socket.maxmsgsize = MAX_SETUP_BYTES
        # The reader binds a moment after it has started us; 100 ms would be felt.
        self._socket.reconnect_ivl = 10
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise Failure(f"cannot connect to {endpoint}: {error.strerror}") from error
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, fd: int) -> None:
        """Let `wait` also end when `fd` becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        self._poller.poll(int(timeout_s * 1000))

    def receive(self) -> list[Part] | None:
        """Return one message; None when there is none."""
        try:
            return list(self._socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def send(self, parts: Sequence[Part]) -> None:
        self._socket.send_multipart(parts)

    def close(self, *, in_order: bool) -> None:
        self._context.destroy(linger=_LINGER_MS if in_order else 0)
