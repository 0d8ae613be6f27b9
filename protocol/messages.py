# SPDX-License-Identifier: Apache-2.0
"""The messages of the dialogue between a producer and the archiver.

docs/wire-protocol.md is the authority; field names here are the keys there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from vmapipe.protocol import limits
from vmapipe.protocol.schema import DevId, Heartbeat, Name, Text, Uint, Uuid, UuidOrEmpty, between


@dataclass(frozen=True, slots=True)
class Hello:
    """Producer: I have this device for that job. `size` in bytes.

    `shared`: where the archiver, if it is on the same host, finds the memory
    in which the data of `SharedRun` frames will lie; empty: nowhere.
    `session`: 16 random bytes of the producer's, by which it is known again
    after its connection was lost; empty: it cannot go on then. `attempt` is
    greater for each new connection, in `Resume` too, so that what was late on
    an old one is known as such.
    """

    version: Uint
    job: Uuid
    device: Name
    size: Uint
    program: Text = ""
    shared: Text = ""
    session: UuidOrEmpty = b""
    attempt: Uint = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """Archiver: go on. `credit` is the first limit (as in `Grant`), all sizes in bytes.

    `frame_bytes` is the largest charge of one frame; a peer that is silent for
    `heartbeat_s` seconds is taken for dead. `shared`: the producer may send
    `SharedRun` frames. `reconnect_s`: so long a lost connection is waited for;
    0: it is the end. `scattered`: and `Scattered` frames, too.
    """

    version: Uint
    dev_id: DevId
    credit: Uint
    frame_bytes: Uint
    heartbeat_s: Heartbeat
    shared: bool = False
    reconnect_s: Annotated[int, between(0, limits.MAX_RECONNECT_S)] = 0
    scattered: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Archiver: the sum of charges may reach `limit`; frames up to `acked` are written."""

    limit: Uint
    acked: Uint


@dataclass(frozen=True, slots=True)
class Resume:
    """Producer, on a new connection: I am the one who began this session."""

    version: Uint
    job: Uuid
    session: Uuid
    attempt: Uint


@dataclass(frozen=True, slots=True)
class Resumed:
    """Archiver: go on behind frame `received`. The others as in `Grant`; `ended`: END has come."""

    received: Uint
    limit: Uint
    acked: Uint
    ended: bool


@dataclass(frozen=True, slots=True)
class Bye:
    """Producer: I have heard that it is done. Ends a session that could be resumed."""


@dataclass(frozen=True, slots=True)
class End:
    """Producer: that was all: so many data messages, so many clusters."""

    frames: Uint
    clusters: Uint


@dataclass(frozen=True, slots=True)
class Done:
    """Archiver: the archive is complete and stored under its name."""

    uuid: Uuid


@dataclass(frozen=True, slots=True)
class Refuse:
    """Archiver: no, and why; `code` is a word of the specification. Ends the session."""

    code: Text
    reason: Text


@dataclass(frozen=True, slots=True)
class Fail:
    """Producer: the device cannot be read on; the job fails. Ends the session."""

    reason: Text


@dataclass(frozen=True, slots=True)
class Abort:
    """Archiver: the job failed elsewhere or was cancelled. Ends the session."""

    reason: Text


@dataclass(frozen=True, slots=True)
class Ping:
    """Producer: are you there?"""


@dataclass(frozen=True, slots=True)
class Pong:
    """Archiver: yes."""


Control = (
    Hello
    | Welcome
    | Grant
    | End
    | Done
    | Refuse
    | Fail
    | Abort
    | Ping
    | Pong
    | Resume
    | Resumed
    | Bye
)


class ClusterFrame(NamedTuple):
    """The RFC's frame: one cluster, as it is on the disk; empty data: all zero."""

    seq: int
    dev_id: int
    cluster_num: int
    data: bytes


class RunFrame(NamedTuple):
    """Consecutive clusters. `masks`: big-endian 16 bits a cluster, or empty: all are zero.

    `payload`: the non-zero 4096-byte blocks, back to back.
    """

    seq: int
    dev_id: int
    first_cluster: int
    count: int  # type: ignore[assignment]  # it hides tuple.count, which nobody needs here
    masks: bytes
    payload: memoryview


class SharedRun(NamedTuple):
    """A `RunFrame` whose payload lies at `position` in the shared memory, in bytes."""

    seq: int
    dev_id: int
    first_cluster: int
    count: int  # type: ignore[assignment]  # as above
    masks: bytes
    position: int


class SharedCluster(NamedTuple):
    """One of a `Scattered` frame: its non-zero blocks lie at `position`, back to back."""

    cluster_num: int
    position: int
    mask: int


class Scattered(NamedTuple):
    """Clusters that need not follow each other, all with their data in the shared memory."""

    seq: int
    dev_id: int
    clusters: tuple[SharedCluster, ...]


DataFrame = ClusterFrame | RunFrame | SharedRun | Scattered
Message = Control | DataFrame
