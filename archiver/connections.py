# SPDX-License-Identifier: Apache-2.0
"""Who is connected to a listening socket: by the descriptor that libzmq has for each.

Behind an acceptor (acceptor.py), which lets in only as many as there is room for.
What is left to do here: somebody who was let in and says nothing makes room for
others, nobody has a name of its own choice, and whoever has gone is known to
have gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct

import zmq

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
# The name that a peer has chosen for itself. libzmq would take it, and give it the
# answers for another peer that had this name, or end the process when the name that
# it is about to choose itself is taken.
_NAME_PROPERTY = "Identity"
# Of whom something may still come after they have gone.
_MAX_GONE = 4096


class Connections:
    """Register `monitor` in the poller, and call `look` when it is readable.

    `most_silent`: connections that have not said anything yet.
    """

    def __init__(self, listener: zmq.Socket[bytes], most_silent: int) -> None:
        self._listener = listener
        self._most_silent = most_silent
        # Descriptors of libzmq's, in the order of their coming.
        self._silent: dict[int, None] = {}
        self._peers: dict[int, bytes] = {}
        self._fds: dict[bytes, int] = {}
        # Those that have gone, and whether what they had sent is still heard.
        self._left: dict[bytes, bool] = {}
        self._gone: list[bytes] = []
        self._said = False
        self._notices: list[str] = []
        self.monitor = listener.get_monitor_socket(_EVENTS)
        self.monitor.linger = 0

    @property
    def count(self) -> int:
        return len(self._silent) + len(self._peers)

    def look(self) -> None:
        """Take in what has happened."""
        while self.monitor.poll(0):
            self._take(*_EVENT.unpack(self.monitor.recv_multipart()[0]))

    def heard(self, frame: zmq.Frame) -> bool:
        """A message came from `frame`; False when its sender must not be listened to."""
        peer = frame.bytes
        if peer in self._fds:
            return True
        if peer in self._left:
            return self._left[peer]
        try:
            fd = int(str(frame.get(_FD_PROPERTY)))
        except zmq.ZMQError:
            return False  # ZMTP 1.0, which has no properties and which nobody lets in
        # What has happened before the message came: its number may have been another's.
        self.look()
        if _has_own_name(frame):
            self._notice_name()
            if fd in self._silent:
                del self._silent[fd]
                self._shut(fd)
            return False
        if fd in self._peers:
            # That one has gone, and had said something which came only afterwards.
            self._forget(self._peers.pop(fd))
        elif fd in self._silent:
            del self._silent[fd]
        else:
            self._leave(peer)  # it has gone already
            return True
        self._peers[fd] = peer
        self._fds[peer] = fd
        return True

    def drop(self, peer: bytes) -> None:
        """End this peer's connection, and listen to it no more; it may come again over a new one."""
        # If it has gone already, its number may be another's.
        self.look()
        fd = self._fds.get(peer)
        if fd is not None:
            del self._peers[fd]
            self._forget(peer)
            self._shut(fd)
        self._leave(peer, is_heard=False)

    def take_gone(self) -> list[bytes]:
        """Peers whose connection has ended since; what they had sent may still come."""
        gone, self._gone = self._gone, []
        return gone

    def take_notices(self) -> list[str]:
        """What is worth a line in the log, once."""
        notices, self._notices = self._notices, []
        return notices

    def _take(self, event: int, fd: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._silent[fd] = None
            if len(self._silent) > self._most_silent:
                oldest = next(iter(self._silent))
                # At once: of a burst each must make room for one.
                del self._silent[oldest]
                self._shut(oldest)
        elif event == zmq.EVENT_DISCONNECTED:
            self._silent.pop(fd, None)
            peer = self._peers.pop(fd, None)
            if peer is not None:
                self._forget(peer)

    def _forget(self, peer: bytes) -> None:
        del self._fds[peer]
        self._leave(peer)

    def _leave(self, peer: bytes, *, is_heard: bool = True) -> None:
        if peer not in self._left:
            self._gone.append(peer)
        self._left[peer] = is_heard
        if len(self._left) > _MAX_GONE:
            del self._left[next(iter(self._left))]

    def _shut(self, fd: int) -> None:
        """End a connection of libzmq's, which then closes it.

        It may have done so already, and the number may be another file's: only a
        connection to our own socket is touched. Whoever is met by mistake comes again.
        """
        endpoint = self._listener.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        path = endpoint.removeprefix("ipc://")
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                return
            with socket.socket(fileno=os.dup(fd)) as connection:
                if connection.family == socket.AF_UNIX and connection.getsockname() == path:
                    connection.shutdown(socket.SHUT_RDWR)

    def _notice_name(self) -> None:
        if not self._said:
            self._said = True
            self._notices.append("refused a connection that wants a name of its own choice")


def _has_own_name(frame: zmq.Frame) -> bool:
    try:
        return bool(str(frame.get(_NAME_PROPERTY)))
    except zmq.ZMQError:
        return False
