# SPDX-License-Identifier: Apache-2.0
"""Cuts what a QMP client sends into JSON objects. Pure.

A client need not end a command by a line end (qemu.qmp does not), and may put
one on several lines. What is no JSON ends with its line, so that a person who
mistypes can go on.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_DECODER = json.JSONDecoder()
_WHITE = b" \t\r\n"


class Request(NamedTuple):
    """An object, or why it is none; and how long it was, in bytes."""

    value: dict[str, Any] | None
    problem: str
    size: int


class Requests:
    """Bytes in any pieces to requests. `held_bytes` are those of one that is not complete."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def held_bytes(self) -> int:
        return len(self._rest)

    def feed(self, data: bytes) -> list[Request]:
        self._rest = (self._rest + data).lstrip(_WHITE)
        # Nothing ends but by one of these.
        if b"}" not in data and b"\n" not in data:
            return []
        found = []
        while (request := self._next()) is not None:
            found.append(request)
        return found

    def _next(self) -> Request | None:
        if not self._rest:
            return None
        if not self._rest.startswith(b"{"):
            return self._line_of_junk()
        text = self._rest.decode("utf-8", "surrogateescape")
        try:
            value, end = _DECODER.raw_decode(text)
        except RecursionError:
            return self._line_of_junk()
        except ValueError as error:
            # Only at a line's end: before that, more of it may make it whole.
            return self._line_of_junk() if _is_hopeless(error, text) else None
        rest = text[end:].encode("utf-8", "surrogateescape")
        size = len(self._rest) - len(rest)
        self._rest = rest.lstrip(_WHITE)
        return Request(value, "", size)

    def _line_of_junk(self) -> Request | None:
        line, newline, rest = self._rest.partition(b"\n")
        if not newline:
            return None
        self._rest = rest.lstrip(_WHITE)
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return Request(None, "this is no JSON", len(line))
        return Request(None, "a command is a JSON object", len(line))


def _is_hopeless(error: ValueError, text: str) -> bool:
    """Whether nothing that could follow would make it JSON."""
    if not isinstance(error, json.JSONDecodeError):
        return True  # a number of thousands of digits
    if error.msg.startswith("Unterminated string"):
        return False
    return error.pos < len(text.rstrip())
