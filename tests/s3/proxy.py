# SPDX-License-Identifier: Apache-2.0
"""Between a client and its store: passes requests on, but for the faults that a test has planned."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# No test takes so long; only a hang meets it.
_LIMIT_S = 60.0
_PIECE_BYTES = 64 << 10


@dataclass
class Fault:
    """At the next `times` requests that `where` ("METHOD path?query") matches, something happens.

    `what`: "cut request" (in the middle of its body), "cut answer" (in the
    middle of its body), "lost answer" (the store has done it, nobody hears),
    "late answer" (the store has done it, and `released` is waited for),
    "refused" (closed at once), "stall" (no answer until the end), "wrong etag",
    a status like "503", or "chatter" (a refusal with very many words).
    """

    where: str
    what: str
    times: int = 1
    fired: threading.Event = field(default_factory=threading.Event)


class FaultyProxy:
    def __init__(self, upstream: int, tls: ssl.SSLContext | None = None) -> None:
        self.faults: list[Fault] = []
        #: "METHOD path?query range" of all requests, in order.
        self.requests: list[str] = []
        self.body_bytes_out = 0
        self._lock = threading.Lock()
        self.released = threading.Event()
        proxy = self

        class Handler(_Handler):
            def __init__(self, *args: object) -> None:
                self.proxy = proxy
                self.upstream = upstream
                super().__init__(*args)  # type: ignore[arg-type]

        self._server = _Server(("127.0.0.1", 0), Handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def fault_for(self, request: str) -> str:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.where, request):
                    fault.times -= 1
                    fault.fired.set()
                    return fault.what
        return ""

    def plan(self, where: str, what: str, times: int = 1) -> Fault:
        self.faults.append(Fault(where, what, times))
        return self.faults[-1]

    @property
    def unfired(self) -> list[Fault]:
        return [fault for fault in self.faults if not fault.fired.is_set()]

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()
        self._thread.join(_LIMIT_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._open: set[socket.socket] = set()

    def process_request(self, request: object, client_address: object) -> None:
        if isinstance(request, socket.socket):
            self._open.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def end_connections(self) -> None:
        """Those that a client keeps open for later would keep their threads."""
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    upstream: int

    def do_any(self) -> None:
        span = self.headers.get("Range", "")
        what = self.proxy.fault_for(f"{self.command} {self.path} {span}".strip())
        length = int(self.headers.get("Content-Length") or 0)
        body = (
            b"" if what == "refused" else self.rfile.read(length // (1 + (what == "cut request")))
        )
        if what == "stall":
            self.proxy.released.wait(_LIMIT_S)
        # The client may have been killed, too.
        if len(body) < length or what in ("refused", "stall"):
            self._hang_up()
        elif what.isdigit():
            self._refuse(int(what))
        elif what == "chatter":
            words = b"<Error><Code>Chatter</Code><Message>%b</Message></Error>"
            self._refuse(400, words % (b"bla\x0a" * (1 << 20)))
        else:
            self._pass_on(body, what)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any  # noqa: N815  the names http.server wants

    def _pass_on(self, body: bytes, what: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=_LIMIT_S)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if what == "lost answer":
            self._hang_up()
            return
        if what == "late answer":
            self.proxy.released.wait(_LIMIT_S)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() in ("transfer-encoding", "connection", "server", "date"):
                continue
            if name.lower() == "content-length" and self.command != "HEAD":
                continue
            wrong = what == "wrong etag" and name.lower() == "etag"
            self.send_header(name, f'"{"0" * 32}"' if wrong else value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if what == "cut answer":
            self.wfile.write(data[: len(data) // 2])
            self._hang_up()
            return
        self.wfile.write(data)
        with self.proxy._lock:
            self.proxy.body_bytes_out += len(data)

    def _refuse(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: what counts is in `requests`."""


@contextlib.contextmanager
def proxy_to(port: int, tls: ssl.SSLContext | None = None) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(port, tls)
    try:
        yield proxy
    finally:
        proxy.close()
    assert proxy.unfired == [], "planned, but never happened"
