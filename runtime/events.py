# SPDX-License-Identifier: Apache-2.0
"""Events of a process, and commands of its parent: JSON lines over a socket pair.

An event is a flat dict with the key `event` (a word) and fields; sizes in
bytes, times in seconds. A child process writes its events as JSON lines to its
parent; a process run by hand gives them to a renderer. A command is a dict with the
key `order` (a word) and fields.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

Event = dict[str, Any]
Emit = Callable[[Event], None]

# A line that a child writes; a longer one is a defect, and ends the connection.
MAX_LINE_BYTES = 1 << 20


def encode_line(event: Event) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


class LineSplitter:
    """Splits bytes, in pieces of any size, into events. Bounded by the longest line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError("an event line without an end")
        return [json.loads(line) for line in lines if line]


def ignore(event: Event) -> None:
    """Drop the event."""


class ChildCommands:
    """The queue of commands: any thread puts them in, the working one takes them out.

    `fd` is readable when there are some.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._commands: deque[Event] = deque()

    def put(self, command: Event) -> None:
        with self._lock:
            self._commands.append(command)
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[Event]:
        """Return the commands that have come since the last call, in order."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        with self._lock:
            taken = list(self._commands)
            self._commands.clear()
        return taken


def speed_command(bytes_per_s: int) -> Event:
    """Return the command to read at most so much from now on, 0: without a limit."""
    return {"order": "speed", "bytes_per_s": bytes_per_s}


def speed_in(command: Event) -> int | None:
    """Return the limit in bytes a second; None: another command."""
    if command.get("order") != "speed":
        return None
    return int(command["bytes_per_s"])


class JobCopied(NamedTuple):
    """The successful end of QEMU's backup job of a disk. `copied_bytes`: as QEMU reports it.

    `rest_is_zero`: it has left out what its image has never been given, which reads as zeroes.
    """

    copied_bytes: int
    rest_is_zero: bool


def copied_command(copied: JobCopied) -> Event:
    """Return the command that says that all of the disk has been sent to the sink."""
    return {"order": "copied", "bytes": copied.copied_bytes, "rest_is_zero": copied.rest_is_zero}


def copied_in(command: Event) -> JobCopied | None:
    """Return the end of QEMU's job; None: another command."""
    if command.get("order") != "copied":
        return None
    return JobCopied(int(command["bytes"]), bool(command["rest_is_zero"]))


#: QEMU's job has been given the speed that its sink asked for last.
JOB_SPEED_SET: Event = {"order": "job-speed-set"}


def is_job_speed_set(command: Event) -> bool:
    return command == JOB_SPEED_SET
