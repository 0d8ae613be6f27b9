# SPDX-License-Identifier: Apache-2.0
"""The messages between a producer and the archiver, to bytes and back.

docs/wire-protocol.md is the authority; field names here are the keys there. A message is a
list of parts (one ZeroMQ multipart message): one part is a control message, two or three
are a data message. What does not fit raises RemoteProtocolError.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, NamedTuple

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, MAX_CLUSTERS
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.schema import (
    DevId,
    Dialogue,
    Heartbeat,
    Name,
    Part,
    Text,
    Uint,
    Uuid,
    UuidOrEmpty,
    between,
    length_of,
    pack,
    unpack,
)


class Hello(NamedTuple):
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


class Welcome(NamedTuple):
    """Archiver: go on. `credit` is the first limit (as in `Grant`), all sizes in bytes.

    `frame_bytes` is the largest charge of one frame; a peer that is silent for
    `heartbeat_s` seconds is taken for dead. `shared`: the producer may send
    `SharedRun` frames. `reconnect_s`: so long a lost connection is waited for;
    0: it is the end. `scattered`: and `Scattered` frames, too. `base`: there is
    an earlier archive of the device, and `UnchangedRun` frames may be sent. `digest_key`:
    the digests of its clusters may be asked for (`Want`), and this is their key; empty: there are none.
    """

    version: Uint
    dev_id: DevId
    credit: Uint
    frame_bytes: Uint
    heartbeat_s: Heartbeat
    shared: bool = False
    reconnect_s: Annotated[int, between(0, limits.MAX_RECONNECT_S)] = 0
    scattered: bool = False
    base: bool = False
    digest_key: Annotated[bytes, length_of(0, limits.DIGEST_KEY_BYTES)] = b""


class Grant(NamedTuple):
    """Archiver: the sum of charges may reach `limit`; frames up to `acked` are written."""

    limit: Uint
    acked: Uint


class Resume(NamedTuple):
    """Producer, on a new connection: I am the one who began this session."""

    version: Uint
    job: Uuid
    session: Uuid
    attempt: Uint


class Resumed(NamedTuple):
    """Archiver: go on behind frame `received`. The others as in `Grant`; `ended`: END has come."""

    received: Uint
    limit: Uint
    acked: Uint
    ended: bool


class Bye(NamedTuple):
    """Producer: I have heard that it is done. Ends a session that could be resumed."""


class End(NamedTuple):
    """Producer: that was all: so many data messages, so many clusters."""

    frames: Uint
    clusters: Uint


class Want(NamedTuple):
    """Producer: what digests have these clusters of the base?"""

    first: Uint
    clusters: Annotated[int, between(1, limits.MAX_WANTED_CLUSTERS)]


class Have(NamedTuple):
    """Archiver: the digests of the clusters from `first` on, one behind the other (see `cluster_digest`)."""

    first: Uint
    digests: bytes


class Done(NamedTuple):
    """Archiver: the archive is complete and stored under its name."""

    uuid: Uuid


class Refuse(NamedTuple):
    """Archiver: no, and why; `code` is a word of the specification. Ends the session."""

    code: Text
    reason: Text


class Fail(NamedTuple):
    """Producer: the device cannot be read on; the job fails. Ends the session."""

    reason: Text


class Abort(NamedTuple):
    """Archiver: the job failed elsewhere or was cancelled. Ends the session."""

    reason: Text


class Ping(NamedTuple):
    """Producer: are you there?"""


class Pong(NamedTuple):
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
    | Want
    | Have
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
    count: int  # type: ignore[assignment]  # it hides tuple.count, which is not used here
    masks: bytes
    payload: memoryview


class SharedRun(NamedTuple):
    """A `RunFrame` whose payload lies at `position` in the shared memory, in bytes.

    `data_bytes`: how long it is; the masks say so, and it does not travel.
    """

    seq: int
    dev_id: int
    first_cluster: int
    count: int  # type: ignore[assignment]  # as above
    masks: bytes
    position: int
    data_bytes: int


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


class UnchangedRun(NamedTuple):
    """Consecutive clusters that are as they were when the base was made; no data travels."""

    seq: int
    dev_id: int
    first_cluster: int
    count: int  # type: ignore[assignment]  # as above


DataFrame = ClusterFrame | RunFrame | SharedRun | Scattered | UnchangedRun
Message = Control | DataFrame


_CONTROL = Dialogue(
    *(Hello, Welcome, Grant, End, Done, Refuse, Fail, Abort, Ping, Pong, Resume, Resumed, Bye),
    *(Want, Have),
    keyed=True,
    max_bytes=limits.MAX_CONTROL_BYTES,
)
_NOTHING = memoryview(b"")
# Cluster number, position, mask.
_SCATTERED = struct.Struct(">IQH")


#: A control message's part. Raises LocalProtocolError for what the peer would refuse.
encode_control: Callable[[Control], list[Part]] = _CONTROL.encode


def sayable(text: str) -> str:
    """`text` as a message can carry it: not too long, and undecodable bytes escaped.

    The reason for a failure often names a file; reporting it must not fail.
    """
    clipped = text[: limits.MAX_REASON_CHARS]
    return clipped.encode("utf-8", "backslashreplace").decode()[: limits.MAX_REASON_CHARS]


def encode_run(
    seq: int, dev_id: int, first_cluster: int, count: int, masks: bytes, payload: Part
) -> list[Part]:
    head: list[Part] = [
        pack(seq),
        pack([dev_id, first_cluster, count, masks]),
    ]
    if memoryview(payload).nbytes:
        head.append(payload)
    return head


def encode_shared_run(
    seq: int, dev_id: int, first_cluster: int, count: int, masks: bytes, position: int
) -> list[Part]:
    return [
        pack(seq),
        pack([dev_id, first_cluster, count, masks, position]),
    ]


def encode_scattered(seq: int, dev_id: int, clusters: Iterable[SharedCluster]) -> list[Part]:
    pack_one = _SCATTERED.pack
    table = b"".join([pack_one(*cluster) for cluster in clusters])
    return [pack(seq), pack([dev_id, table])]


def encode_unchanged(seq: int, dev_id: int, first_cluster: int, count: int) -> list[Part]:
    return [pack(seq), pack([dev_id, first_cluster, count])]


def decode(parts: Sequence[Part]) -> Message:
    """Read one message. Raises RemoteProtocolError for anything else than a message."""
    if len(parts) == 1:
        message: Control = _CONTROL.decode(parts)
        return message
    if len(parts) in (2, 3):
        return _decode_data(parts)
    raise RemoteProtocolError("malformed", f"a message of {len(parts)} parts")


# The items of a frame: dev_id first, then the clusters.
_ITEM_TYPES: frozenset[tuple[type, ...]] = frozenset(
    {
        (int, bytes),
        (int, int, bytes),
        (int, int, int),
        (int, int, int, bytes),
        (int, int, int, bytes, int),
    }
)


def _decode_data(parts: Sequence[Part]) -> DataFrame:
    seq = unpack(parts[0], limits.MAX_NUMBER_PART_BYTES)
    if type(seq) is not int or seq < 1:
        raise RemoteProtocolError("malformed", "a data message without a number")
    frame = unpack(parts[1], limits.MAX_FRAME_PART_BYTES)
    if not isinstance(frame, list) or tuple(map(type, frame)) not in _ITEM_TYPES:
        raise RemoteProtocolError("malformed", "a frame of wrong types")
    if len(parts) == 3 and len(frame) != 4:
        raise RemoteProtocolError("malformed", f"a frame of {len(frame)} items with a payload")
    if not 1 <= frame[0] <= limits.MAX_DEV_ID:
        raise RemoteProtocolError("malformed", "a frame without a dev_id")
    message: DataFrame
    match frame:
        case [dev_id, table]:
            message = _decode_scattered(seq, dev_id, table)
            fault = scattered_fault(message.clusters)
        case [dev_id, int(first), int(count)]:
            message = UnchangedRun(seq, dev_id, first, count)
            fault = unchanged_fault(first, count)
        case [dev_id, cluster_num, data]:
            return _decode_cluster(seq, dev_id, cluster_num, data)
        case [dev_id, first, count, masks]:
            payload = memoryview(parts[2]) if len(parts) == 3 else _NOTHING
            size_bytes = payload.nbytes
            message = RunFrame(seq, dev_id, first, count, masks, payload)
            fault = run_fault(first, count, masks, size_bytes) or payload_fault(masks, size_bytes)
        case _:
            dev_id, first, count, masks, position = frame
            if not masks or position < 0:
                raise RemoteProtocolError("malformed", "a run in shared memory that is nowhere")
            size_bytes = masked_bytes(masks)
            message = SharedRun(seq, dev_id, first, count, masks, position, size_bytes)
            fault = run_fault(first, count, masks, size_bytes)
    if fault is not None:
        raise RemoteProtocolError(*fault)
    return message


def _decode_cluster(seq: int, dev_id: int, cluster_num: int, data: bytes) -> ClusterFrame:
    if len(data) > CLUSTER_BYTES:
        raise RemoteProtocolError("too-large", f"a cluster of {len(data)} bytes")
    if not 0 <= cluster_num < MAX_CLUSTERS:
        raise RemoteProtocolError("malformed", f"cluster {cluster_num}")
    return ClusterFrame(seq, dev_id, cluster_num, data)


def _decode_scattered(seq: int, dev_id: int, table: bytes) -> Scattered:
    if len(table) % _SCATTERED.size:
        raise RemoteProtocolError("malformed", "scattered clusters of wrong types")
    count = len(table) // _SCATTERED.size
    if count > limits.MAX_SCATTERED_CLUSTERS:
        raise RemoteProtocolError(*_too_many(count))
    clusters = tuple(map(SharedCluster._make, _SCATTERED.iter_unpack(table)))
    return Scattered(seq, dev_id, clusters)


def masked_bytes(masks: bytes) -> int:
    """How much data the masks stand for, in bytes."""
    return int.from_bytes(masks, "big").bit_count() * BLOCK_BYTES


def run_fault(first: int, count: int, masks: bytes, data_bytes: int) -> tuple[str, str] | None:
    """Return what is wrong with a run of `data_bytes` bytes of data, as (error code, reason)."""
    for amount, limit, what in (
        (count, limits.MAX_RUN_CLUSTERS, "clusters"),
        (len(masks), limits.MAX_MASKS_BYTES, "bytes of masks"),
        (data_bytes, limits.MAX_PAYLOAD_BYTES, "bytes of data"),
    ):
        if amount > limit:
            return "too-large", f"a run with {amount} {what}, at most {limit}"
    if first < 0 or count < 1 or first + count > MAX_CLUSTERS:
        return "malformed", f"a run of clusters {first} + {count}"
    if masks and len(masks) != 2 * count:
        return "malformed", f"{len(masks)} bytes of masks for {count} clusters"
    return None


def unchanged_fault(first: int, count: int) -> tuple[str, str] | None:
    """Return what is wrong with a run of unchanged clusters, as (error code, reason)."""
    if first < 0 or count < 1 or first + count > MAX_CLUSTERS:
        return "malformed", f"a run of unchanged clusters {first} + {count}"
    return None


def payload_fault(masks: bytes, data_bytes: int) -> tuple[str, str] | None:
    """Return what is wrong with a payload of `data_bytes` bytes, as (error code, reason)."""
    expected = masked_bytes(masks)
    if data_bytes != expected:
        return "malformed", f"{data_bytes} bytes of data where the masks say {expected}"
    return None


def scattered_bytes(clusters: Sequence[SharedCluster]) -> int:
    """How much data these clusters have, in bytes."""
    return sum([mask.bit_count() for _, _, mask in clusters]) * BLOCK_BYTES


def scattered_fault(clusters: Sequence[SharedCluster]) -> tuple[str, str] | None:
    """Return what is wrong with scattered clusters, as (error code, reason)."""
    if not clusters:
        return "malformed", "no scattered clusters"
    if len(clusters) > limits.MAX_SCATTERED_CLUSTERS:
        return _too_many(len(clusters))
    data_bytes = scattered_bytes(clusters)
    if data_bytes > limits.MAX_PAYLOAD_BYTES:
        limit = limits.MAX_PAYLOAD_BYTES
        return "too-large", f"{data_bytes} bytes of scattered data, at most {limit}"
    return None


def _too_many(count: int) -> tuple[str, str]:
    return "too-large", f"{count} scattered clusters, at most {limits.MAX_SCATTERED_CLUSTERS}"
