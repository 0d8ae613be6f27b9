# SPDX-License-Identifier: Apache-2.0
"""Asks a monitor which disks it serves."""

from __future__ import annotations

import json
import socket
from typing import Any, NamedTuple

from vmapipe.runtime.errors import Failure, os_error_text

_ANSWER_S = 10.0
# How an NBD server begins.
_NBD_GREETING = b"NBDMAGIC"
_MAX_ANSWER_BYTES = 1 << 20


class GuardedDisk(NamedTuple):
    """A disk that a monitor serves; `guard` is the control socket of its guard."""

    name: str
    size_bytes: int
    guard: str


def guarded_disks(monitor: str) -> list[GuardedDisk]:
    """Raises Failure."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_ANSWER_S)
            sock.connect(monitor)
            if sock.recv(len(_NBD_GREETING), socket.MSG_PEEK) == _NBD_GREETING:
                raise Failure(
                    f"{monitor} is an export's socket; --monitor wants the monitor's own (--listen)"
                )
            with sock.makefile("rb") as lines:
                greeting = _read(lines.readline(_MAX_ANSWER_BYTES))
                if "QMP" not in greeting:
                    raise Failure(f"{monitor}: no monitor answers there")
                answer: Any = None
                for command in ("qmp_capabilities", "query-disks"):
                    sock.sendall(json.dumps({"execute": command}).encode() + b"\n")
                    answer = _read(lines.readline(_MAX_ANSWER_BYTES))
    except TimeoutError as error:
        raise Failure(
            f"{monitor}: nobody greets us within {_ANSWER_S:.0f} s; is this a monitor's socket?"
        ) from error
    except OSError as error:
        raise Failure(
            f"cannot ask the monitor at {monitor}: {os_error_text(error)}; is it running?"
        ) from error
    if "error" in answer:
        raise Failure(
            f"{monitor}: {answer['error'].get('desc', 'refused')}; is it a vmapipe monitor?"
        )
    try:
        return [
            GuardedDisk(str(disk["name"]), int(disk["size"]), str(disk["guard"]))
            for disk in answer["return"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise Failure(f"{monitor}: its answer makes no sense") from error


def _read(line: bytes) -> Any:
    if not line:
        raise Failure("the monitor closed the connection; it may have too many clients")
    try:
        value = json.loads(line)
    except ValueError as error:
        raise Failure("the monitor's answer is no JSON") from error
    if not isinstance(value, dict):
        raise Failure("the monitor's answer is no JSON object")
    return value
