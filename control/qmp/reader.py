# SPDX-License-Identifier: Apache-2.0
"""A reader of JSON objects from a peer's bytes, within limits. Pure.

For QEMU, the guest agent, our monitor and our running backups alike. An object
may stand on one line or on several (QEMU's -qmp-pretty), and need not be
followed by a line end. Whatever the peer sends, no more is held than the limits say.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

# All up to the next bracket outside of strings, in one step: an answer of 300 KiB has 20,000 brackets
# and five times as many strings. What stops it else is a quote: of a string that is not complete.
_UP_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_QUOTE = ord('"')
_IN_STRING = re.compile(rb'["\\]')
_WHITE = re.compile(rb"[ \t\r\n]*")
_VALUE_MARKS = (b",", b"[", b"{")
# Half of a character outside of Unicode's first plane: no text that can be printed or named.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A 64-bit number has at most these, with its sign.
_MOST_DIGITS = 20
# Of what cannot be read, so much may be shown.
SHOWN_BYTES = 200


class JsonLimits(NamedTuple):
    """The limits of one message."""

    most_bytes: int
    #: Python makes some 50 to 100 bytes of each value, however short it was.
    most_values: int
    most_depth: int


# The largest answers are those to query-block and query-named-block-nodes. QEMU 7.2 tells of each
# node in 450 bytes, and with query-block of each image of a chain in 450: 254 disks whose chains have
# 64 images come to 7.2 MiB. A value takes QEMU 15 bytes and more.
# Each image of a chain is nested in the one above it.
QMP_LIMITS = JsonLimits(most_bytes=8 << 20, most_values=500_000, most_depth=256)
# An agent's answers to what we ask are numbers, its errors some words; a job's and a monitor's
# answers some hundred bytes a disk.
SHORT_LIMITS = JsonLimits(most_bytes=1 << 20, most_values=50_000, most_depth=32)


class Unreadable(Exception):
    """Received bytes are not a valid object; the text says why, `said` is their beginning."""

    def __init__(self, text: str, said: bytes) -> None:
        super().__init__(text)
        self.said = said


class JsonReader:
    """Bytes in any pieces to objects: `feed`, then `next` until it returns None.

    After `next` has raised Unreadable nothing more can be read, unless some is dropped.
    """

    def __init__(self, limits: JsonLimits) -> None:
        self._limits = limits
        self._held = bytearray()
        self._begin()

    @property
    def held_bytes(self) -> int:
        """Bytes of objects that are not complete yet, or were not asked for."""
        return len(self._held)

    def feed(self, data: bytes) -> None:
        self._held += data

    def drop_to(self, mark: bytes) -> bool:
        """Drop all up to the last `mark`, and that; False: it is not there."""
        place = self._held.rfind(mark)
        if place >= 0:
            del self._held[: place + len(mark)]
            self._begin()
        return place >= 0

    def drop(self) -> None:
        """Drop all."""
        self._held.clear()
        self._begin()

    def next(self) -> dict[str, Any] | None:
        """Return the next object; None: there is none yet. Raises Unreadable."""
        message = self.next_bytes()
        return None if message is None else decode(message)

    def next_bytes(self) -> bytes | None:
        """Return the next object undecoded, for `decode`, which takes longer. Raises Unreadable."""
        if not self._depth:
            white = _WHITE.match(self._held)
            del self._held[: white.end() if white else 0]
            if self._held and self._held[0] != ord("{"):
                raise self._unreadable("it is not a JSON object")
        end = self._find_end()
        if (len(self._held) if end is None else end) > self._limits.most_bytes:
            raise self._unreadable(f"it has more than {self._limits.most_bytes:,} bytes")
        if end is None:
            return None
        message = bytes(self._held[:end])
        del self._held[:end]
        self._begin()
        if sum(map(message.count, _VALUE_MARKS)) > self._limits.most_values:
            raise Unreadable(self._too_many(), message[:SHOWN_BYTES])
        return message

    def _begin(self) -> None:
        self._seen = 0
        self._depth = 0
        self._opened = 0
        self._is_in_string = False

    def _find_end(self) -> int | None:
        """Find the end of the first object; scanned bytes are not scanned again."""
        while self._pass_string():
            match = _UP_TO_BRACKET.match(self._held, self._seen)
            self._seen = match.end() if match else self._seen
            if self._seen == len(self._held):
                return None
            mark = self._held[self._seen]
            self._seen += 1
            if mark == _QUOTE:
                self._is_in_string = True
            elif mark in b"{[":
                self._depth += 1
                self._opened += 1
                if self._opened > self._limits.most_values:
                    raise self._unreadable(self._too_many())
                if self._depth > self._limits.most_depth:
                    raise self._unreadable(f"it is nested deeper than {self._limits.most_depth}")
            else:
                self._depth -= 1
                if not self._depth:
                    return self._seen
        return None

    def _pass_string(self) -> bool:
        """Scan to the end of an open string; False: it is not there yet."""
        while self._is_in_string:
            match = _IN_STRING.search(self._held, self._seen)
            if match is None:
                # An escape may reach beyond what is there.
                self._seen = max(self._seen, len(self._held))
                return False
            self._seen = match.end()
            if match[0] == b"\\":
                self._seen += 1
            else:
                self._is_in_string = False
        return True

    def _too_many(self) -> str:
        return f"it has more than {self._limits.most_values:,} values"

    def _unreadable(self, text: str) -> Unreadable:
        return Unreadable(text, bytes(self._held[:SHOWN_BYTES]))


def read_object(text: str, limits: JsonLimits) -> dict[str, Any]:
    """Decode a text that is one object. Raises Unreadable."""
    reader = JsonReader(limits)
    reader.feed(text.encode(errors="replace"))
    found = reader.next()
    if found is None or reader.held_bytes:
        raise Unreadable("it is not one JSON object", text.encode(errors="replace")[:SHOWN_BYTES])
    return found


def decode(message: bytes) -> dict[str, Any]:
    """Decode what `next_bytes` has returned. Raises Unreadable."""
    try:
        return _decode(message)
    except ValueError as error:
        raise Unreadable(str(error), message[:SHOWN_BYTES]) from error


def _decode(message: bytes) -> dict[str, Any]:
    """Decode an object within limits. Raises ValueError with a text for people."""
    try:
        text = message.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if _SURROGATE.search(message):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half of a character") from error
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError("it has a number beyond 64 bits")
    return int(digits)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number beyond all bounds")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"it has {name} for a number")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_real, parse_constant=_constant)
