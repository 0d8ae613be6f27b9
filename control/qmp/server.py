# SPDX-License-Identifier: Apache-2.0
"""The server's side of a QMP conversation: bytes in, bytes out.

QEMU's docs/interop/qmp-spec.rst: a greeting, `qmp_capabilities`, then commands
and answers as JSON, ours one a line. Commands of one client are carried out one
after the other, so that what follows one whose answer takes time waits for it.

A client need not end a command by a line end (qemu.qmp does not), and may put one on several
lines. Text that is not JSON ends with its line, so that a person who mistypes can go on. Pure.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_DECODER = json.JSONDecoder()
_WHITE = b" \t\r\n"


class QmpRequest(NamedTuple):
    """A received object, or why it is not valid; and its length in bytes."""

    value: dict[str, Any] | None
    problem: str
    size: int


class RequestReader:
    """Cuts bytes, in any pieces, into requests. `held_bytes` are those of an incomplete one."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def held_bytes(self) -> int:
        return len(self._rest)

    def feed(self, data: bytes) -> list[QmpRequest]:
        self._rest = (self._rest + data).lstrip(_WHITE)
        # Nothing ends but by one of these.
        if b"}" not in data and b"\n" not in data:
            return []
        found = []
        while (request := self._next()) is not None:
            found.append(request)
        return found

    def _next(self) -> QmpRequest | None:
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
        return QmpRequest(value, "", size)

    def _line_of_junk(self) -> QmpRequest | None:
        line, newline, rest = self._rest.partition(b"\n")
        if not newline:
            return None
        self._rest = rest.lstrip(_WHITE)
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return QmpRequest(None, "this is not valid JSON", len(line))
        return QmpRequest(None, "a command is a JSON object", len(line))


def _is_hopeless(error: ValueError, text: str) -> bool:
    """Tell whether nothing that could follow would make it JSON."""
    if not isinstance(error, json.JSONDecodeError):
        return True  # a number of thousands of digits
    if error.msg.startswith("Unterminated string"):
        return False
    return error.pos < len(text.rstrip())


# A command is some hundred bytes; anything longer is not a command.
MAX_LINE_BYTES = 64 * 1024
# Of commands that wait for the answer to the one before; the client's next ones
# stay in its socket.
_MAX_WAITING_BYTES = 64 * 1024
_MEMBERS = frozenset({"execute", "arguments", "id"})

_DEFECTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

CommandHandler = Callable[[dict[str, Any]], Any]


class QmpError(Exception):
    """A command failed: `kind` is one of QEMU's error classes, `text` for people."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        self.kind = kind
        super().__init__(text)


class DeferredAnswer:
    """The answer of a command that takes time; the first one set counts."""

    def __init__(self) -> None:
        self.done = False
        self._value: Any = None
        self._error: QmpError | None = None
        self._hooks: list[Callable[[], None]] = []

    def answer(self, value: Any) -> None:
        self._finish(value, None)

    def refuse(self, error: QmpError) -> None:
        self._finish(None, error)

    def then(self, hook: Callable[[], None]) -> None:
        """Call `hook` when the answer is there."""
        if self.done:
            hook()
        else:
            self._hooks.append(hook)

    def result(self) -> Any:
        """Return the answer. Raises QmpError."""
        if self._error is not None:
            raise self._error
        return self._value

    def _finish(self, value: Any, error: QmpError | None) -> None:
        if self.done:
            return
        self.done, self._value, self._error = True, value, error
        for hook in self._hooks:
            hook()


class QmpServer:
    """The conversation with one client. `closed`: it has broken the protocol beyond repair."""

    def __init__(self, commands: Mapping[str, CommandHandler], version: str) -> None:
        self.closed = False
        self.negotiated = False
        self._commands = commands
        self._version = version
        self._incoming = RequestReader()
        self._requests: deque[QmpRequest] = deque()
        self._awaited: tuple[DeferredAnswer, Any] | None = None

    @property
    def takes_more(self) -> bool:
        """True when more is to be read from the client; False: enough of its commands wait."""
        waiting = sum(request.size for request in self._requests)
        return self._awaited is None or waiting < _MAX_WAITING_BYTES

    def greeting(self) -> bytes:
        return _line({"QMP": {"version": self.describe_version(), "capabilities": []}})

    def feed(self, data: bytes) -> bytes:
        """Take what has come; returns what is to be sent."""
        self._requests += self._incoming.feed(data)
        out = self.go_on()
        if self._incoming.held_bytes > MAX_LINE_BYTES:
            self.closed = True
            out += _error("GenericError", "a line that is too long", None)
        return out

    def go_on(self) -> bytes:
        """Continue after an awaited answer; returns what is to be sent."""
        out = b""
        while True:
            if self._awaited is not None:
                awaited, identity = self._awaited
                if not awaited.done:
                    return out
                self._awaited = None
                out += self._result(awaited.result, identity)
            elif self._requests:
                out += self._answer(self._requests.popleft())
            else:
                return out

    def event(self, name: str, data: Mapping[str, Any], time_s: float) -> bytes:
        """Encode an event; empty for a client that has not negotiated yet."""
        if not self.negotiated:
            return b""
        seconds, microseconds = divmod(round(time_s * 1_000_000), 1_000_000)
        stamp = {"seconds": seconds, "microseconds": microseconds}
        return _line({"event": name, "data": dict(data), "timestamp": stamp})

    def _answer(self, incoming: QmpRequest) -> bytes:
        request = incoming.value
        if request is None:
            return _error("GenericError", incoming.problem, None)
        identity = request.get("id")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return _error("GenericError", "'execute' must name a command", identity)
        if unknown := sorted(request.keys() - _MEMBERS):
            text = f"QMP input member '{unknown[0]}' is unexpected"
            return _error("GenericError", text, identity)
        return self._result(lambda: self._execute(name, arguments), identity)

    def _result(self, work: Callable[[], Any], identity: Any) -> bytes:
        try:
            value = work()
        except QmpError as error:
            return _error(error.kind, str(error), identity)
        except _DEFECTS as error:
            # Guests' disks depend on this process: a mistake of ours ends one command.
            return _error("GenericError", f"a defect of vmapipe: {error!r}", identity)
        if isinstance(value, DeferredAnswer):
            self._awaited = (value, identity)
            return b""
        return _line(_with_id({"return": value}, identity))

    def _execute(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "qmp_capabilities":
            if self.negotiated:
                raise QmpError("capabilities negotiation is already complete", "CommandNotFound")
            if enable := arguments.get("enable"):
                raise QmpError(f"there is no capability to enable, but {enable!r} was asked for")
            self.negotiated = True
            return {}
        if not self.negotiated:
            raise QmpError(
                "expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if name == "query-version":
            return self.describe_version()
        if name == "query-commands":
            return [{"name": known} for known in sorted([*self._commands, *_OWN])]
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"the command {name} has not been found", "CommandNotFound")
        return command(arguments)

    def describe_version(self) -> dict[str, Any]:
        numbers = [int(part) for part in self._version.split(".")[:3] if part.isdecimal()]
        major, minor, micro = [*numbers, 0, 0, 0][:3]
        return {
            "qemu": {"major": major, "minor": minor, "micro": micro},
            "package": f"vmapipe {self._version}",
        }


_OWN = ("qmp_capabilities", "query-version", "query-commands")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def _with_id(message: dict[str, Any], identity: Any) -> dict[str, Any]:
    return message if identity is None else {**message, "id": identity}


def _error(kind: str, text: str, identity: Any) -> bytes:
    return _line(_with_id({"error": {"class": kind, "desc": text}}, identity))


class Arguments:
    """The members of a command, checked and worded as QEMU does.

    They are taken one by one, by any of their spellings; `end` refuses what is left."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members = dict(members)

    def text(self, *spellings: str) -> str | None:
        """Return a string; None: missing. Raises QmpError for another type."""
        value = self._take(spellings)
        if value is not None and not isinstance(value, str):
            raise _wrong_type(spellings, "string")
        return value

    def need_text(self, *spellings: str) -> str:
        """Return a string. Raises QmpError when it is missing, too."""
        value = self.text(*spellings)
        if value is None:
            raise QmpError(f"Parameter '{spellings[0]}' is missing")
        return value

    def number(self, *spellings: str) -> int | None:
        """Return an integer from 0 on; None: missing; a boolean is not valid. Raises QmpError."""
        value = self._take(spellings)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(spellings, "integer")
        if not 0 <= value < 1 << 63:
            raise QmpError(f"Parameter '{spellings[0]}' expects a non-negative value")
        return value

    def flag(self, *spellings: str) -> bool:
        """Return a boolean, False when it is missing. Raises QmpError."""
        value = self._take(spellings)
        if value is not None and not isinstance(value, bool):
            raise _wrong_type(spellings, "boolean")
        return bool(value)

    def size(self, *spellings: str) -> int | None:
        """Bytes; as a string, with a suffix, and MiB without one: as at the human monitor."""
        for spelling in spellings:
            text = self._members.get(spelling)
            if isinstance(text, str):
                self._members[spelling] = human_size(text)
        return self.number(*spellings)

    def has(self, *spellings: str) -> bool:
        return any(spelling in self._members for spelling in spellings)

    def end(self) -> None:
        """Refuse members that were not taken. Raises QmpError."""
        for name in self._members:
            raise QmpError(f"Parameter '{name}' is unexpected")

    def _take(self, spellings: tuple[str, ...]) -> Any:
        """The first spelling that is there; a second one is left, to be refused."""
        for spelling in spellings:
            if spelling in self._members:
                return self._members.pop(spelling)
        return None


# As QEMU's strtosz with MiB for its default unit.
_UNITS = {unit: 1 << 10 * power for power, unit in enumerate("BKMGTPE")}


def human_size(text: str) -> int:
    """Parse a size: `10` is 10 MiB, `1.5G`, `4096B`. Raises QmpError."""
    word = text.strip().upper()
    unit = word[-1:] if word[-1:] in _UNITS else ""
    number = word[: len(word) - len(unit)]
    digits = number.replace(".", "", 1)
    value = -1.0
    if digits.isascii() and digits.isdecimal():
        value = float(number) * _UNITS[unit or "M"]
    if not 0 <= value < 1 << 63:
        raise QmpError("invalid size")
    return int(value)


def _wrong_type(spellings: tuple[str, ...], expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{spellings[0]}', expected: {expected}")
