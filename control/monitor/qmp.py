# SPDX-License-Identifier: Apache-2.0
"""The server's side of a QMP conversation: bytes in, bytes out.

QEMU's docs/interop/qmp-spec.rst: a greeting, `qmp_capabilities`, then commands
and answers as JSON, here one a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

# A command is some hundred bytes; what is longer is no command.
MAX_LINE_BYTES = 64 * 1024

Command = Callable[[dict[str, Any]], Any]


class QmpError(Exception):
    """A command failed: `kind` is one of QEMU's error classes, `text` for people."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        self.kind = kind
        super().__init__(text)


class QmpServer:
    """One client. `closed`: it has broken the protocol beyond repair."""

    def __init__(self, commands: Mapping[str, Command], version: str) -> None:
        self.closed = False
        self._commands = commands
        self._version = version
        self._negotiated = False
        self._rest = b""

    def greeting(self) -> bytes:
        return _line({"QMP": {"version": self._describe_version(), "capabilities": []}})

    def feed(self, data: bytes) -> bytes:
        """Take what has come; returns what is to be sent."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        out = b"".join(self._answer(line) for line in lines if line.strip())
        if len(self._rest) > MAX_LINE_BYTES:
            self.closed = True
            out += _error("GenericError", "a line that is too long", None)
        return out

    def _answer(self, line: bytes) -> bytes:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _error("GenericError", "this is no JSON", None)
        if not isinstance(request, dict):
            return _error("GenericError", "a command is a JSON object", None)
        identity = request.get("id")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return _error("GenericError", "'execute' must name a command", identity)
        try:
            return _line(_with_id({"return": self._execute(name, arguments)}, identity))
        except QmpError as error:
            return _error(error.kind, str(error), identity)

    def _execute(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "qmp_capabilities":
            if self._negotiated:
                raise QmpError("capabilities negotiation is already complete", "CommandNotFound")
            self._negotiated = True
            return {}
        if not self._negotiated:
            raise QmpError(
                "expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if name == "query-version":
            return self._describe_version()
        if name == "query-commands":
            return [{"name": known} for known in sorted([*self._commands, *_OWN])]
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"the command {name} has not been found", "CommandNotFound")
        return command(arguments)

    def _describe_version(self) -> dict[str, Any]:
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
