# SPDX-License-Identifier: Apache-2.0
"""Counts the connections of a listening socket, and keeps their number below a limit.

libzmq takes as many as come, until descriptors run out, and with them the
process that needs one for its archive. It has no limit of its own, and closing
its listening socket would end every connection. So those that are too many are
shut down from here: first whoever has been there longest without proving who it
is, so that there is always room for an honest one to do that.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct

import zmq

# Handshakes that are under way: an honest one takes milliseconds, and the
# producers of the largest job begin together.
MAX_UNPROVEN = 256
# An archive has at most 255 devices; as many again for those that come anew
# before their old connection is known to be dead.
MAX_PROVEN = 512

# Not EVENT_HANDSHAKE_FAILED_PROTOCOL: libzmq 4.3.5 tells it of a message that was
# garbled, too, and forgets over that to end the connection. When the peer ends it,
# the next heartbeat aborts the process ("Assertion failed: !_io_error").
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
# zmq_socket_monitor(3): an event and its value. pyzmq's own parser imports asyncio,
# which takes longer than all the rest of a start.
_EVENT = struct.Struct("=Hi")
# What libzmq writes on each message: the descriptor that it came from. (The event
# that tells of a handshake's success does not name it.)
_FD_PROPERTY = "__fd"


class Connections:
    """Register `monitor` in the poller, and call `look` when it is readable."""

    def __init__(
        self,
        listener: zmq.Socket[bytes],
        most_unproven: int = MAX_UNPROVEN,
        most_proven: int = MAX_PROVEN,
    ) -> None:
        self._listener = listener
        self._most_unproven = most_unproven
        self._most_proven = most_proven
        # Descriptors of libzmq's, in the order of their coming.
        self._unproven: dict[int, None] = {}
        self._proven: set[int] = set()
        #: Connections that ended without a message: junk, unknown keys, other protocols.
        self.refused = 0
        self._crowded = False
        self._notices: list[str] = []
        self.monitor = listener.get_monitor_socket(_EVENTS)
        self.monitor.linger = 0

    @property
    def count(self) -> int:
        return len(self._unproven) + len(self._proven)

    def look(self) -> None:
        """Take in what has happened."""
        while self.monitor.poll(0):
            self._take(*_EVENT.unpack(self.monitor.recv_multipart()[0]))

    def heard(self, frame: zmq.Frame) -> None:
        """A message came, so there was a handshake: who has sent it is no stranger."""
        try:
            fd = int(str(frame.get(_FD_PROPERTY)))
        except zmq.ZMQError:
            # ZMTP 1.0, which has no properties. Where there are no keys libzmq speaks it,
            # and takes much junk for it.
            return
        if fd in self._unproven:
            del self._unproven[fd]
            self._proven.add(fd)
            if len(self._proven) > self._most_proven:
                self._shut(fd)

    def take_notices(self) -> list[str]:
        """What is worth a line in the log, once."""
        notices, self._notices = self._notices, []
        return notices

    def _take(self, event: int, fd: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._unproven[fd] = None
            if len(self._unproven) > self._most_unproven:
                self._shut(next(iter(self._unproven)))
        elif event == zmq.EVENT_DISCONNECTED:
            self._proven.discard(fd)
            if fd in self._unproven:
                del self._unproven[fd]
                self._refuse()

    def _shut(self, fd: int) -> None:
        """End a connection of libzmq's, which then closes it.

        It may have done so already, and the number may be another file's: only a
        connection to our own port is touched. Whoever is met by mistake comes again.
        """
        if not self._crowded:
            self._crowded = True
            self._notices.append(f"more than {self.count - 1} connections: the oldest are closed")
        endpoint = self._listener.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        port = int(endpoint.rpartition(":")[2])
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                return
            with socket.socket(fileno=os.dup(fd)) as connection:
                if connection.family != socket.AF_UNIX and connection.getsockname()[1] == port:
                    connection.shutdown(socket.SHUT_RDWR)

    def _refuse(self) -> None:
        self.refused += 1
        # The first, the tenth, the hundredth: a log that strangers can fill is no log.
        if str(self.refused).strip("0") == "1":
            plural = "s" if self.refused > 1 else ""
            self._notices.append(
                f"refused {self.refused} connection{plural}: no known key, or none of our words"
            )
