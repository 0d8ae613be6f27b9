# SPDX-License-Identifier: Apache-2.0
"""A tiny NBD server for tests: a thread a connection, a disk in memory, the codec between them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.protocol.nbd.disk import Disk
from vmapipe.protocol.nbd.constants import NBD_CMD_DISC, Bytes
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import REQUEST_BYTES, Export, NbdSession, parse_request


class DiskServer:
    """Serves while the `with` lasts. What a connection's thread met goes to `faults`."""

    def __init__(
        self, path: Path, disk: Disk, exports: Sequence[Export], *, structured: bool = True
    ) -> None:
        self.path = path
        self.uri = f"nbd+unix:///{exports[0].name}?socket={path}"
        self.sessions: list[NbdSession] = []
        self.faults: list[str] = []
        self._disk = disk
        self._exports = exports
        self._structured = structured
        self._listener = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> DiskServer:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        self._listener.close()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                session = self._shake_hands(connection)
                if session:
                    self.sessions.append(session)
                    self._transmit(connection, session)
            except NbdProtocolError as error:
                self.faults.append(str(error))
            except (EOFError, ConnectionError):
                pass  # gone without a word, or without waiting for one: NBD_OPT_ABORT

    def _shake_hands(self, connection: socket.socket) -> NbdSession | None:
        handshake = NbdServerHandshake(self._exports, structured=self._structured)
        connection.sendall(handshake.greeting())
        while handshake.wanted_bytes:
            data = connection.recv(handshake.wanted_bytes)
            if not data:
                raise EOFError
            connection.sendall(handshake.feed(data))
        return handshake.session

    def _transmit(self, connection: socket.socket, session: NbdSession) -> None:
        """The hot path, as it is meant: nothing is copied but what the disk wants."""
        header = bytearray(REQUEST_BYTES)
        while True:
            receive_exactly(connection, memoryview(header))
            request = parse_request(header)
            if request.type == NBD_CMD_DISC:
                return
            payload = bytearray(request.payload_bytes)
            if payload:
                receive_exactly(connection, memoryview(payload))
            send_all(connection, self._disk.answer(session, request, payload))


def receive_exactly(connection: socket.socket, target: memoryview) -> None:
    """Raises EOFError."""
    while target:
        count = connection.recv_into(target)
        if not count:
            raise EOFError
        target = target[count:]


def send_all(connection: socket.socket, parts: list[Bytes]) -> None:
    """A few parts at a time, as many as `sendmsg` takes."""
    views = [memoryview(part) for part in parts if part]
    while views:
        sent = connection.sendmsg(views[:100])
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]
