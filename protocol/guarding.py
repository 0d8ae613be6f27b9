# SPDX-License-Identifier: Apache-2.0
"""What travels between the guard of a disk and the processes of a backup on the same host.

The guard serves the disk to the guest. A producer attaches to it, reads what
nobody has written to yet, and takes over what was saved before a guest's write.
The coordinator of the job holds all writes of all disks for a moment: that is
the instant which the archive shows.

A message is one packet, a msgpack array [name, field, ...], the fields in the
order of the class below; descriptors go with `Attach` and `Attached`. Both
ends belong to one administrator; what comes is checked all the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.frames import pack, unpack

# Clusters that one guest's write saves at a time, and slots of one message.
MAX_SAVED_CLUSTERS = 16
# Clusters that a producer may claim at once; more than a frame of data holds
# makes sense for holes only: 4 GiB.
MAX_CLAIM_CLUSTERS = 1 << 16
# 64 TiB of spool; a number that no list of free slots need fear comes first.
MAX_SLOTS = 1 << 20
MAX_PACKET_BYTES = 64 * 1024
# An hour, as for every other wait.
MAX_WAIT_S = 3600
_MAX_ITEMS = 1024


class Attach(NamedTuple):
    """Producer: I back up `disk` for `job`. Descriptors: the memory, and the spool file if any.

    Old data goes to slots of one cluster each: the first `memory_slots` lie in
    the memory from byte `memory_at` on, the next `spool_slots` in the spool
    file. `guest_wait_s`: a guest's write that would wait longer ends the backup.
    """

    version: int
    job: bytes
    disk: str
    memory_at: int
    memory_slots: int
    spool_slots: int
    guest_wait_s: int


class Attached(NamedTuple):
    """Guard: you may. A descriptor comes with it, to read the disk by."""

    size_bytes: int


class Refused(NamedTuple):
    """Guard: no, and why. The connection ends."""

    reason: str


class Hold(NamedTuple):
    """Coordinator: let no write of these disks begin, and tell when none is under way."""

    version: int
    job: bytes
    disks: tuple[str, ...]


class Held(NamedTuple):
    """Guard: so it is. If `Begin` does not come soon, writes go on without it."""


class Begin(NamedTuple):
    """Coordinator: this is the instant. Save what is written to from now on, and go on."""


class Begun(NamedTuple):
    """Guard, to the coordinator and to the producers: the backup has begun."""


class Claim(NamedTuple):
    """Producer: give me the next clusters to read, at most so many. One claim at a time."""

    most: int


class Claimed(NamedTuple):
    """Guard: these are yours, and guests wait for them. No clusters: none is left to claim."""

    first: int
    clusters: int


class Copied(NamedTuple):
    """Producer: I have read what I claimed."""


class Saved(NamedTuple):
    """Guard: a guest's write saved the old data of these clusters, from `first` on, into slots."""

    first: int
    slots: tuple[int, ...]


class SavedHole(NamedTuple):
    """Guard: a guest wrote to these clusters, which held nothing but zeroes."""

    first: int
    clusters: int


class Release(NamedTuple):
    """Producer: these slots may be used again."""

    slots: tuple[int, ...]


class Waiting(NamedTuple):
    """Guard: so many writes of guests wait for a free slot."""

    writes: int


class Failed(NamedTuple):
    """Guard: the backup is over, and why; the disk serves on."""

    reason: str


ToGuard = Attach | Hold | Begin | Claim | Copied | Release
FromGuard = Attached | Refused | Held | Begun | Claimed | Saved | SavedHole | Waiting | Failed


def encode(message: ToGuard | FromGuard) -> bytes:
    name = type(message).__name__.upper()
    return pack([name, *(list(f) if isinstance(f, tuple) else f for f in message)])


def decode_for_guard(packet: bytes) -> ToGuard:
    """Raises RemoteProtocolError for anything that is no message to a guard."""
    name, fields = _head(packet)
    match name, fields:
        case "CLAIM", [int() as most] if 1 <= most <= MAX_CLAIM_CLUSTERS:
            return Claim(most)
        case "COPIED", []:
            return Copied()
        case "RELEASE", [list() as slots] if _are_slots(slots):
            return Release(tuple(slots))
        case "BEGIN", []:
            return Begin()
        case "HOLD", [int() as version, bytes() as job, list() as disks] if len(
            job
        ) == limits.UUID_BYTES and all(isinstance(disk, str) for disk in disks):
            return Hold(_version(version), job, tuple(disks))
        case "ATTACH", [
            int() as version,
            bytes() as job,
            str() as disk,
            int() as at,
            int() as memory_slots,
            int() as spool_slots,
            int() as wait_s,
        ] if (
            len(job) == limits.UUID_BYTES
            and at >= 0
            and 0 < memory_slots <= MAX_SLOTS
            and 0 <= spool_slots <= MAX_SLOTS
            and 0 < wait_s <= MAX_WAIT_S
        ):
            return Attach(_version(version), job, disk, at, memory_slots, spool_slots, wait_s)
    raise RemoteProtocolError("malformed", f"no message to a guard: {name!r:.40}")


def decode_from_guard(packet: bytes) -> FromGuard:
    """Raises RemoteProtocolError for anything that is no message of a guard."""
    name, fields = _head(packet)
    match name, fields:
        case "SAVED", [int() as first, list() as slots] if (
            first >= 0 and 0 < len(slots) <= MAX_SAVED_CLUSTERS and _are_slots(slots)
        ):
            return Saved(first, tuple(slots))
        case "SAVEDHOLE", [int() as first, int() as clusters] if first >= 0 and clusters > 0:
            return SavedHole(first, clusters)
        case "CLAIMED", [int() as first, int() as clusters] if first >= 0 and clusters >= 0:
            return Claimed(first, clusters)
        case "WAITING", [int() as writes] if writes >= 0:
            return Waiting(writes)
        case "ATTACHED", [int() as size] if size > 0:
            return Attached(size)
        case "REFUSED", [str() as reason]:
            return Refused(reason)
        case "FAILED", [str() as reason]:
            return Failed(reason)
        case "HELD", []:
            return Held()
        case "BEGUN", []:
            return Begun()
    raise RemoteProtocolError("malformed", f"no message of a guard: {name!r:.40}")


def _head(packet: bytes) -> tuple[str, list[Any]]:
    value = unpack(packet, MAX_PACKET_BYTES, _MAX_ITEMS)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise RemoteProtocolError("malformed", "a message that is no [name, ...]")
    return value[0], value[1:]


def _version(version: int) -> int:
    if version != limits.VERSION:
        raise RemoteProtocolError("version", f"a peer of version {version}")
    return version


def _are_slots(items: list[Any]) -> bool:
    return all(isinstance(slot, int) and 0 <= slot < 2 * MAX_SLOTS for slot in items)
