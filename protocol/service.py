# SPDX-License-Identifier: Apache-2.0
"""The messages between a coordinator and an archiver service about one job.

docs/wire-protocol.md, section 14, is the authority; field names here are the
keys there. Each message of a coordinator names its job, so that it stays the
same conversation when its connection is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from vmapipe.protocol.schema import (
    Dialogue,
    Heartbeat,
    Name,
    Part,
    Text,
    Uint,
    Uuid,
    UuidOrEmpty,
    lengths,
)

# Names, and some configurations: Proxmox VE's have a few KiB each.
MAX_OPEN_BYTES = 1 << 20
# A file's name has 255 bytes, and .age.manifest.json.sig.partial (30) may follow it.
MAX_ARCHIVE_NAME_BYTES = 200
# A service tells its progress in one part: 256 times two numbers of 9 bytes, and names.
MAX_TOLD_BYTES = 65536
# Devices, configs, or numbers of devices; the archive format has at most 255 of each.
MAX_JOB_ITEMS = 256
# What one configuration may have in an archive.
MAX_CONFIG_BYTES = 65535

_Numbers = Annotated[tuple[Uint, ...], lengths(0, MAX_JOB_ITEMS)]
_Names = Annotated[tuple[Name, ...], lengths(0, MAX_JOB_ITEMS)]
_ConfigName = Annotated[Name, lambda name: "/" not in name]
_Config = tuple[_ConfigName, Annotated[bytes, lengths(0, MAX_CONFIG_BYTES)]]
_Uuids = Annotated[tuple[Uuid, ...], lengths(0, MAX_JOB_ITEMS)]
_Sizes = Annotated[tuple[tuple[Name, Uint], ...], lengths(0, MAX_JOB_ITEMS)]
# Seconds since 1970, as the archive format has them.
_Time = Annotated[Uint, lambda seconds: seconds < 1 << 63]
_Texts = Annotated[tuple[Text, ...], lengths(0, MAX_JOB_ITEMS)]
_Configs = Annotated[tuple[_Config, ...], lengths(0, MAX_JOB_ITEMS)]


class Open(NamedTuple):
    """Coordinator: make this archive. `configs`: (name, contents) each.

    `uuid`: the archive's, or empty: the service makes one. `stable`: the same for the same machine,
    and extents do not depend on the order in which clusters come. `base`: what is unchanged is taken from an
    earlier archive, which the service chooses; one of those with the uuids `recorded` if there is one, and none
    behind `full_every` incremental ones in a row (0: any number). `digests`: of each cluster, for a later base.
    `time`: when the archive was made, in seconds since 1970; 0: now.
    """

    version: Uint
    job: Uuid
    name: Text
    devices: _Names
    configs: _Configs = ()
    compress: Text = ""
    manifest: bool = True
    uuid: UuidOrEmpty = b""
    program: Text = ""
    stable: bool = False
    base: bool = False
    digests: bool = False
    full_every: Uint = 0
    recorded: _Uuids = ()
    time: _Time = 0


class Beat(NamedTuple):
    """Coordinator: I am here, and this job is mine."""

    job: Uuid


class JobCancel(NamedTuple):
    """Coordinator: give the job up."""

    job: Uuid
    reason: Text


class Opened(NamedTuple):
    """Service: producers may come. A coordinator silent for `heartbeat_s` is taken for dead.

    `base`: the uuid of the archive that was chosen, or empty, and `why` says why there is none; `name`: its
    name, `disks`: (name, bytes) of those that it has, `compares`: it has digests of its clusters.
    """

    version: Uint
    heartbeat_s: Heartbeat
    base: UuidOrEmpty = b""
    name: Text = ""
    disks: _Sizes = ()
    compares: bool = False
    why: Text = ""


class JobBegun(NamedTuple):
    """Service: all producers are here. `sizes`: bytes of each device, in the order of OPEN.

    `full`: why each of them is sent in full, or an empty text: it is not.
    """

    uuid: Uuid
    sizes: _Numbers
    full: _Texts = ()


class JobProgress(NamedTuple):
    """Service: bytes stored, bytes of the plain archive, and of each device done, zero, and unchanged."""

    stored: Uint
    plain: Uint
    done: _Numbers
    zero: _Numbers
    unchanged: _Numbers = ()


class JobNotice(NamedTuple):
    """Service: something worth a line."""

    text: Text


class JobStored(NamedTuple):
    """Service: the archive is complete, on disk, under its name. Ends the job.

    `from_base`: bytes of it that were taken from the base, `shared`: that lie on the same blocks of the disk.
    """

    archive: Text
    uuid: Uuid
    stored: Uint
    plain: Uint
    from_base: Uint = 0
    shared: Uint = 0


class JobFailed(NamedTuple):
    """Service: nothing was stored, and why. Ends the job. `base_damaged`: without a base it would have been."""

    reason: Text
    base_damaged: bool = False


class JobRefused(NamedTuple):
    """Service: no, and why (the REFUSE of producers, read by a coordinator)."""

    code: Text
    reason: Text


class Alive(NamedTuple):
    """Service: the answer to BEAT."""


FromCoordinator = Open | Beat | JobCancel
FromService = (
    Opened | JobBegun | JobProgress | JobNotice | JobStored | JobFailed | JobRefused | Alive
)

KINDS: tuple[type[FromCoordinator] | type[FromService], ...] = (
    *(Open, Beat, JobCancel),
    *(Opened, JobBegun, JobProgress, JobNotice, JobStored, JobFailed, JobRefused, Alive),
)


def _most_bytes(name: str) -> int:
    return MAX_OPEN_BYTES if name == "OPEN" else MAX_TOLD_BYTES


_NAMES: dict[type[Any], str] = {JobRefused: "REFUSE"} | {
    kind: kind.__name__.removeprefix("Job").upper()
    for kind in (JobCancel, JobBegun, JobProgress, JobNotice, JobStored, JobFailed)
}
_OF_COORDINATORS = Dialogue(
    *KINDS[:3], keyed=True, max_bytes=_most_bytes, max_items=MAX_JOB_ITEMS, names=_NAMES
)
_OF_SERVICES = Dialogue(
    *KINDS[3:], keyed=True, max_bytes=_most_bytes, max_items=MAX_JOB_ITEMS, names=_NAMES
)


def encode(message: FromCoordinator | FromService) -> list[Part]:
    """Raises LocalProtocolError for what the other side would refuse."""
    if isinstance(message, FromCoordinator):
        return _OF_COORDINATORS.encode(message)
    return _OF_SERVICES.encode(message)


def unpack_control(parts: Sequence[Part]) -> tuple[str, dict[str, Any]]:
    """A message's name and its fields, unchecked as yet. Raises RemoteProtocolError."""
    return _OF_COORDINATORS.unpack(parts)


def read_of_coordinator(name: str, fields: Mapping[str, Any]) -> FromCoordinator | None:
    """None: it is not a message of a coordinator. Raises RemoteProtocolError."""
    message: FromCoordinator | None = _OF_COORDINATORS.read(name, fields)
    return message


def decode_of_service(parts: Sequence[Part]) -> FromService:
    """Raises RemoteProtocolError."""
    message: FromService = _OF_SERVICES.decode(parts)
    return message


def archive_name_fault(name: str) -> str:
    """Why a service makes no archive of this name; empty: it does.

    Names that end like a manifest or a partial file are left to these: an
    archive with such a name would be taken for one, and replaced.
    """
    if not name or not name.isprintable() or "/" in name:
        return "a plain file name is needed: printable, no slash"
    if name.startswith("."):
        return "it begins with a dot"
    if len(name.encode()) > MAX_ARCHIVE_NAME_BYTES:
        return f"it has more than {MAX_ARCHIVE_NAME_BYTES} bytes"
    if name.endswith((".partial", ".manifest.json", ".manifest.json.sig", ".digests")):
        return "it ends like a partial file, a manifest, its signature or digests"
    return ""
