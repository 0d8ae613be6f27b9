# SPDX-License-Identifier: Apache-2.0
"""Clients that read nothing, say nothing or come in crowds: nobody else waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmapipe.control.qmp import clients as module
from vmapipe.control.qmp.clients import MAX_CLIENTS, MAX_UNREAD_BYTES, Client, Clients
from vmapipe.control.qmp.server import DeferredAnswer
from vmapipe.control.qmp.sockets import listen_unix
from vmapipe.runtime.syscalls import readable

LIMIT_S = 60.0


class Server:
    """In this thread: it serves when a test says so."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.later: list[DeferredAnswer] = []
        self.gone: list[Client] = []
        self.notices: list[str] = []
        listener = listen_unix(self.path, 0o600, socket.SOCK_STREAM)
        commands = {"wait": self._wait, "long": lambda arguments: "x" * 100_000}
        self.clients = Clients(
            listener, lambda client: commands, self.gone.append, self.notices.append
        )

    def _wait(self, arguments: dict[str, Any]) -> DeferredAnswer:
        self.later.append(DeferredAnswer())
        return self.later[-1]

    def run(self) -> None:
        """All that there is to do now."""
        for _ in range(3):
            self.clients.serve(0)
            self.clients.go_on()

    def connect(self, *, negotiate: bool = True) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(LIMIT_S)
        sock.connect(self.path)
        self.run()
        if negotiate:
            sock.sendall(b'{"execute": "qmp_capabilities"}')
            self.run()
            assert b'{"return": {}}' in sock.recv(1 << 16)
        return sock


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "s")
    with made.clients:
        yield made


def is_gone(sock: socket.socket) -> bool:
    """The server has closed the connection; what was under way is read first."""
    sock.setblocking(False)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        try:
            while sock.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
    return True


def test_a_client_that_does_not_read_events_is_dropped_at_a_bound(server: Server) -> None:
    with server.connect() as deaf, server.connect() as other:
        told = 0
        while not server.gone:
            server.clients.send_event("BACKUP_PROGRESS", {"n": told})
            server.run()
            other.recv(1 << 16)
            told += 1
            assert told * 100 < 4 * MAX_UNREAD_BYTES, "it is never dropped"
            server.clients.send_event("X", {"filler": "x" * 10_000})
            server.run()
            while len(other.recv(1 << 16)) == 1 << 16:
                pass
        assert is_gone(deaf)
        other.sendall(b'{"execute": "query-version"}')
        server.run()
        assert b"package" in other.recv(1 << 16)


def test_a_client_that_is_slow_gets_everything(server: Server) -> None:
    with server.connect() as slow:
        slow.sendall(b'{"execute": "long"}' * 5)
        server.run()
        data = b""
        while data.count(b"\n") < 5:
            data += slow.recv(1 << 16)
            server.run()
        assert all(json.loads(line)["return"] == "x" * 100_000 for line in data.splitlines())


def test_one_that_never_negotiates_is_dropped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.connect(negotiate=False) as silent, server.connect() as other:
        monkeypatch.setattr(module, "_NEGOTIATE_S", 0.0)
        server.run()
        assert is_gone(silent)
        assert not is_gone(other)


def test_a_newcomer_takes_the_place_of_the_one_that_was_silent_longest(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(server.connect()) for _ in range(MAX_CLIENTS)]
        with socket.socket(socket.AF_UNIX) as refused:
            refused.connect(server.path)
            server.run()
            assert is_gone(refused)
        monkeypatch.setattr(module, "_IDLE_S", 0.0)
        newcomer = stack.enter_context(server.connect())
        assert is_gone(crowd[0])
        assert not is_gone(crowd[1])
        assert not is_gone(newcomer)


def test_a_client_that_leaves_while_its_answer_is_awaited_is_forgotten(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(b'{"execute": "wait"}')
        server.run()
    server.run()
    assert len(server.gone) == 1
    server.later[0].answer(1)
    server.run()


def test_descriptors_that_nobody_asked_for_are_closed(server: Server) -> None:
    ours, theirs = socket.socketpair()
    with server.connect() as sock, ours:
        with theirs:
            for _ in range(40):
                socket.send_fds(sock, [b" "], [theirs.fileno()])
                server.run()
        sock.close()
        server.run()
        ours.settimeout(LIMIT_S)
        assert ours.recv(1) == b""


def test_a_server_without_descriptors_does_not_ask_in_a_circle_and_goes_on_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic

    def later(seconds: float) -> None:
        """A pause of the server is over by then, and nobody is idle for too long yet."""
        monkeypatch.setattr(time, "monotonic", lambda: clock() + seconds)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with server.connect() as other, socket.socket(socket.AF_UNIX) as newcomer:
        newcomer.settimeout(LIMIT_S)
        newcomer.connect(server.path)
        # Not one more than there are; the highest counts.
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            server.run()
            # Said once, however often it is met.
            later(10)
            server.run()
            assert server.notices == ["a client has to wait: Too many open files"]
            # Nothing is left that would wake its owner, and whoever is there is served.
            assert not readable([server.clients.fd], 0)
            other.sendall(b'{"execute": "query-version"}')
            server.run()
            assert b"package" in other.recv(1 << 16)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        later(20)
        server.run()
        assert b"QMP" in newcomer.recv(1 << 16)
