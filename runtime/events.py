# SPDX-License-Identifier: Apache-2.0
"""Events of a process, and commands of its parent: JSON lines over a socket pair.

An event is a flat dict with the key `event` (a word) and fields; sizes in
bytes, times in seconds. A child process writes its events as JSON lines to its
parent; a process run by hand gives them to a renderer. A command is a dict with the
key `order` (a word) and fields.

The types are the events: mypy checks what is emitted and read against them. A line from a
child is taken for one of them unchecked: it is the same program.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import (
        ChildCommand,
        ChildEvent,
        Rest,
        ServiceLogEvent,
    )
    from vmapipe.runtime.event_types import PublicEvent

# They are many, and only mypy needs their types: to make them all takes some milliseconds of each start.
Event: TypeAlias = "PublicEvent | ServiceLogEvent | ChildEvent"
Emit = Callable[["Event"], None]
Command: TypeAlias = "ChildCommand"

# --- Lines ---

# A line that a child writes; a longer one is a defect, and ends the connection.
MAX_LINE_BYTES = 1 << 20


def encode_line(event: Mapping[str, object]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


class LineSplitter:
    """Splits bytes, in pieces of any size, into events. Bounded by the longest line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Any]:
        """Return the events, or commands, that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError("an event line without an end")
        return [json.loads(line) for line in lines if line]


def ignore(event: object) -> None:
    """Drop the event."""


class ChildCommands:
    """The queue of commands: any thread puts them in, the working one takes them out.

    `fd` is readable when there are some.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._commands: deque[Command] = deque()

    def put(self, command: Command) -> None:
        with self._lock:
            self._commands.append(command)
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[Command]:
        """Return the commands that have come since the last call, in order."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        with self._lock:
            taken = list(self._commands)
            self._commands.clear()
        return taken


def speed_command(bytes_per_s: int) -> Command:
    """Return the command to read at most so much from now on, 0: without a limit."""
    return {"order": "speed", "bytes_per_s": bytes_per_s}


def speed_in(command: Command) -> int | None:
    """Return the limit in bytes a second; None: another command."""
    if command["order"] != "speed":
        return None
    return int(command["bytes_per_s"])


class JobCopied(NamedTuple):
    """The successful end of QEMU's backup job of a disk. `copied_bytes`: as QEMU reports it.

    `rest`: what it has left out: what its image has never been given, which reads as zeroes; or what
    has not changed since the base.
    """

    copied_bytes: int
    rest: Rest = "none"


def copied_command(copied: JobCopied) -> Command:
    """Return the command that says that all of the disk has been sent to the sink."""
    return {"order": "copied", "bytes": copied.copied_bytes, "rest": copied.rest}


def copied_in(command: Command) -> JobCopied | None:
    """Return the end of QEMU's job; None: another command."""
    if command["order"] != "copied":
        return None
    return JobCopied(int(command["bytes"]), command["rest"])


# A line of so many numbers, of ten digits each, is shorter than a line may be.
_SAMPLED = 50_000


def sampled_commands(clusters: Sequence[int]) -> list[Command]:
    """Return the commands that say which clusters that come are as in the base, for certain."""
    starts = range(0, len(clusters), _SAMPLED) or range(1)
    return [
        {
            "order": "sampled",
            "clusters": list(clusters[at : at + _SAMPLED]),
            "is_last": at == starts[-1],
        }
        for at in starts
    ]


def sampled_in(command: Command) -> tuple[list[int], bool] | None:
    """Return some such clusters, and whether these are the last; None: another command."""
    if command["order"] != "sampled":
        return None
    return command["clusters"], command["is_last"]


#: QEMU's job has been given the speed that its sink asked for last.
JOB_SPEED_SET: Command = {"order": "job-speed-set"}


def is_job_speed_set(command: Command) -> bool:
    return command == JOB_SPEED_SET


class Finished(NamedTuple):
    """The answer to a `carried` event: so much came out as messages; less than 0: no such connection."""

    name: str
    sent_bytes: int
    finished_bytes: int


def finished_command(finished: Finished) -> Command:
    """Return the command that lets the acceptor read on."""
    name, sent_bytes, finished_bytes = finished
    return {
        "order": "finished",
        "name": name,
        "sent_bytes": sent_bytes,
        "finished_bytes": finished_bytes,
    }


def finished_in(command: Command) -> Finished | None:
    """Return the answer about a connection; None: another command."""
    if command["order"] != "finished":
        return None
    return Finished(command["name"], command["sent_bytes"], command["finished_bytes"])
