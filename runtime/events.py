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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import PublicEvent

# --- Events of the service's log ---


class UsageFields(TypedDict, total=False):
    """Resources that a job's archiver has used; empty: it could not be started."""

    cpu_s: float
    peak_rss_bytes: int


class ServiceJobFields(TypedDict):
    job: str
    client: str
    archive: str


class JobOpenedEvent(ServiceJobFields):
    event: Literal["job-opened"]
    devices: list[str]


class JobNoticeEvent(ServiceJobFields):
    event: Literal["job-notice"]
    text: str


class JobEndFields(UsageFields):
    seconds: float


class JobStoredEvent(ServiceJobFields, JobEndFields):
    event: Literal["job-stored"]
    stored_bytes: int


class JobFailedEvent(ServiceJobFields, JobEndFields):
    event: Literal["job-failed"]
    text: str


class JobRefusedEvent(TypedDict):
    event: Literal["job-refused"]
    client: str
    archive: str
    code: str
    text: str


ServiceLogEvent = (
    JobOpenedEvent | JobNoticeEvent | JobStoredEvent | JobFailedEvent | JobRefusedEvent
)

# --- Events for a parent only ---


class ErrorEvent(TypedDict):
    """The failure that ends the child."""

    event: Literal["error"]
    text: str


class DrainingEvent(TypedDict):
    """QEMU's writes are only acknowledged from now on: the backup has failed."""

    event: Literal["draining"]
    device: str
    text: str


class EndingEvent(TypedDict):
    """The device is all sent; the producer waits for the archiver's last word."""

    event: Literal["ending"]
    device: str


class JobSpeedEvent(TypedDict):
    """QEMU's backup job is to be given this speed."""

    event: Literal["job-speed"]
    device: str
    bytes_per_s: int


class FeltEvent(TypedDict):
    """What the guest of a disk has felt since the last of these events."""

    event: Literal["felt"]
    device: str
    requests: int
    slow: int
    p99_s: float


class ChosenDevice(TypedDict):
    name: str
    bytes: int


class BaseChosenEvent(TypedDict):
    """Of an archiver that chooses the base by itself: `archive` empty, and `reason` why there is none."""

    event: Literal["base-chosen"]
    archive: str
    uuid: str
    devices: list[ChosenDevice]
    compares: bool
    reason: str


class UploadEvent(TypedDict):
    """An upload to an object store has begun, which is to be aborted if the child is killed."""

    event: Literal["upload"]
    archive: str
    upload: str


class BaseDamagedEvent(TypedDict):
    """The base turned out to be damaged while it was used: a full backup would do."""

    event: Literal["base-damaged"]
    text: str


class GuardReadyEvent(TypedDict):
    """All disks of a guard can be reached."""

    event: Literal["all-served"]


class FrozenEvent(TypedDict):
    event: Literal["frozen"]
    file_systems: int


class NotThawedEvent(TypedDict):
    event: Literal["not-thawed"]


class CarriedEvent(TypedDict):
    """How many bytes of a connection the acceptor has passed on."""

    event: Literal["carried"]
    name: str
    bytes: int


class AuthenticationEvent(TypedDict):
    """A CURVE handshake of a client at this address has begun, or has been decided."""

    event: Literal["authenticating", "decided"]
    address: str


ChildEvent = (
    ErrorEvent
    | DrainingEvent
    | EndingEvent
    | JobSpeedEvent
    | FeltEvent
    | BaseChosenEvent
    | UploadEvent
    | BaseDamagedEvent
    | GuardReadyEvent
    | FrozenEvent
    | NotThawedEvent
    | CarriedEvent
    | AuthenticationEvent
)

# The public ones are many, and only mypy needs their types: they are made when they are looked at.
Event: TypeAlias = "PublicEvent | ServiceLogEvent | ChildEvent"
Emit = Callable[["Event"], None]

# --- Commands ---


class SpeedCommand(TypedDict):
    order: Literal["speed"]
    bytes_per_s: int


#: What a backup job of QEMU has not sent: nothing, what was never written to, what the base has.
Rest = Literal["none", "zero", "unchanged"]


class CopiedCommand(TypedDict):
    order: Literal["copied"]
    bytes: int
    rest: Rest


class JobSpeedSetCommand(TypedDict):
    order: Literal["job-speed-set"]


class FinishedCommand(TypedDict):
    order: Literal["finished"]
    name: str
    sent_bytes: int
    finished_bytes: int


class SampledCommand(TypedDict):
    order: Literal["sampled"]
    clusters: list[int]
    is_last: bool


Command = SpeedCommand | CopiedCommand | JobSpeedSetCommand | FinishedCommand | SampledCommand

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
