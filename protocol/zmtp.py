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
# The longest of a client's words before it is let in: CURVE's INITIATE is 257 bytes
# and its metadata, of which a name chosen by the client has at most 255.
MAX_WORD_BYTES = 1024

_MECHANISM = slice(12, 32)
_AS_SERVER = 32
_COMMAND, _LONG = 0x04, 0x02
_CURVE_HELLO_BYTES = 200


class HandshakeRefused(Exception):
    """What came is not the opening of a connection that we want."""


class Stage(enum.Enum):
    GREETING = "its greeting is awaited"
    WORD = "its first word is awaited"
    #: `pending` is to be passed on to the socket, which was not troubled before.
    KNOCKED = "it waits to be let in"
    PROVING = "the socket decides"
    IN = "it is let in"


def greeting(*, curve: bool) -> bytes:
    """What a server says first. The same from every libzmq since 4.2."""
    mechanism = b"CURVE" if curve else b"NULL"
    head = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x01" + mechanism.ljust(20, b"\0")
    return (head + bytes([curve])).ljust(GREETING_BYTES, b"\0")


class ConnectionOpening:
    """One connection's. Give `hear` what the client says and `answered` what the socket says."""

    def __init__(self, *, curve: bool) -> None:
        self.stage = Stage.GREETING
        #: What the socket has to be given next.
        self.pending = b""
        #: It was shown out by the socket, with a word of that.
        self.shown_out = False
        #: The socket decides about it now: its last word before it is let in was passed on.
        self.is_judged = False
        self._curve = curve
        self._held = b""
        self._said = b""
        self._greeted = False

    def is_in(self) -> bool:
        """The socket has let it in: all that either of them says now is for the other."""
        return self.stage is Stage.IN

    @property
    def wanted_bytes(self) -> int:
        """At most so much may be read from the client now."""
        return max(0, GREETING_BYTES + MAX_WORD_BYTES - len(self._held) - len(self.pending))

    def hear(self, data: bytes) -> None:
        """The client says this. Raises Refused."""
        self._held += data
        if self.stage is Stage.GREETING:
            self._check_greeting(self._held[:GREETING_BYTES])
            if len(self._held) >= GREETING_BYTES:
                self.pending, self._held = (
                    self._held[:GREETING_BYTES],
                    self._held[GREETING_BYTES:],
                )
                self.stage = Stage.WORD
        if self.stage is Stage.WORD:
            word = self._take_word(b"HELLO" if self._curve else b"READY")
            if word:
                self.pending += word
                self.stage = Stage.KNOCKED
                self.is_judged = not self._curve
        if self.stage is Stage.PROVING:
            self._go_on()

    def let_in(self) -> bytes:
        """The socket is connected to: this is for it."""
        self.stage = Stage.PROVING
        data, self.pending = self.pending, b""
        return data

    def answered(self, data: bytes) -> bytes:
        """The socket says this; returns what of it is for the client, who has our greeting."""
        self._said += data
        if not self._greeted:
            if len(self._said) < GREETING_BYTES:
                return b""
            self._greeted = True
            self._said = self._said[GREETING_BYTES:]
        out = b""
        while self.stage is not Stage.IN and (size := _word_bytes(self._said)):
            word, self._said = self._said[:size], self._said[size:]
            out += word
            name = _name(word)
            if name == b"READY":
                self.stage = Stage.IN
                self.pending, self._held = self._held, b""
            elif name == b"ERROR":
                self.shown_out = True
        if self.stage is Stage.IN:
            out, self._said = out + self._said, b""
        return out

    def _go_on(self) -> None:
        if not self.is_judged:
            word = self._take_word(b"INITIATE")
            if word:
                self.pending += word
                self.is_judged = True
        if len(self._held) > MAX_WORD_BYTES:
            raise HandshakeRefused("it says more than anybody has to before it is let in")

    def _take_word(self, name: bytes) -> bytes:
        """The next word if it is there whole. Raises Refused for another one."""
        held = self._held
        if not held:
            return b""
        if held[0] not in (_COMMAND, _COMMAND | _LONG):
            raise HandshakeRefused("no command where one has to be")
        size = _word_bytes(held, whole=False)
        if size > MAX_WORD_BYTES or (name == b"HELLO" and size and size != 2 + _CURVE_HELLO_BYTES):
            raise HandshakeRefused("a command of that length is none of an opening")
        start = _body_at(held)
        want = bytes([len(name)]) + name
        if not want.startswith(held[start : start + len(want)]):
            raise HandshakeRefused("another command than the one that has to be")
        if not size or len(held) < size:
            return b""
        word, self._held = held[:size], held[size:]
        if name == b"READY" and _has_identity(word[start + len(want) :]):
            raise HandshakeRefused("a name of its own choice, which could be another one's")
        return word

    def _check_greeting(self, said: bytes) -> None:
        """What is there of it. Raises Refused."""
        wanted = greeting(curve=self._curve)
        # The eight bytes between are a length for older protocols.
        if said[:1] != b"\xff"[: len(said)] or (len(said) > 9 and said[9] != 0x7F):
            raise HandshakeRefused("no greeting of ZMTP 3")
        if len(said) > 10 and said[10] < 3:
            raise HandshakeRefused("an older ZMTP than 3")
        part = said[_MECHANISM]
        if part != wanted[_MECHANISM][: len(part)]:
            raise HandshakeRefused("another way to prove who one is")
        if len(said) > _AS_SERVER and said[_AS_SERVER]:
            raise HandshakeRefused("it greets as a server")


def _body_at(data: bytes) -> int:
    return 9 if data[0] & _LONG else 2


def _word_bytes(data: bytes, *, whole: bool = True) -> int:
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


def _name(word: bytes) -> bytes:
    body = word[_body_at(word) :]
    return body[1 : 1 + body[0]] if body and word[0] & _COMMAND else b""


def _has_identity(metadata: bytes) -> bool:
    """Whether there is a property `Identity` that is not empty. Raises Refused for no metadata."""
    at = 0
    while at < len(metadata):
        name_end = at + 1 + metadata[at]
        value_at = name_end + 4
        if value_at > len(metadata):
            raise HandshakeRefused("metadata that end too early")
        size = int.from_bytes(metadata[name_end:value_at], "big")
        if metadata[at + 1 : name_end].lower() == b"identity" and size:
            return True
        at = value_at + size
    if at > len(metadata):
        raise HandshakeRefused("metadata that end too early")
    return False
