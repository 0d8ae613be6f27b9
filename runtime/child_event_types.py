# SPDX-License-Identifier: Apache-2.0
"""Types of the events for a service's log and for a parent only, and of a parent's commands.

As those of `event_types.py`, they are for mypy: no process makes them when it starts.
"""

from __future__ import annotations

from typing import Literal, TypedDict

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


ChildCommand = SpeedCommand | CopiedCommand | JobSpeedSetCommand | FinishedCommand | SampledCommand
