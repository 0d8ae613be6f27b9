# SPDX-License-Identifier: Apache-2.0
"""The specification of one archive, and the events and instructions of its job. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.archiver.job.device import FillRun, FrameMark
from vmapipe.protocol.schema import Part
from vmapipe.vma.header import Config, Device, Header
from vmapipe.vma.packer import HOLD_BYTES, PackedExtent

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base

# A switch or a router that is started again is back by then.
RECONNECT_S = 60
# Drawn once at random; it makes our name-based uuids ours.
_NAMESPACE = "5e2b5dc0-6a3f-4d0b-9a7e-3b8f1c64a2d7"


class JobSpec(NamedTuple):
    """The specification of one archive.

    `uuid`: 16 bytes, or empty: one made from what the header holds, always the
    same for the same. `devices`: the names that must come, in the order of their dev_ids; empty:
    the first `expect` that come. `job`: the id that producers must name; None:
    the id that the first one names. `in_order`: one device after the other, so
    that the same disks make the same archive.
    """

    uuid: bytes
    ctime_s: int
    configs: tuple[Config, ...] = ()
    devices: tuple[str, ...] = ()
    expect: int = 0
    job: bytes | None = None
    in_order: bool = False
    #: Extents do not depend on the order in which clusters come, nor the uuid on the time.
    stable: bool = False
    #: Of `stable` extents that are not complete yet, in bytes.
    hold_bytes: int = HOLD_BYTES
    heartbeat_s: int = 30
    #: So long a producer's lost connection is waited for, in seconds.
    reconnect_s: int = RECONNECT_S
    #: Until all producers have come, in seconds.
    start_timeout_s: int = 60
    #: An earlier archive, of which unchanged clusters are taken; the doubt about it, in words;
    #: None: no base was asked for.
    base: Base | str | None = None


def uuid_of(spec: JobSpec, devices: tuple[Device, ...]) -> bytes:
    """The same 16 bytes for the same header contents (a name-based uuid, version 5).

    Of `stable` archives: for the same machine, that is its devices' names and its configs.
    """
    configs = [(c.name, c.data) for c in spec.configs]
    if spec.stable:
        contents = repr((sorted(device.name for device in devices), configs))
    else:
        contents = repr((spec.ctime_s, devices, configs))
    # Here: most archives have a random one.
    import uuid

    return uuid.uuid5(uuid.UUID(_NAMESPACE), contents).bytes


def base_use(base: Base | str | None, device: Device) -> BaseUse:
    """Whether unchanged clusters of a device can be taken from the base."""
    if base is None or isinstance(base, str):
        return BaseUse(device, 0, base or "no base was asked for")
    there = base.device(device.name)
    if device.is_vmstate:
        return BaseUse(device, 0, "a machine's memory has no base")
    if there is None:
        return BaseUse(device, 0, f"{base.archive} does not have this device")
    if there.size_bytes != device.size_bytes:
        return BaseUse(
            device,
            0,
            f"its size was {there.size_bytes} bytes in {base.archive}, and is {device.size_bytes} now",
        )
    return BaseUse(device, there.dev_id)


class JobStarted(NamedTuple):
    """The first event of a job: an archive of configs only needs no producer."""


class MessageReceived(NamedTuple):
    """A message from the connection `peer`; `client`: the name that its key has proved, if any."""

    peer: bytes
    parts: Sequence[Part]
    now: float
    client: str = ""


class ExtentWritten(NamedTuple):
    """An extent that held data of `dev_ids` was written; `marks` are its notes."""

    marks: dict[int, FrameMark]
    dev_ids: set[int]


class ArchiveStored(NamedTuple):
    """The archive is complete, on disk, under its name."""


class JobAborted(NamedTuple):
    """The output failed, or the job was cancelled. The first reason counts."""

    reason: str


class KeyRevoked(NamedTuple):
    """A client may no longer come: what it was sending is given up."""

    client: str


class TimePassed(NamedTuple):
    """Time has passed: about once a second. `now`, as everywhere: a monotonic clock's seconds."""

    now: float


JobEvent = (
    JobStarted
    | MessageReceived
    | ExtentWritten
    | ArchiveStored
    | JobAborted
    | KeyRevoked
    | TimePassed
)


class Send(NamedTuple):
    peer: bytes
    parts: list[Part]


class BaseUse(NamedTuple):
    """The base's part in one device: its dev_id there, or 0 and the reason why the device is sent in full."""

    device: Device
    base_dev_id: int
    reason: str = ""


class BeginArchive(NamedTuple):
    header: Header
    raw_header: bytes
    #: For each device; empty where no base was asked for.
    bases: tuple[BaseUse, ...] = ()


class StoreExtent(NamedTuple):
    extent: PackedExtent[FrameMark]


class FillClusters(NamedTuple):
    """Clusters of a device that has a base."""

    run: FillRun


class FinishArchive(NamedTuple):
    """All extents are out: store the archive under its name."""


class AbandonArchive(NamedTuple):
    """The job failed: leave nothing behind."""

    reason: str


class LogNotice(NamedTuple):
    """Something worth a line in the log."""

    text: str


JobInstruction = (
    Send | BeginArchive | StoreExtent | FillClusters | FinishArchive | AbandonArchive | LogNotice
)
