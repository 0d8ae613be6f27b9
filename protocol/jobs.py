# SPDX-License-Identifier: Apache-2.0
"""What a coordinator and an archiver that runs as a service say to each other about a job.

docs/wire-protocol.md, section 14, is the authority; field names here are the
keys there. Each message of a coordinator names its job, so that it stays the
same conversation when its connection is made anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmapipe.protocol import limits
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.fields import is_uint
from vmapipe.protocol.jobfields import CHECKS, MAX_JOB_ITEMS
from vmapipe.protocol.packing import Part, pack, unpack

# Names, and some configurations: Proxmox VE's have a few KiB each.
MAX_OPEN_BYTES = 1 << 20
# A file's name has 255 bytes, and .manifest.json.partial (22) may follow it.
MAX_ARCHIVE_NAME_BYTES = 200
# A service tells its progress in one part: 256 times two numbers of 9 bytes, and names.
MAX_TOLD_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Open:
    """Coordinator: make this archive. `configs`: (name, contents) each.

    `uuid`: the archive's, or empty: the service makes one.
    """

    version: int
    job: bytes
    name: str
    devices: tuple[str, ...]
    configs: tuple[tuple[str, bytes], ...] = ()
    compress: str = ""
    manifest: bool = True
    uuid: bytes = b""
    program: str = ""


@dataclass(frozen=True, slots=True)
class Beat:
    """Coordinator: I am here, and this job is mine."""

    job: bytes


@dataclass(frozen=True, slots=True)
class Cancel:
    """Coordinator: give the job up."""

    job: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Opened:
    """Service: producers may come. A coordinator silent for `heartbeat_s` is taken for dead."""

    version: int
    heartbeat_s: int


@dataclass(frozen=True, slots=True)
class Begun:
    """Service: all producers are here. `sizes`: bytes of each device, in the order of OPEN."""

    uuid: bytes
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Service: bytes stored, bytes of the plain archive, and of each device done and zero."""

    stored: int
    plain: int
    done: tuple[int, ...]
    zero: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Service: something worth a line."""

    text: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Service: the archive is complete, on disk, under its name. Ends the job."""

    archive: str
    uuid: bytes
    stored: int
    plain: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Service: nothing was stored, and why. Ends the job."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Service: no, and why (the REFUSE of producers, read by a coordinator)."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Alive:
    """Service: the answer to BEAT."""


FromCoordinator = Open | Beat | Cancel
FromService = Opened | Begun | Progress | Notice | Stored | Failed | Refused | Alive

KINDS: tuple[type[FromCoordinator] | type[FromService], ...] = (
    *(Open, Beat, Cancel),
    *(Opened, Begun, Progress, Notice, Stored, Failed, Refused, Alive),
)


def wire_name(kind: type[FromCoordinator] | type[FromService]) -> str:
    return "REFUSE" if kind is Refused else kind.__name__.upper()


_OF_COORDINATORS = {wire_name(kind): kind for kind in KINDS[:3]}
_OF_SERVICES = {wire_name(kind): kind for kind in KINDS[3:]}


def encode(message: FromCoordinator | FromService) -> list[Part]:
    """Raises LocalProtocolError for what the other side would refuse."""
    name = wire_name(type(message))
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    for key, item in fields.items():
        if not CHECKS[key](item):
            raise LocalProtocolError(f"{name}: {key} cannot be {item!r:.100}")
    raw = pack([name, fields])
    if len(raw) > _most_bytes(name):
        raise LocalProtocolError(f"{name}: {len(raw)} bytes, at most {_most_bytes(name)}")
    return [raw]


def unpack_control(parts: Sequence[Part]) -> tuple[str, dict[str, Any]]:
    """A message's name and its fields, which nobody has looked at yet.

    Raises RemoteProtocolError for what is no control message.
    """
    if len(parts) != 1:
        raise RemoteProtocolError("malformed", f"a message of {len(parts)} parts")
    value = unpack(parts[0], MAX_OPEN_BYTES, MAX_JOB_ITEMS)
    match value:
        case [str(name), dict(fields)]:
            if memoryview(parts[0]).nbytes > _most_bytes(name):
                raise RemoteProtocolError("too-large", f"{name:.40} of more bytes than it may have")
            return name, fields
    raise RemoteProtocolError("malformed", "a control message that is no [name, {...}]")


def read_of_coordinator(name: str, fields: Mapping[str, Any]) -> FromCoordinator | None:
    """None: it is no message of a coordinator. Raises RemoteProtocolError."""
    kind = _OF_COORDINATORS.get(name)
    return None if kind is None else _read(kind, name, fields)


def decode_of_service(parts: Sequence[Part]) -> FromService:
    """Raises RemoteProtocolError."""
    name, fields = unpack_control(parts)
    kind = _OF_SERVICES.get(name)
    if kind is None:
        raise RemoteProtocolError("malformed", f"an unknown message {name[:40]!r}")
    message: FromService = _read(kind, name, fields)
    return message


def _most_bytes(name: str) -> int:
    return MAX_OPEN_BYTES if name == "OPEN" else MAX_TOLD_BYTES


def _read(kind: type[Any], name: str, fields: Mapping[str, Any]) -> Any:
    # First of all: another version may have other keys beside this one.
    version = fields.get("version") if name in ("OPEN", "OPENED") else None
    if is_uint(version) and version != limits.VERSION:
        raise RemoteProtocolError(
            "version", f"version {version} is not spoken here, {limits.VERSION} is"
        )
    known: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in fields:
            known[field.name] = _tuples(fields[field.name])
        elif field.default is dataclasses.MISSING:
            raise RemoteProtocolError("malformed", f"{name} without {field.name!r}")
    for key, item in known.items():
        if not CHECKS[key](item):
            raise RemoteProtocolError("malformed", f"{name}: {key!r} makes no sense")
    return kind(**known)


def _tuples(item: Any) -> Any:
    """Lists as tuples, two levels deep: no field has more."""
    if isinstance(item, list):
        return tuple(tuple(part) if isinstance(part, list) else part for part in item)
    return item


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
    if name.endswith((".partial", ".manifest.json")):
        return "it ends like a partial file or a manifest"
    return ""
