# SPDX-License-Identifier: Apache-2.0
"""A small NBD client for tests: a blocking socket with our codec on it."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.protocol.nbd.server import receive_exactly
from vmapipe.protocol.nbd.client_handshake import Goal, NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_SUCCESS,
    Bytes,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.reply import Hole, ReplyEvent, RequestDone, RequestFailed, Status
from vmapipe.protocol.nbd.session import NbdSession, encode_request

# The most that qemu's own client has under way.
DEPTH = 16


def shake_hands(connection: socket.socket, handshake: NbdClientHandshake) -> None:
    try:
        while handshake.wanted_bytes:
            data = connection.recv(handshake.wanted_bytes)
            if not data:
                handshake.eof()
            connection.sendall(handshake.feed(data))
    except (NbdProtocolError, NbdRefusedError) as error:
        connection.sendall(error.unsent)
        raise


def explore(path: Path, name: str, goal: Goal) -> NbdClientHandshake:
    """What a server tells without a transmission phase."""
    handshake = NbdClientHandshake(name, goal=goal)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        shake_hands(connection, handshake)
    return handshake


class Client:
    """One connection, while the `with` lasts."""

    def __init__(self, path: Path, name: str = "", *, structured: bool = True) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(60)  # far above --guest-wait's 20 s
            self._socket.connect(str(path))
            handshake = NbdClientHandshake(name, structured=structured)
            shake_hands(self._socket, handshake)
        except BaseException:
            self._socket.close()
            raise
        assert handshake.session is not None
        assert handshake.unread == b""
        self.session: NbdSession = handshake.session
        self._codec = NbdClientTransmission(self.session)
        # Where the data of a read goes, by cookie: the export's offset, and the memory.
        self._targets: dict[int, tuple[int, memoryview]] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._socket.fileno() >= 0:
                self._socket.sendall(self._codec.disconnect())
        finally:
            self._socket.close()

    def begin_write(self, offset: int, data: Bytes) -> None:
        """A write that is not waited for: `wait` does that."""
        self._send(NBD_CMD_WRITE, offset, len(data), 0, data)

    def wait(self) -> None:
        """Until nothing is under way any more."""
        self._wait()

    def read_past(self, offset: int, length: int) -> bytearray:
        """Read while other requests are under way, and wait for this one only."""
        content = bytearray(b"?" * length)
        before = self._codec.in_flight
        self._read_into(memoryview(content), offset)
        while self._codec.in_flight > before:
            self._receive()
        return content

    @property
    def under_way(self) -> int:
        """Requests that are not answered yet."""
        return self._codec.in_flight

    def send_raw(self, data: Bytes) -> None:
        """Whatever one likes."""
        self._socket.sendall(data)

    def abandon(self) -> None:
        """Gone without a word."""
        self._socket.close()

    def command(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        """One request without data, to its end. Raises OSError with the NBD error number."""
        self._send(kind, offset, length, flags)
        self._wait()

    def write(self, offset: int, data: Bytes, flags: int = 0) -> None:
        self._send(NBD_CMD_WRITE, offset, len(data), flags, data)
        self._wait()

    def read_all(self, piece_bytes: int) -> bytearray:
        """The whole export, with DEPTH requests under way."""
        size_bytes = self.session.export.size_bytes
        content = bytearray(b"?" * size_bytes)
        for offset in range(0, size_bytes, piece_bytes):
            length = min(piece_bytes, size_bytes - offset)
            while self._codec.in_flight >= DEPTH:
                self._receive()
            self._read_into(memoryview(content)[offset : offset + length], offset)
        self._wait()
        return content

    def read(self, offset: int, length: int, flags: int = 0) -> bytearray:
        content = bytearray(b"?" * length)
        self._read_into(memoryview(content), offset, flags)
        self._wait()
        return content

    def extents(self) -> list[tuple[int, int, int]]:
        """Offset, length and flags of the whole export."""
        size_bytes = self.session.export.size_bytes
        found: list[tuple[int, int, int]] = []
        at = 0
        while at < size_bytes:
            length = min(size_bytes - at, 1 << 30)
            self._send(NBD_CMD_BLOCK_STATUS, at, length)
            for event in self._wait():
                if isinstance(event, Status):
                    for extent_bytes, flags in event.extents():
                        found.append((at, extent_bytes, flags))
                        at += extent_bytes
        return found

    def _read_into(self, target: memoryview, offset: int, flags: int = 0) -> None:
        request = self._codec.request(NBD_CMD_READ, offset, len(target), flags)
        self._targets[request.cookie] = offset, target
        self._socket.sendall(encode_request(request))

    def _send(self, kind: int, offset: int, length: int, flags: int = 0, data: Bytes = b"") -> None:
        request = self._codec.request(kind, offset, length, flags)
        self._socket.sendall(encode_request(request))
        self._socket.sendall(data)

    def _wait(self) -> list[ReplyEvent]:
        events: list[ReplyEvent] = []
        while self._codec.in_flight:
            events += self._receive()
        for event in events:
            if isinstance(event, RequestDone) and event.error != NBD_SUCCESS:
                words = [e.message for e in events if isinstance(e, RequestFailed)]
                raise OSError(event.error, ", ".join(words))
        return events

    def _receive(self) -> list[ReplyEvent]:
        payload = self._codec.payload
        if payload:
            base, target = self._targets[payload.cookie]
            count = self._socket.recv_into(target[payload.offset - base :][: payload.length])
            if not count:
                raise EOFError
            events = self._codec.took(count)
        else:
            head = bytearray(self._codec.wanted_bytes)
            receive_exactly(self._socket, memoryview(head))
            events = list(self._codec.feed(head))
        for event in events:
            if isinstance(event, Hole):
                base, target = self._targets[event.cookie]
                start = event.offset - base
                target[start : start + event.length] = bytes(event.length)
        return events
