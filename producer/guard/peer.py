# SPDX-License-Identifier: Apache-2.0
"""The guard's end of a connection to a backup process: packets, and nothing that waits for it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence

from vmapipe.protocol.guard import MAX_PACKET_BYTES, FromGuard, ToGuard, decode_for_guard, encode
from vmapipe.runtime.syscalls import receive_fds

_MAX_FDS = 4


class GuardPeer:
    """One backup process. Whatever it does, `send` returns at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._outbox: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._courier: threading.Thread | None = None
        self._closed = False

    @property
    def backlog(self) -> int:
        """Messages that it has not taken yet."""
        return len(self._outbox)

    def wait_for_room(self, backlog: int, timeout_s: float) -> bool:
        """Wait until it has taken all but so many messages; False: it has not, in that time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or len(self._outbox) <= backlog, max(0.0, timeout_s)
            )

    def send(self, message: FromGuard, fds: Sequence[int] = ()) -> None:
        """Send now if possible, else by a thread, in order. A peer that is gone is not an error here."""
        packet = encode(message)
        with self._changed:
            if self._closed:
                return
            if not self._outbox:
                try:
                    if fds:
                        socket.send_fds(self._socket, [packet], fds)
                    else:
                        self._socket.send(packet, socket.MSG_DONTWAIT)
                    return
                except BlockingIOError:
                    pass
                except OSError:
                    # Whatever it is: a message that is lost would be waited for.
                    self.close()
                    return
            self._outbox.append(packet)
            if self._courier is None:
                courier = threading.Thread(target=self._deliver, name="guard-courier", daemon=True)
                try:
                    courier.start()
                except (RuntimeError, MemoryError):
                    # No thread can be had: the backup ends, and the guest goes on.
                    self.close()
                    return
                self._courier = courier
            self._changed.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                while not self._outbox and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                packet = self._outbox[0]
            try:
                self._socket.send(packet)
            except OSError:
                self.close()
                return
            with self._changed:
                self._outbox.popleft()
                self._changed.notify_all()

    def receive(self, timeout_s: float | None = None) -> tuple[ToGuard, list[int]] | None:
        """One message and its descriptors; None: the peer is gone.

        Raises RemoteProtocolError, and TimeoutError.
        """
        if timeout_s is not None:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            if not poller.poll(timeout_s * 1000):
                raise TimeoutError
        try:
            packet, fds = receive_fds(self._socket, MAX_PACKET_BYTES, _MAX_FDS)
        except OSError:
            return None
        if not packet:
            return None
        try:
            return decode_for_guard(packet), fds
        except BaseException:
            close_all(fds)
            raise

    def close(self) -> None:
        """Ends the connection; a thread in `receive` wakes up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
