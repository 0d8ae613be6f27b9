# SPDX-License-Identifier: Apache-2.0
"""The messages between the guard of a disk and the processes of a backup on the same host.

The guard serves the disk to the guest. A producer attaches to it, reads what
nobody has written to yet, and takes over what was saved before a guest's write.
The coordinator of the job holds all writes of all disks for a moment: that is
the instant which the archive shows.

A message is one packet, a msgpack array [name, field, ...], the fields in the
order of the class below; descriptors go with `Attach` and `Attached`. Both
ends belong to one administrator; what comes is checked all the same.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from vmapipe.clusters.sizes import MAX_CLUSTERS
from vmapipe.protocol.schema import Dialogue, Uuid, between, lengths

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

_Clusters = Annotated[int, between(0, MAX_CLUSTERS)]
_Cluster = Annotated[int, between(0, MAX_CLUSTERS - 1)]
_Slot = Annotated[int, between(0, 2 * MAX_SLOTS - 1)]
_Claim = Annotated[int, between(1, MAX_CLAIM_CLUSTERS)]


class GuardAttach(NamedTuple):
    """Producer: I back up `disk` for `job`. Descriptors: the memory, and the spool file if any.

    Old data goes to slots of one cluster each: the first `memory_slots` lie in
    the memory from byte `memory_at` on, the next `spool_slots` in the spool
    file. `guest_wait_s`: a guest's write that would wait longer ends the backup.
    """

    version: int
    job: Uuid
    disk: str
    memory_at: Annotated[int, between(0, 1 << 62)]
    memory_slots: Annotated[int, between(1, MAX_SLOTS)]
    spool_slots: Annotated[int, between(0, MAX_SLOTS)]
    guest_wait_s: Annotated[int, between(1, MAX_WAIT_S)]


class Attached(NamedTuple):
    """Guard: you may. A descriptor comes with it, to read the disk by."""

    size_bytes: Annotated[int, between(1, 1 << 62)]


class GuardRefused(NamedTuple):
    """Guard: no, and why. The connection ends."""

    reason: str


class Hold(NamedTuple):
    """Coordinator: let no write of these disks begin, and tell when none is under way."""

    version: int
    job: Uuid
    disks: tuple[str, ...]


class Held(NamedTuple):
    """Guard: so it is. If `Begin` does not come soon, writes go on without it."""


class GuardBegin(NamedTuple):
    """Coordinator: this is the instant. Save what is written to from now on, and go on."""


class GuardBegun(NamedTuple):
    """Guard, to the coordinator and to the producers: the backup has begun."""


class Claim(NamedTuple):
    """Producer: give me the next clusters to read, at most so many. One claim at a time."""

    most: _Claim


class Claimed(NamedTuple):
    """Guard: these are yours, and guests wait for them. No clusters: none is left to claim."""

    first: _Clusters
    clusters: _Clusters


class GuardCopied(NamedTuple):
    """Producer: I have read so many of the clusters that I claimed, the first ones.

    The others can be claimed again.
    """

    clusters: _Claim


class Saved(NamedTuple):
    """Guard: guests' writes saved the old data of these clusters into slots, one for each."""

    clusters: Annotated[tuple[_Cluster, ...], lengths(1, MAX_TOLD_CLUSTERS)]
    slots: Annotated[tuple[_Slot, ...], lengths(1, MAX_TOLD_CLUSTERS)]

    def fault(self) -> str | None:
        return None if len(self.clusters) == len(self.slots) else "not a slot for each cluster"


class SavedHole(NamedTuple):
    """Guard: a guest wrote to these clusters, which held nothing but zeroes."""

    first: _Clusters
    clusters: _Clusters


class GuardRelease(NamedTuple):
    """Producer: these slots may be used again."""

    slots: tuple[_Slot, ...]


class GuardWaiting(NamedTuple):
    """Guard: so many writes of guests wait for a free slot."""

    writes: Annotated[int, between(0, 1 << 32)]


class GuardAskFelt(NamedTuple):
    """Producer: what has the guest felt since I asked last? A request is slow above `bound_us`.

    The first time, the guard begins to count.
    """

    bound_us: Annotated[int, between(1, MAX_WAIT_S * 1_000_000)]


class GuardFelt(NamedTuple):
    """Guard: so many requests of guests were answered, so many of them slowly; the 99th percentile."""

    requests: Annotated[int, between(0, 1 << 62)]
    slow: Annotated[int, between(0, 1 << 62)]
    p99_us: Annotated[int, between(0, 1 << 62)]


class GuardFailed(NamedTuple):
    """Guard: the backup is over, and why; the disk serves on."""

    reason: str


ToGuard = GuardAttach | Hold | GuardBegin | Claim | GuardCopied | GuardRelease | GuardAskFelt
FromGuard = (
    Attached
    | GuardRefused
    | Held
    | GuardBegun
    | Claimed
    | Saved
    | SavedHole
    | GuardWaiting
    | GuardFelt
    | GuardFailed
)


_TO_GUARD = Dialogue(
    *(GuardAttach, Hold, GuardBegin, Claim, GuardCopied, GuardRelease, GuardAskFelt),
    keyed=False,
    max_bytes=MAX_PACKET_BYTES,
    max_items=_MAX_ITEMS,
    names={
        GuardAttach: "ATTACH",
        GuardBegin: "BEGIN",
        GuardCopied: "COPIED",
        GuardRelease: "RELEASE",
        GuardAskFelt: "ASK_FELT",
    },
)
_FROM_GUARD = Dialogue(
    *(
        Attached,
        GuardRefused,
        Held,
        GuardBegun,
        Claimed,
        Saved,
        SavedHole,
        GuardWaiting,
        GuardFelt,
        GuardFailed,
    ),
    keyed=False,
    max_bytes=MAX_PACKET_BYTES,
    max_items=_MAX_ITEMS,
    names={
        GuardRefused: "REFUSED",
        GuardBegun: "BEGUN",
        GuardWaiting: "WAITING",
        GuardFelt: "FELT",
        GuardFailed: "FAILED",
    },
)


def encode(message: ToGuard | FromGuard) -> bytes:
    dialogue = _TO_GUARD if isinstance(message, ToGuard) else _FROM_GUARD
    return bytes(dialogue.encode(message, checked=False)[0])


def decode_for_guard(packet: bytes) -> ToGuard:
    """Raises RemoteProtocolError for anything that is not a message to a guard."""
    message: ToGuard = _TO_GUARD.decode([packet])
    return message


def decode_from_guard(packet: bytes) -> FromGuard:
    """Raises RemoteProtocolError for anything that is not a message of a guard."""
    message: FromGuard = _FROM_GUARD.decode([packet])
    return message
