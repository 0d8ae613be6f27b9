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

from collections.abc import Callable
from typing import Any, NamedTuple

from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.packing import pack, unpack

# Clusters that one guest's write saves at a time.
MAX_SAVED_CLUSTERS = 16
# Clusters, and slots, of one message: those of some writes that came together.
MAX_TOLD_CLUSTERS = 64
# Clusters that a producer may claim at once; more than a frame of data holds
# makes sense for holes only: 4 GiB.
MAX_CLAIM_CLUSTERS = 1 << 16
# 64 GiB; the lists of free slots are made in full, and stay small enough.
MAX_SLOTS = 1 << 20
MAX_PACKET_BYTES = 64 * 1024
# An hour, as for every other wait.
MAX_WAIT_S = 3600
_MAX_ITEMS = 1024

Check = Callable[[Any], bool]


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
    """Producer: I have read so many of the clusters that I claimed, the first ones.

    The others can be claimed again.
    """

    clusters: int


class Saved(NamedTuple):
    """Guard: guests' writes saved the old data of these clusters into slots, one for each."""

    clusters: tuple[int, ...]
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
    message: ToGuard = _decode(packet, _TO_GUARD)
    return message


def decode_from_guard(packet: bytes) -> FromGuard:
    """Raises RemoteProtocolError for anything that is no message of a guard."""
    message: FromGuard = _decode(packet, _FROM_GUARD)
    if isinstance(message, Saved) and len(message.clusters) != len(message.slots):
        raise RemoteProtocolError("malformed", "SAVED: not a slot for each cluster")
    return message


def _number(low: int, high: int) -> Check:
    return lambda item: isinstance(item, int) and low <= item <= high


def _are_slots(item: object) -> bool:
    return isinstance(item, list) and all(
        isinstance(slot, int) and 0 <= slot < 2 * MAX_SLOTS for slot in item
    )


def _are_told(item: object) -> bool:
    return (
        isinstance(item, list)
        and 0 < len(item) <= MAX_TOLD_CLUSTERS
        and all(isinstance(number, int) and 0 <= number < limits.MAX_CLUSTERS for number in item)
    )


def _are_texts(item: object) -> bool:
    return isinstance(item, list) and all(isinstance(text, str) for text in item)


def _is_text(item: object) -> bool:
    return isinstance(item, str)


def _is_job(item: object) -> bool:
    return isinstance(item, bytes) and len(item) == limits.UUID_BYTES


_IS_VERSION = _number(limits.VERSION, limits.VERSION)
_IS_CLUSTER = _number(0, limits.MAX_CLUSTERS)
_IS_OFFSET = _number(0, 1 << 62)

_TO_GUARD: dict[str, tuple[Callable[..., Any], tuple[Check, ...]]] = {
    "ATTACH": (
        Attach,
        (
            _IS_VERSION,
            _is_job,
            _is_text,
            _IS_OFFSET,
            _number(1, MAX_SLOTS),
            _number(0, MAX_SLOTS),
            _number(1, MAX_WAIT_S),
        ),
    ),
    "HOLD": (Hold, (_IS_VERSION, _is_job, _are_texts)),
    "BEGIN": (Begin, ()),
    "CLAIM": (Claim, (_number(1, MAX_CLAIM_CLUSTERS),)),
    "COPIED": (Copied, (_number(1, MAX_CLAIM_CLUSTERS),)),
    "RELEASE": (Release, (_are_slots,)),
}
_FROM_GUARD: dict[str, tuple[Callable[..., Any], tuple[Check, ...]]] = {
    "ATTACHED": (Attached, (_number(1, 1 << 62),)),
    "REFUSED": (Refused, (_is_text,)),
    "HELD": (Held, ()),
    "BEGUN": (Begun, ()),
    "CLAIMED": (Claimed, (_IS_CLUSTER, _IS_CLUSTER)),
    "SAVED": (
        Saved,
        (_are_told, lambda item: _are_slots(item) and 0 < len(item) <= MAX_TOLD_CLUSTERS),
    ),
    "SAVEDHOLE": (SavedHole, (_IS_CLUSTER, _IS_CLUSTER)),
    "WAITING": (Waiting, (_number(0, 1 << 32),)),
    "FAILED": (Failed, (_is_text,)),
}


def _decode(packet: bytes, known: dict[str, tuple[Callable[..., Any], tuple[Check, ...]]]) -> Any:
    value = unpack(packet, MAX_PACKET_BYTES, _MAX_ITEMS)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise RemoteProtocolError("malformed", "a message that is no [name, ...]")
    name, *fields = value
    kind, checks = known.get(name, (None, ()))
    if kind is None or len(fields) != len(checks):
        raise RemoteProtocolError("malformed", f"no message of these: {name!r:.40}")
    for index, (field, check) in enumerate(zip(fields, checks, strict=True)):
        if not check(field):
            raise RemoteProtocolError("malformed", f"{name}: field {index} cannot be {field!r:.40}")
    return kind(*(tuple(field) if isinstance(field, list) else field for field in fields))
