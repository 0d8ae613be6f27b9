# SPDX-License-Identifier: Apache-2.0
"""The start of a ZMTP 3 connection (ZeroMQ's RFC 37; CURVE: RFC 26), as a relay between client and socket sees it. Pure.

The first messages of a client have known forms and lengths. So a relay in front of a
ZeroMQ socket can tell when the socket has accepted a client, and never holds or passes on
more than a few hundred bytes of a client that it has not accepted: libzmq's own limit is
that of the largest message.
"""

from __future__ import annotations

import enum

GREETING_BYTES = 64
# The longest command of a client before it is accepted: CURVE's INITIATE is 257 bytes
# and its metadata, of which a name chosen by the client has at most 255.
MAX_COMMAND_BYTES = 1024

_MECHANISM = slice(12, 32)
_AS_SERVER = 32
_COMMAND, _LONG = 0x04, 0x02
_CURVE_HELLO_BYTES = 200


class HandshakeRefused(Exception):
    """The bytes are not the opening of a connection that may be passed on."""


class Stage(enum.Enum):
    GREETING = "its greeting is awaited"
    COMMAND = "its first command is awaited"
    #: `pending` is to be passed on to the socket, which has received nothing before.
    QUEUED = "it waits to be connected to the socket"
    AUTHENTICATING = "the socket authenticates it"
    ACCEPTED = "the socket has accepted it"


def greeting(*, curve: bool) -> bytes:
    """Return the greeting of a server: the same from every libzmq since 4.2."""
    mechanism = b"CURVE" if curve else b"NULL"
    head = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x01" + mechanism.ljust(20, b"\0")
    return (head + bytes([curve])).ljust(GREETING_BYTES, b"\0")


class ConnectionOpening:
    """The opening of one connection: `receive` takes the client's bytes, `answered` the socket's."""

    def __init__(self, *, curve: bool) -> None:
        self.stage = Stage.GREETING
        #: Bytes to pass on to the socket next.
        self.pending = b""
        #: The socket has rejected it with an ERROR command.
        self.rejected = False
        #: The last command that the socket needs for its decision was passed on.
        self.is_authenticating = False
        self._curve = curve
        self._held = b""
        self._from_socket = b""
        self._greeted = False

    def is_accepted(self) -> bool:
        """The socket has accepted it: all further bytes are passed on as they are."""
        return self.stage is Stage.ACCEPTED

    @property
    def wanted_bytes(self) -> int:
        """How many bytes may be read from the client now."""
        return max(0, GREETING_BYTES + MAX_COMMAND_BYTES - len(self._held) - len(self.pending))

    def receive(self, data: bytes) -> None:
        """The client says this. Raises Refused."""
        self._held += data
        if self.stage is Stage.GREETING:
            self._check_greeting(self._held[:GREETING_BYTES])
            if len(self._held) >= GREETING_BYTES:
                self.pending, self._held = (
                    self._held[:GREETING_BYTES],
                    self._held[GREETING_BYTES:],
                )
                self.stage = Stage.COMMAND
        if self.stage is Stage.COMMAND:
            command = self._take_command(b"HELLO" if self._curve else b"READY")
            if command:
                self.pending += command
                self.stage = Stage.QUEUED
                self.is_authenticating = not self._curve
        if self.stage is Stage.AUTHENTICATING:
            self._receive_command()

    def take_pending(self) -> bytes:
        """Return the bytes for the socket, which is connected now."""
        self.stage = Stage.AUTHENTICATING
        data, self.pending = self.pending, b""
        return data

    def answered(self, data: bytes) -> bytes:
        """Take bytes from the socket; return those for the client, which has our greeting already."""
        self._from_socket += data
        if not self._greeted:
            if len(self._from_socket) < GREETING_BYTES:
                return b""
            self._greeted = True
            self._from_socket = self._from_socket[GREETING_BYTES:]
        out = b""
        while self.stage is not Stage.ACCEPTED and (size := _command_bytes(self._from_socket)):
            command, self._from_socket = self._from_socket[:size], self._from_socket[size:]
            out += command
            name = _name(command)
            if name == b"READY":
                self.stage = Stage.ACCEPTED
                self.pending, self._held = self._held, b""
            elif name == b"ERROR":
                self.rejected = True
        if self.stage is Stage.ACCEPTED:
            out, self._from_socket = out + self._from_socket, b""
        return out

    def _receive_command(self) -> None:
        if not self.is_authenticating:
            command = self._take_command(b"INITIATE")
            if command:
                self.pending += command
                self.is_authenticating = True
        if len(self._held) > MAX_COMMAND_BYTES:
            raise HandshakeRefused("it sends more than is needed before it is accepted")

    def _take_command(self, name: bytes) -> bytes:
        """The next command if it is there whole. Raises Refused for another one."""
        held = self._held
        if not held:
            return b""
        if held[0] not in (_COMMAND, _COMMAND | _LONG):
            raise HandshakeRefused("data before the connection is accepted")
        size = _command_bytes(held, whole=False)
        if size > MAX_COMMAND_BYTES or (
            name == b"HELLO" and size and size != 2 + _CURVE_HELLO_BYTES
        ):
            raise HandshakeRefused("a command that is too long for an opening")
        start = _body_at(held)
        want = bytes([len(name)]) + name
        if not want.startswith(held[start : start + len(want)]):
            raise HandshakeRefused("an unexpected command")
        if not size or len(held) < size:
            return b""
        command, self._held = held[:size], held[size:]
        if name == b"READY" and _has_identity(command[start + len(want) :]):
            raise HandshakeRefused("an identity of its own choice, which could be another peer's")
        return command

    def _check_greeting(self, said: bytes) -> None:
        """Return the properties that are there. Raises Refused."""
        wanted = greeting(curve=self._curve)
        # The eight bytes between are a length for older protocols.
        if said[:1] != b"\xff"[: len(said)] or (len(said) > 9 and said[9] != 0x7F):
            raise HandshakeRefused("not a greeting of ZMTP 3")
        if len(said) > 10 and said[10] < 3:
            raise HandshakeRefused("an older ZMTP than 3")
        part = said[_MECHANISM]
        if part != wanted[_MECHANISM][: len(part)]:
            raise HandshakeRefused("another security mechanism")
        if len(said) > _AS_SERVER and said[_AS_SERVER]:
            raise HandshakeRefused("it greets as a server")


def _body_at(data: bytes) -> int:
    return 9 if data[0] & _LONG else 2


def _command_bytes(data: bytes, *, whole: bool = True) -> int:
    """The length of a frame with its header; 0: not known yet, or (`whole`) not all there."""
    if len(data) < 2:
        return 0
    if data[0] & _LONG:
        if len(data) < 9:
            return 0
        size = 9 + int.from_bytes(data[1:9], "big")
    else:
        size = 2 + data[1]
    return size if not whole or len(data) >= size else 0


def _name(command: bytes) -> bytes:
    body = command[_body_at(command) :]
    return body[1 : 1 + body[0]] if body and command[0] & _COMMAND else b""


def _has_identity(metadata: bytes) -> bool:
    """Return whether there is a property `Identity` that is not empty. Raises Refused for no metadata."""
    at = 0
    while at < len(metadata):
        name_end = at + 1 + metadata[at]
        value_at = name_end + 4
        if value_at > len(metadata):
            raise HandshakeRefused("metadata that ends too early")
        size = int.from_bytes(metadata[name_end:value_at], "big")
        if metadata[at + 1 : name_end].lower() == b"identity" and size:
            return True
        at = value_at + size
    if at > len(metadata):
        raise HandshakeRefused("metadata that ends too early")
    return False
