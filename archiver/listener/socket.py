# SPDX-License-Identifier: Apache-2.0
"""A listening ZeroMQ socket and its limits: which peers connect, how many, how much each may send.

An archiver of one job and a service have this in common; the security of the port is here, in
curve.py, unfinished.py and in the process that takes the connections (acceptor.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zmq

from vmapipe.protocol import limits, unfinished
from vmapipe.protocol.schema import Part
from vmapipe.protocol.unfinished import MessageLedger
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Finished
from vmapipe.runtime.folders import made_with
from vmapipe.runtime.process import require_memory

if TYPE_CHECKING:
    from vmapipe.archiver.listener.curve import CurveAuthenticator
    from vmapipe.archiver.listener.tcp import DescriptorBudget, TcpPort
    from vmapipe.runtime.keys import ServerKeys

# How long a closing socket may still deliver its last words.
LINGER_MS = 2000
# Answers waiting for a peer that does not read; above it ZeroMQ drops them.
# Grants are cumulative, so an honest peer never has more than a few hundred.
ANSWER_MARK = 10_000
# The same for one that comes over TCP: each is some hundred bytes, of thousands of peers.
_ANSWER_MARK_AFAR = 1000
# What encryption adds to a message (RFC 26: a name, a nonce, a tag, flags; 33
# bytes), rounded up: ZeroMQ closes a connection whose message is larger than allowed.
_CURVE_BYTES = 64
# As numbers: pyzmq's own flags take a microsecond each time they are combined.
_POLLIN, _NOBLOCK = int(zmq.POLLIN), int(zmq.NOBLOCK)
# Messages taken in one turn, so that everything else gets its.
TURN = 64
# A connection must be authenticated within this time. Honest peers need a few
# milliseconds and four messages.
_HANDSHAKE_MS = 10_000
# Connections of the acceptor that ZeroMQ has not accepted yet.
_BACKLOG = 1024
# Producers hear by these that the connection is alive (producer/connection.py).
_HEARTBEAT_MS = 3000
# A connection that is dead takes a descriptor and nothing else. Behind a slow
# network the largest frame may take minutes, and no beat overtakes it.
_DEAD_MS = 300_000


def make_way(path: str) -> None:
    """ZeroMQ removes whatever has the socket's name: let that be a dead socket and nothing else."""
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return  # nothing there; or bind will say what is wrong
    if not is_socket:
        raise Failure(f"cannot listen on ipc://{path}: a file of that name exists")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return
    raise Failure(f"cannot listen on ipc://{path}: another process listens there")


class ListeningSocket:
    """ROUTER, bound to one endpoint. With `keys` only the clients on their list come in.

    `receive_mark`: messages a peer may have waiting here before its connection
    is no longer read; an honest one is bounded by its credit, a hostile one by
    this.
    """

    def __init__(
        self,
        endpoint: str,
        keys: ServerKeys | None,
        *,
        receive_mark: int,
        io_threads: int = 1,
        max_sockets: int = 0,
        from_afar: bool = False,
    ) -> None:
        """Raises Failure. `max_sockets`: of the context; 0: as ZeroMQ has it.

        `from_afar`: behind ipc:// there is a relay, whose peers are on other hosts.
        """
        self._asked = endpoint
        #: True: peers are on this host, so that memory can be shared.
        self.is_local = endpoint.startswith("ipc://")
        if self.is_local:
            make_way(endpoint.removeprefix("ipc://"))
        # Before libzmq has threads: a copy of this process would lack them.
        self._port = None if self.is_local else _tcp_port(endpoint, keys)
        #: How this process divides its descriptors; None for a socket of this host only.
        self.budget: DescriptorBudget | None = self._port.budget if self._port else None
        try:
            if not self.is_local or from_afar:
                _seed_names()
            require_memory(1 + io_threads)
            self._context = zmq.Context(io_threads)
            if max_sockets:
                self._context.max_sockets = max_sockets
            #: Among what `wait` returns when messages are there.
            self.socket = self._context.socket(zmq.ROUTER)
            self._set_options(receive_mark)
            self._curve: CurveAuthenticator | None = None
            if keys:
                from vmapipe.archiver.listener.curve import CurveAuthenticator

                self._curve = CurveAuthenticator(self._context, keys)
                self._curve.secure(self.socket)
            # On one host only its owner can open the socket's folder.
            self._connections = (
                Connections(
                    self.socket, self._port.budget.authenticating + self._port.budget.silent
                )
                if self._port
                else None
            )
            self._bind(self._port.inner if self._port else endpoint)
        except BaseException:
            if self._port:
                self._port.close()
            raise
        self._poller = zmq.Poller()
        self._port_fd = -1
        self._poller.register(self.socket, zmq.POLLIN)
        if self._curve:
            self._poller.register(self._curve.socket, zmq.POLLIN)
        if self._connections:
            self._poller.register(self._connections.monitor, zmq.POLLIN)
        if self._port:
            self._watch_port(self._port.fd)

    def _set_options(self, receive_mark: int) -> None:
        self.socket.linger = LINGER_MS
        self.socket.rcvhwm = receive_mark
        self.socket.sndhwm = ANSWER_MARK if self.is_local else _ANSWER_MARK_AFAR
        self.socket.maxmsgsize = limits.MAX_PAYLOAD_BYTES + _CURVE_BYTES
        self.socket.handshake_ivl = _HANDSHAKE_MS
        if not self.is_local:
            self.socket.backlog = _BACKLOG
            self.socket.heartbeat_ivl = _HEARTBEAT_MS
            self.socket.heartbeat_timeout = _DEAD_MS

    @property
    def endpoint(self) -> str:
        """The endpoint as bound: a port of 0 or * has become a real one."""
        if self._port:
            return self._port.endpoint
        return self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def watch(self, fd: int) -> None:
        """Let `wait` also end when `fd` becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._poller.unregister(fd)

    def wait(self, timeout_s: float) -> list[tuple[object, int]]:
        """Wait until something is ready; return that: what was registered, each with its events."""
        ready: list[tuple[object, int]] = list(self._poller.poll(int(timeout_s * 1000)))
        if self._port:
            self._port.poll()
            self._watch_port(self._port.fd)
            if self._connections and self._port.carried:
                # Who has come must be known before what it has sent.
                self._connections.poll()
                now = time.monotonic()
                for name, sent_bytes in self._port.carried.items():
                    self._port.answer(self._connections.carried(name, sent_bytes, now))
                self._port.carried.clear()
                self._connections.end_unfinished(now)
        if self._curve:
            self._curve.answer(self._port.authenticating if self._port else ())
        if self._connections:
            self._connections.poll()
        return ready

    def _watch_port(self, fd: int) -> None:
        """Wake up for the acceptor's questions; it may have been started anew."""
        if fd != self._port_fd:
            if self._port_fd >= 0:
                self._poller.unregister(self._port_fd)
            if fd >= 0:
                self._poller.register(fd, zmq.POLLIN)
            self._port_fd = fd

    def send(self, peer: bytes, parts: Sequence[Part]) -> None:
        """A peer that is gone loses its message; the heartbeat will tell."""
        self.socket.send_multipart([peer, *parts])

    def revoked(self, now: float) -> list[str]:
        """Clients that are no longer on the list; nothing more comes from them. Each once."""
        return self._curve.revoked(now) if self._curve else []

    def take_notices(self) -> list[str]:
        """Return new lines for the log, each once."""
        watchers = [w for w in (self._curve, self._connections, self._port) if w]
        return [text for watcher in watchers for text in watcher.take_notices()]

    def drop(self, peer: bytes) -> None:
        """End this peer's connection; it may come again."""
        if self._connections:
            self._connections.drop(peer)

    def gone(self) -> list[bytes]:
        """Peers whose connection has ended; what they had sent may still come. Each once."""
        return self._connections.take_gone() if self._connections else []

    def close(self) -> None:
        self._context.destroy(linger=LINGER_MS)
        if self._port:
            self._port.close()
        if self.is_local:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._asked.removeprefix("ipc://"))

    def take_message(self) -> tuple[bytes, str, list[zmq.Frame]] | None:
        """The next message: (peer, client, parts); None when nothing more is there now.

        The parts are as ZeroMQ received them. `client` is the name that the peer has
        proved to have; empty where no keys are asked for.
        """
        for _ in range(TURN):
            # Asking first is quicker than an exception for "nothing there".
            if not int(self.socket.get(zmq.EVENTS)) & _POLLIN:
                break
            peer, *parts = self.socket.recv_multipart(_NOBLOCK, copy=False)
            if self._connections:
                if not self._connections.heard(peer):
                    continue
                self._connections.took(peer.bytes, parts)
            client = self._curve.name_of(peer) if self._curve else ""
            if client is not None:
                return peer.bytes, client, parts
        return None

    def _bind(self, endpoint: str) -> None:
        # The socket file is for its owner alone.
        try:
            with made_with(0o700):
                self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise Failure(f"cannot listen on {endpoint}: {error.strerror}") from error


def _tcp_port(endpoint: str, keys: ServerKeys | None) -> TcpPort:
    """Raises Failure."""
    # Imported here: a backup on one host starts sooner without.
    from vmapipe.archiver.listener.tcp import TcpPort

    return TcpPort(
        endpoint,
        curve=keys is not None,
        most_unfinished_bytes=unfinished.MOST_TOGETHER_BYTES,
    )


def _seed_names() -> None:
    """Make the names that libzmq gives to peers unpredictable.

    It counts from what rand() of the C library gives first, which is always the same
    without a seed; and a peer that knows the next name can take it. On one host all peers are ours.
    """
    # Imported here: only a listener for other hosts needs it.
    import ctypes

    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4), "big")))


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
    """Register `monitor` in the poller, and call `poll` when it is readable.

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
        # The names of their other halves, and what was sent there and came out.
        self._names: dict[str, int] = {}
        self._name_of: dict[int, str] = {}
        self._ledger = MessageLedger(unfinished.MOST_BYTES, unfinished.MOST_TOGETHER_BYTES)
        self._unfinished = 0
        self._said = False
        self._notices: list[str] = []
        self.monitor = listener.get_monitor_socket(_EVENTS)
        self.monitor.linger = 0

    @property
    def count(self) -> int:
        return len(self._silent) + len(self._peers)

    def poll(self) -> None:
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
            return False  # ZMTP 1.0, which has no properties and is never let in
        # What has happened before the message came: its number may have been another's.
        self.poll()
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
        self.poll()
        fd = self._fds.get(peer)
        if fd is not None:
            del self._peers[fd]
            self._forget(peer)
            self._shut(fd)
        self._leave(peer, is_heard=False)

    def carried(self, name: str, sent_bytes: int, now: float) -> Finished:
        """So much has been sent over the connection of this name: return how much of it came out."""
        fd = self._names.get(name)
        if fd is None:
            return Finished(name, sent_bytes, -1)
        return Finished(name, sent_bytes, self._ledger.came_in(fd, sent_bytes, now))

    def end_unfinished(self, now: float) -> None:
        """End the connections that send messages without an end."""
        for fd in self._ledger.to_end(now):
            self._end_unfinished(fd)

    def took(self, peer: bytes, parts: Sequence[zmq.Frame]) -> None:
        """A message has come out."""
        out_bytes = sum(len(part) + unfinished.PART_BYTES for part in parts)
        self._ledger.came_out(self._fds.get(peer, -1), out_bytes, time.monotonic())

    def _know_name(self, fd: int) -> None:
        self._forget_name(fd)
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=fd)
            try:
                name = connection.getpeername()
            finally:
                connection.detach()  # it is libzmq's
            if isinstance(name, bytes) and name:
                text = name[1:].decode("ascii", "replace")
                self._names[text], self._name_of[fd] = fd, text
                self._ledger.open(fd)

    def _forget_name(self, fd: int) -> None:
        self._ledger.close(fd)
        name = self._name_of.pop(fd, None)
        if name is not None and self._names.get(name) == fd:
            del self._names[name]

    def _end_unfinished(self, fd: int) -> None:
        self._unfinished += 1
        # The first, the tenth, the hundredth: a log that peers can fill is no log.
        if str(self._unfinished).strip("0") == "1":
            self._notices.append(
                f"ended {self._unfinished} connection{'s' * (self._unfinished > 1)} whose messages had no end"
            )
        peer = self._peers.get(fd)
        if peer is not None:
            self.drop(peer)
        else:
            self._silent.pop(fd, None)
            self._shut(fd)
        self._forget_name(fd)

    def take_gone(self) -> list[bytes]:
        """Peers whose connection has ended since; what they had sent may still come."""
        gone, self._gone = self._gone, []
        return gone

    def take_notices(self) -> list[str]:
        """Return new lines for the log, each once."""
        notices, self._notices = self._notices, []
        return notices

    def _take(self, event: int, fd: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._silent[fd] = None
            self._know_name(fd)
            if len(self._silent) > self._most_silent:
                oldest = next(iter(self._silent))
                # At once: of a burst each must make room for one.
                del self._silent[oldest]
                self._shut(oldest)
        elif event == zmq.EVENT_DISCONNECTED:
            self._forget_name(fd)
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
