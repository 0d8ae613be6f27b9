# SPDX-License-Identifier: Apache-2.0
"""Messages to bytes and back.

A message is a list of parts (one ZeroMQ multipart message): one part is a
control message, two or three are a data message. What does not fit raises
RemoteProtocolError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, MAX_CLUSTERS
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.messages import (
    Abort,
    Bye,
    ClusterFrame,
    Control,
    DataFrame,
    Done,
    End,
    Fail,
    Grant,
    Hello,
    Message,
    Ping,
    Pong,
    Refuse,
    Resume,
    Resumed,
    RunFrame,
    Scattered,
    SharedCluster,
    SharedRun,
    Welcome,
)
from vmapipe.protocol.packing import Part, pack, unpack
from vmapipe.protocol.schema import Dialogue, is_uint

_CONTROL = Dialogue(
    *(Hello, Welcome, Grant, End, Done, Refuse, Fail, Abort, Ping, Pong, Resume, Resumed, Bye),
    keyed=True,
    max_bytes=limits.MAX_CONTROL_BYTES,
)
_NOTHING = memoryview(b"")
# Cluster number, position, mask.
_SCATTERED = struct.Struct(">IQH")


def encode_control(message: Control) -> list[Part]:
    """Raises LocalProtocolError for what the peer would refuse."""
    return _CONTROL.encode(message)


def sayable(text: str) -> str:
    """`text` as a message can carry it: not too long, and bytes that are no text escaped.

    The reason for a failure often names a file; it must not fail in its turn.
    """
    clipped = text[: limits.MAX_REASON_CHARS]
    return clipped.encode("utf-8", "backslashreplace").decode()[: limits.MAX_REASON_CHARS]


def encode_cluster(seq: int, dev_id: int, cluster_num: int, data: Part) -> list[Part]:
    return [pack(seq), pack([dev_id, cluster_num, data])]


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


def decode(parts: Sequence[Part]) -> Message:
    """Read one message. Raises RemoteProtocolError for anything else than a message."""
    if len(parts) == 1:
        message: Control = _CONTROL.decode(parts)
        return message
    if len(parts) in (2, 3):
        return _decode_data(parts)
    raise RemoteProtocolError("malformed", f"a message of {len(parts)} parts")


def _decode_data(parts: Sequence[Part]) -> DataFrame:
    seq = unpack(parts[0], limits.MAX_NUMBER_PART_BYTES)
    if not is_uint(seq) or not seq:
        raise RemoteProtocolError("malformed", "a data message without a number")
    frame = unpack(parts[1], limits.MAX_FRAME_PART_BYTES)
    if not isinstance(frame, list) or not frame:
        raise RemoteProtocolError("malformed", "a data message without a frame")
    if not is_uint(frame[0]) or not 1 <= frame[0] <= limits.MAX_DEV_ID:
        raise RemoteProtocolError("malformed", "a frame without a dev_id")
    if len(frame) == 3 and len(parts) == 2:
        dev_id, cluster_num, data = frame
        if not is_uint(cluster_num) or not isinstance(data, bytes):
            raise RemoteProtocolError("malformed", "a cluster frame of wrong types")
        if len(data) > CLUSTER_BYTES:
            raise RemoteProtocolError("too-large", f"a cluster of {len(data)} bytes")
        if cluster_num >= MAX_CLUSTERS:
            raise RemoteProtocolError("malformed", f"cluster {cluster_num}")
        return ClusterFrame(seq, dev_id, cluster_num, data)
    if len(frame) == 2 and len(parts) == 2:
        return _decode_scattered(seq, frame)
    if len(frame) == 4:
        payload = memoryview(parts[2]) if len(parts) == 3 else _NOTHING
        return _decode_run(seq, frame, payload)
    if len(frame) == 5 and len(parts) == 2:
        return _decode_shared_run(seq, frame)
    raise RemoteProtocolError("malformed", f"a frame of {len(frame)} items")


def _decode_run(seq: int, frame: list[Any], payload: memoryview) -> RunFrame:
    dev_id, first, count, masks = frame
    if not is_uint(first) or not is_uint(count) or not isinstance(masks, bytes):
        raise RemoteProtocolError("malformed", "a run frame of wrong types")
    fault = run_fault(first, count, masks, payload.nbytes)
    if fault is not None:
        raise RemoteProtocolError(*fault)
    return RunFrame(seq, dev_id, first, count, masks, payload)


def _decode_shared_run(seq: int, frame: list[Any]) -> SharedRun:
    dev_id, first, count, masks, position = frame
    if not (is_uint(first) and is_uint(count) and is_uint(position)):
        raise RemoteProtocolError("malformed", "a run frame of wrong types")
    if not isinstance(masks, bytes) or not masks:
        raise RemoteProtocolError("malformed", "a run in shared memory without masks")
    fault = run_fault(first, count, masks, masked_bytes(masks))
    if fault is not None:
        raise RemoteProtocolError(*fault)
    return SharedRun(seq, dev_id, first, count, masks, position)


def _decode_scattered(seq: int, frame: list[Any]) -> Scattered:
    dev_id, table = frame
    if not isinstance(table, bytes) or len(table) % _SCATTERED.size:
        raise RemoteProtocolError("malformed", "scattered clusters of wrong types")
    count = len(table) // _SCATTERED.size
    if count > limits.MAX_SCATTERED_CLUSTERS:
        raise RemoteProtocolError(*_too_many(count))
    clusters = tuple(map(SharedCluster._make, _SCATTERED.iter_unpack(table)))
    fault = scattered_fault(clusters)
    if fault is not None:
        raise RemoteProtocolError(*fault)
    return Scattered(seq, dev_id, clusters)


def masked_bytes(masks: bytes) -> int:
    """How much data the masks stand for, in bytes."""
    return int.from_bytes(masks, "big").bit_count() * BLOCK_BYTES


def run_fault(first: int, count: int, masks: bytes, data_bytes: int) -> tuple[str, str] | None:
    """What is wrong with a run, as (error code, reason)."""
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
    expected = masked_bytes(masks)
    if data_bytes != expected:
        return "malformed", f"{data_bytes} bytes of data where the masks say {expected}"
    return None


def scattered_bytes(clusters: Sequence[SharedCluster]) -> int:
    """How much data these clusters have, in bytes."""
    return sum([mask.bit_count() for _, _, mask in clusters]) * BLOCK_BYTES


def scattered_fault(clusters: Sequence[SharedCluster]) -> tuple[str, str] | None:
    """What is wrong with scattered clusters, as (error code, reason)."""
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
