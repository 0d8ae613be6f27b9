# SPDX-License-Identifier: Apache-2.0
"""The TCP port of a listening socket: the acceptor's process, as its parent sees it.

The budget divides the descriptors that a process may have: unauthenticated
connections get the smallest part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import time
from typing import NamedTuple

from vmapipe.runtime.children import STOP_S, Child
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Finished, finished_command
from vmapipe.runtime.folders import OwnFolder

# Descriptors that are needed for a moment, whatever else is open: to start a child (ten), to read
# the list of keys, an archive's folder, the host's memory.
RESERVE = 16
# With less a job of one disk would not fit.
_LEAST = 24
# Handshakes that are under way. Each is milliseconds of work and may hold 1 KiB; the
# producers of the largest job come together, and wait for each other.
_MOST_AUTHENTICATING = 64
# Connections whose first command is awaited: in the acceptor's process, where they cost
# a descriptor and some 2 KiB each.
_MOST_GREETING = 1024
# Descriptors that an accepted connection takes in the acceptor: two sockets, and every second one a
# pipe; those that send little need none.
_PER_CONNECTION = 3
# Accepted connections that have sent no message yet.
_MOST_SILENT = 32
# Connections that were refused and are not closed yet.
_MOST_UNASSIGNED = 64


class DescriptorBudget(NamedTuple):
    """How many descriptors each kind of connection may have.

    In the acceptor: `greeting` and `authenticating` connections (see acceptor.py), `connections`
    that were passed on, and `pipes` for those with much data. Of the passed-on ones `silent` have
    sent nothing, `unassigned` belong to no job, and `jobs` are for jobs. `rest`: descriptors of the
    ZeroMQ process for jobs, with their connections.
    """

    greeting: int
    authenticating: int
    connections: int
    pipes: int
    silent: int
    unassigned: int
    jobs: int
    rest: int


def budget_of(limit: int, in_use: int) -> DescriptorBudget:
    """`limit`: how many descriptors each of the two processes may have. Raises Failure."""
    spare = limit - in_use - RESERVE
    if spare < _LEAST:
        raise Failure(
            f"only {limit} files may be open here, and an archiver that listens on TCP needs "
            f"{in_use + RESERVE + _LEAST} or more: raise the limit (`ulimit -n`, LimitNOFILE= of a "
            "unit)"
        )
    greeting = min(_MOST_GREETING, limit // 8)
    connections = (limit - RESERVE - 2 * greeting) // _PER_CONNECTION
    authenticating = min(_MOST_AUTHENTICATING, max(2, connections // 8))
    silent = min(_MOST_SILENT, max(1, connections // 8))
    unassigned = min(_MOST_UNASSIGNED, max(2, connections // 8))
    others = authenticating + silent + unassigned
    return DescriptorBudget(
        greeting,
        authenticating,
        connections,
        connections // 2,
        silent,
        unassigned,
        max(2, connections - others),
        spare - others,
    )


# The system's own bound (net.core.somaxconn) is usually the same.
_BACKLOG = 4096
# Another program that has the port keeps it; the acceptor of a killed process leaves within this.
_LEAVES_S = 1.0
# An acceptor that was killed is started anew, but not again and again.
_AGAIN_S = 1.0
# Descriptors that libzmq takes when it starts, its socket and the gate: counted.
_LIBZMQ_DESCRIPTORS = 16
# Addresses that are remembered while their connections are authenticated.
_MAX_AUTHENTICATING = 1024


class TcpPort:
    """`inner`: where the ZeroMQ socket listens. `authenticating`: addresses that it decides about."""

    def __init__(self, endpoint: str, *, curve: bool, most_unfinished_bytes: int) -> None:
        """Takes the port. Raises Failure."""
        self._curve = curve
        self._most_unfinished_bytes = most_unfinished_bytes
        self.authenticating: list[str] = []
        #: Connections by the name of their inner half, and the bytes that each has sent.
        self.carried: dict[str, int] = {}
        self._notices: list[str] = []
        self._listener = _listen(endpoint)
        host, port = self._listener.getsockname()[:2]
        #: With the address that a name or a star stands for.
        self.endpoint = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        try:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            in_use = len(os.listdir("/proc/self/fd")) + _LIBZMQ_DESCRIPTORS
            self.budget: DescriptorBudget = budget_of(limit, in_use)
            # A process that can open the socket in it bypasses the acceptor.
            self._folder = OwnFolder("port")
        except BaseException:
            self._listener.close()
            raise
        self.inner = f"ipc://{self._folder.path}/in.sock"
        self._child: Child | None = None
        self._started_at = float("-inf")
        self._start()

    @property
    def fd(self) -> int:
        """A descriptor that is readable when there is something to `poll`; -1: there is none now."""
        return -1 if self._child is None else self._child.socket.fileno()

    def answer(self, finished: Finished) -> None:
        """Let the acceptor read on; if the answer is lost, it asks again."""
        if self._child is not None:
            self._child.tell(finished_command(finished))

    def poll(self) -> None:
        """Read the acceptor's events; start it anew if it is gone."""
        if self._child is None:
            if time.monotonic() - self._started_at > _AGAIN_S:
                with contextlib.suppress(OSError):
                    self._start()
            return
        events, ending = self._child.read_events()
        for event in events:
            match event:
                case {"event": "notice", "text": str(text)}:
                    self._notices.append(text)
                case {"event": "carried", "name": str(name), "bytes": int(sent_bytes)}:
                    self.carried[name] = sent_bytes
                case {"event": "authenticating", "address": str(address)}:
                    self.authenticating = [*self.authenticating, address][-_MAX_AUTHENTICATING:]
                case {"event": "decided", "address": str(address)} if (
                    address in self.authenticating
                ):
                    self.authenticating.remove(address)
        if ending:
            self._reap(self._child)
            self._notices.append(
                f"the process that takes connections has ended ({self._child.verdict() or 'no error'})"
                " and is started anew; clients connect again by themselves"
            )
            self._child, self.authenticating = None, []

    def take_notices(self) -> list[str]:
        """Return new lines for the log, each once."""
        notices, self._notices = self._notices, []
        return notices

    def close(self) -> None:
        """Close the port after the inner socket: its last messages go out."""
        self._listener.close()
        if self._child is not None:
            with contextlib.suppress(OSError):
                self._child.socket.shutdown(socket.SHUT_WR)
            self._reap(self._child)
        self._folder.remove()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        budget = self.budget
        fd = self._listener.fileno()
        argv = [f"--listener-fd={fd}", f"--path={self.inner.removeprefix('ipc://')}"]
        argv += [
            f"--most-greeting={budget.greeting}",
            f"--most-authenticating={budget.authenticating}",
        ]
        argv += [f"--most-pipes={budget.pipes}", f"--most={budget.connections}"]
        argv += [f"--most-unfinished={self._most_unfinished_bytes}"]
        argv += [*(["--curve"] if self._curve else [])]
        self._child = Child(
            "the acceptor of connections",
            "vmapipe.archiver.listener.acceptor",
            argv,
            [fd],
            fork=True,
        )

    @staticmethod
    def _reap(child: Child) -> None:
        if not child.reap(STOP_S):
            child.send_signal(signal.SIGKILL)
            child.reap(STOP_S)


def _listen(endpoint: str) -> socket.socket:
    """Raises Failure."""
    try:
        family, address = _address_of(endpoint)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # [::] is every address that this host has.
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            _bind(listener, address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise Failure(f"cannot listen on {endpoint}: {os_error_text(error)}") from error
    return listener


def _bind(listener: socket.socket, address: tuple[str, int]) -> None:
    """Bind, and wait a moment for the acceptor of a process that was killed just now."""
    deadline = time.monotonic() + _LEAVES_S
    while True:
        try:
            listener.bind(address)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(_LEAVES_S / 20)


def _address_of(endpoint: str) -> tuple[int, tuple[str, int]]:
    """`tcp://HOST:PORT`, with an address, a name, * or a network interface. Raises OSError."""
    host, _, text = endpoint.removeprefix("tcp://").rpartition(":")
    port = 0 if text == "*" else int(text)
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    if host in dict(socket.if_nameindex()).values():
        import psutil

        for each in psutil.net_if_addrs().get(host, ()):
            if each.family == socket.AF_INET:
                host = each.address
                break
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return family, (str(address[0]), port)
