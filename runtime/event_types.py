# SPDX-License-Identifier: Apache-2.0
"""Types of the events that `--json` shows, one a name: docs/events.schema.json says the same.

A test compares them with the schema; to each, `--json` adds `time`.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict, final

# --- Events that --json shows, of a backup ---


class ListeningEvent(TypedDict):
    event: Literal["listening"]
    endpoint: str


class ReadingEvent(TypedDict):
    event: Literal["reading"]
    device: str
    path: str
    bytes: int


class AttachedEvent(TypedDict):
    event: Literal["attached"]
    device: str


class SkippedEvent(TypedDict):
    event: Literal["skipped"]
    device: str
    reason: str
    level: Literal["debug", "info", "warn"]


class BegunDevice(TypedDict):
    dev_id: int
    name: str
    bytes: int


class BegunEvent(TypedDict):
    event: Literal["begun"]
    uuid: str
    devices: list[BegunDevice]


class BaseDevice(TypedDict):
    name: str
    incremental: bool
    reason: str
    changed_bytes: NotRequired[int]


class BaseEvent(TypedDict):
    event: Literal["base"]
    archive: str
    uuid: str
    devices: list[BaseDevice]


class InstantEvent(TypedDict):
    event: Literal["instant"]
    held_s: float
    memory: NotRequired[str]


class ThawedEvent(TypedDict):
    event: Literal["thawed"]
    seconds: float


class ProgressDevice(TypedDict):
    name: str
    bytes: int
    done_bytes: int
    zero_bytes: int
    unchanged_bytes: NotRequired[int]


# Final, as the other `progress` is: then `"devices" in event` tells one from the other.
@final
class BackupProgressEvent(TypedDict):
    event: Literal["progress"]
    stored_bytes: int
    plain_bytes: int
    devices: list[ProgressDevice]


class TransferEvent(TypedDict):
    event: Literal["transfer"]
    device: str
    read_bytes: int
    sent_bytes: int
    saved_bytes: int


class BufferEvent(TypedDict):
    event: Literal["buffer"]
    device: str
    memory_bytes: int
    spool_bytes: int
    waiting_writes: int


class SpeedEvent(TypedDict):
    event: Literal["speed"]
    bytes_per_s: int


class GuestLatencyEvent(TypedDict):
    """What the guest has felt of its disks within the last second."""

    event: Literal["guest-latency"]
    bound_s: float
    requests: int
    p99_s: float
    limit_bytes_s: int
    read_bytes_s: int


class ManifestEvent(TypedDict):
    event: Literal["manifest"]
    text: str


class NoticeEvent(TypedDict):
    event: Literal["notice"]
    text: str


class SentEvent(TypedDict):
    event: Literal["sent"]
    device: str
    bytes: int
    zero_bytes: int


class StoredEvent(TypedDict):
    event: Literal["stored"]
    archive: str
    uuid: str
    stored_bytes: int
    plain_bytes: int
    base_bytes: NotRequired[int]
    shared_bytes: NotRequired[int]


class FeltByGuest(TypedDict):
    bound_s: float
    worst_s: float
    seconds: int
    seconds_above: int


class DoneEvent(TypedDict):
    event: Literal["done"]
    seconds: float
    read_bytes: int
    speed_bytes_s: int
    cpu_s: float
    peak_rss_bytes: int
    guest_latency: NotRequired[FeltByGuest]


class MachineEvent(TypedDict):
    event: Literal["machine"]
    vmid: int
    name: str
    mode: str
    runs: bool


class FailedMachine(TypedDict):
    vmid: int
    text: str


class MachinesEvent(TypedDict):
    event: Literal["machines"]
    stored: list[int]
    failed: list[FailedMachine]
    left_out: list[FailedMachine]


class FailedEvent(TypedDict):
    event: Literal["failed"]
    text: str
    exit_code: int


# --- Events that --json shows, of servers ---


class ServingEvent(TypedDict):
    event: Literal["serving"]
    disk: str
    path: str
    bytes: int


class ExportedEvent(TypedDict):
    event: Literal["exported"]
    archive: str
    device: str
    bytes: int
    writable: bool
    uri: str


class MountedEvent(TypedDict):
    event: Literal["mounted"]
    archive: str
    folder: str


class ReadyEvent(TypedDict):
    event: Literal["ready"]
    listen: str
    directory: NotRequired[str]
    disks: NotRequired[list[dict[str, object]]]


# --- Events that --json shows, of a restore or a verification ---


@final
class ReadProgressEvent(TypedDict):
    event: Literal["progress"]
    done_bytes: int
    total_bytes: int
    archive_bytes: int


class RestoringDevice(TypedDict):
    name: str
    bytes: int
    path: str | None


class RestoringEvent(TypedDict):
    event: Literal["restoring"]
    archive: str
    uuid: str
    devices: list[RestoringDevice]
    digests_checked: bool


#: State of a device: `unchecked` is all there, and nothing has proved its data; `incomplete` may be
#: damaged, too.
StateName = Literal["sound", "unchecked", "incomplete", "damaged"]
#: The proof of a sound device's data: a manifest, or a compression's checksums.
CheckerName = Literal["manifest", "zstd", "gzip", "lzo"]
RangeStateName = Literal["missing", "damaged"]


class DiskStateFields(TypedDict):
    dev_id: int
    name: str
    bytes: int
    state: StateName
    checked_by: CheckerName | None
    missing_bytes: int
    damaged_bytes: int
    range_count: int


class RestoredDevice(DiskStateFields):
    path: str | None


class RestoredEvent(TypedDict):
    event: Literal["restored"]
    archive: str
    archive_bytes: int
    data_bytes: int
    zero_bytes: int
    kept_bytes: NotRequired[int]
    digests_checked: bool
    salvaged: bool
    devices: list[RestoredDevice]
    seconds: float
    cpu_s: float
    peak_rss_bytes: int


class MovedEvent(TypedDict):
    event: Literal["moved"]
    device: str
    path: str
    bytes: int


class RangeFields(TypedDict):
    offset: int
    length: int
    state: RangeStateName
    reason: str


class VerifiedDevice(DiskStateFields):
    ranges: list[RangeFields]


class DamageFields(TypedDict):
    text: str
    device: str | None
    offset: int | None
    length: int | None
    archive_offset: int | None


class VerifiedEvent(TypedDict):
    event: Literal["verified"]
    archive: str
    ok: bool
    compression: str
    manifest: str | None
    data_checked: bool
    file_checked: bool
    encrypted: bool
    proved: str | None
    archive_bytes: int
    stored_bytes: int
    extents: int
    data_bytes: int
    zero_bytes: int
    devices: list[VerifiedDevice]
    damage_count: int
    damage: list[DamageFields]
    seconds: float


class OmissionFields(TypedDict):
    key: str
    reason: str


class DefinedDisk(TypedDict):
    name: str
    device: str
    path: str
    format: str


class DefinedEvent(TypedDict):
    event: Literal["defined"]
    domain: str
    uuid: str
    connection: str
    disks: list[DefinedDisk]
    left_out: list[OmissionFields]


class DrillingEvent(TypedDict):
    event: Literal["drilling"]
    archive: str
    accelerator: str
    firmware: str
    resumed: bool
    limit_s: float
    left_out: list[OmissionFields]


class DrillStepFields(TypedDict):
    kind: str
    state: Literal["answered", "silent", "wrong"]
    seconds: float | None
    detail: str


class DrilledEvent(TypedDict):
    event: Literal["drilled"]
    archive: str
    uuid: str
    verdict: Literal["booted", "not booted", "undecided"]
    reason: str
    seconds: float | None
    proof: str
    steps: list[DrillStepFields]
    resumed: bool
    bytes_read: int
    evidence: str | None


PublicEvent = (
    ListeningEvent
    | ReadingEvent
    | AttachedEvent
    | SkippedEvent
    | BegunEvent
    | BaseEvent
    | InstantEvent
    | ThawedEvent
    | BackupProgressEvent
    | TransferEvent
    | BufferEvent
    | SpeedEvent
    | GuestLatencyEvent
    | ManifestEvent
    | NoticeEvent
    | SentEvent
    | StoredEvent
    | DoneEvent
    | FailedEvent
    | MachineEvent
    | MachinesEvent
    | ServingEvent
    | ExportedEvent
    | MountedEvent
    | ReadyEvent
    | ReadProgressEvent
    | RestoringEvent
    | RestoredEvent
    | MovedEvent
    | DefinedEvent
    | VerifiedEvent
    | DrillingEvent
    | DrilledEvent
)
