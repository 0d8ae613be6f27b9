# SPDX-License-Identifier: Apache-2.0
"""What a QEMU and a guest agent may send: any bytes are read, refused, or told in words."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from unittest import mock

from tests.control.qmp.answers import EVENT, GOOD, READERS
from vmapipe.control.qemu import guest_agent
from vmapipe.control.qemu.guest_agent import GuestAgent
from vmapipe.control.qmp.answers import answer_fault, event_fault
from vmapipe.control.qmp.client import EventQueue
from vmapipe.control.qmp.reader import JsonLimits, JsonReader, Unreadable
from vmapipe.runtime.errors import Failure

# So low that a few hundred bytes reach them.
_LIMITS = JsonLimits(most_bytes=2000, most_values=200, most_depth=20)
_COMMANDS = sorted(GOOD)
_NUMBER = 7


def qmp(data: bytes) -> None:
    """The first byte names the command that was asked, the second how large the pieces are."""
    command = _COMMANDS[data[0] % len(_COMMANDS)] if data else _COMMANDS[0]
    piece = 1 + (data[1] if len(data) > 1 else 0)
    reader, queue = JsonReader(_LIMITS), EventQueue()
    try:
        for at in range(2, len(data), piece):
            reader.feed(data[at : at + piece])
            while (message := reader.next()) is not None:
                _take(command, message, queue)
    except Unreadable as error:
        if not str(error).isprintable() or len(error.said) > 200:
            raise AssertionError(f"{error!r} is not a line for people") from error
    if reader.held_bytes > _LIMITS.most_bytes + 512:
        raise AssertionError(f"{reader.held_bytes} bytes are held")
    queue.take()


def _take(command: str, message: dict[str, object], queue: EventQueue) -> None:
    if "event" in message:
        if not event_fault(message):
            queue.put(message, len(json.dumps(message)))
        return
    fault = answer_fault(command, message.get("return"))
    if not fault.isprintable() or len(fault) > 500:
        raise AssertionError(f"{fault!r} is not a line for people")
    if not fault:
        READERS.get(command, lambda answer: None)(message["return"])


def agent(data: bytes) -> None:
    """All that an agent sends, before it hangs up."""
    ours, theirs = socket.socketpair()
    with contextlib.closing(theirs):
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        ours.setblocking(False)
        with (
            mock.patch.object(guest_agent, "connect", return_value=ours),
            mock.patch.object(time, "monotonic_ns", return_value=_NUMBER),
        ):
            try:
                client = GuestAgent("played")
            except Failure:
                return
            try:
                client.execute(guest_agent.FREEZE, 5.0)
            except Failure as error:
                if not str(error).isprintable() or len(str(error)) > 2000:
                    raise AssertionError(f"{str(error)!r:.100} is not a line for people") from error
            finally:
                client.close()


def seeds(name: str) -> list[bytes]:
    """Where a fuzzer begins: what honest ones say."""
    if name == "agent":
        synced = b'{"return": 1}\n\xff{"return": %d}\n' % _NUMBER
        return [synced + b'{"return": 3}\n', synced + b'{"error": {"desc": "no"}}\n']
    answers = [
        bytes([number, 200]) + json.dumps({"return": GOOD[command]}).encode()
        for number, command in enumerate(_COMMANDS)
    ]
    return [*answers, b"\0\1" + json.dumps(EVENT).encode(), b'\0\5{"error": {"desc": "no"}}']
