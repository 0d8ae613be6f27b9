# SPDX-License-Identifier: Apache-2.0
"""Messages of every kind, for tests to draw from."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import strategies as st

from vmapipe.clusters.sizes import CLUSTER_BYTES, MAX_CLUSTERS
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.schema import Part, pack
from vmapipe.protocol.transfer import (
    Abort,
    Bye,
    ClusterFrame,
    Control,
    Done,
    End,
    Fail,
    Grant,
    Have,
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
    UnchangedRun,
    Want,
    Welcome,
    decode,
    encode_control,
    encode_run,
    encode_scattered,
    encode_shared_run,
    encode_unchanged,
)

UUID = bytes(range(16))
U64 = (1 << 64) - 1
FULL_CLUSTER = b"\x5a" * CLUSTER_BYTES

# One valid message of every kind.
EXAMPLES: dict[str, Message] = {
    "HELLO": Hello(limits.VERSION, UUID, "drive-scsi0", 3 * 65536, "test", "/proc/7/fd/5", UUID, 0),
    "WELCOME": Welcome(limits.VERSION, 1, 1 << 24, 1 << 20, 30, True, 60, True, True, bytes(32)),
    "GRANT": Grant(1 << 25, 0),
    "END": End(0, 0),
    "DONE": Done(UUID),
    "REFUSE": Refuse("busy", "the job has all its devices"),
    "FAIL": Fail("read error"),
    "ABORT": Abort("cancelled"),
    "PING": Ping(),
    "PONG": Pong(),
    "RESUME": Resume(limits.VERSION, UUID, UUID, 1),
    "RESUMED": Resumed(0, 1 << 25, 0, ended=False),
    "BYE": Bye(),
    "WANT": Want(0, 2048),
    "HAVE": Have(0, bytes(32)),
    "CLUSTER": ClusterFrame(1, 1, 0, FULL_CLUSTER),
    "RUN": RunFrame(1, 1, 0, 2, b"\0\1\0\0", memoryview(bytes(4096))),
    "SHARED": SharedRun(1, 1, 0, 2, b"\0\1\0\0", 8192, 4096),
    "SCATTERED": Scattered(1, 1, (SharedCluster(7, 8192, 1), SharedCluster(3, 0, 0))),
    "UNCHANGED": UnchangedRun(1, 1, 0, 3),
}

CONTROLS: list[Control] = [
    message
    for message in EXAMPLES.values()
    if not isinstance(message, ClusterFrame | RunFrame | SharedRun | Scattered | UnchangedRun)
]


uints = st.integers(0, U64)
uuids = st.binary(min_size=16, max_size=16)
reasons = st.text(max_size=60)
names = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=40
)
controls: st.SearchStrategy[Control] = st.one_of(
    st.builds(
        Hello,
        st.just(limits.VERSION),
        uuids,
        names,
        uints,
        reasons,
        reasons,
        st.just(b"") | uuids,
        uints,
    ),
    st.builds(
        Welcome,
        st.just(limits.VERSION),
        st.integers(1, 254),
        uints,
        uints,
        st.integers(1, limits.MAX_HEARTBEAT_S),
        st.booleans(),
        st.integers(0, limits.MAX_RECONNECT_S),
        st.booleans(),
        st.booleans(),
        st.just(b"") | st.binary(min_size=32, max_size=32),
    ),
    st.builds(Want, uints, st.integers(1, limits.MAX_WANTED_CLUSTERS)),
    st.builds(Have, uints, st.binary(max_size=64)),
    st.builds(Resume, st.just(limits.VERSION), uuids, uuids, uints),
    st.builds(Resumed, uints, uints, uints, st.booleans()),
    st.just(Bye()),
    st.builds(Grant, uints, uints),
    st.builds(End, uints, uints),
    st.builds(Done, uuids),
    st.builds(Refuse, reasons, reasons),
    st.builds(Fail, reasons),
    st.builds(Abort, reasons),
    st.just(Ping()),
    st.just(Pong()),
)
cluster_frames = st.builds(
    ClusterFrame,
    st.integers(1, U64),
    st.integers(1, 254),
    st.integers(0, MAX_CLUSTERS - 1),
    st.one_of(
        st.just(b""),
        st.just(FULL_CLUSTER),
        st.integers(1, 65536).map(lambda size: b"\x01" * size),
        st.binary(max_size=50),
    ),
)


@st.composite
def run_frames(draw: st.DrawFn) -> RunFrame:
    if draw(st.booleans()):
        count = draw(st.integers(1, limits.MAX_RUN_CLUSTERS))
        masks = b""
    else:
        count = draw(st.integers(1, 30))
        masks = draw(st.binary(min_size=2 * count, max_size=2 * count))
        while int.from_bytes(masks, "big").bit_count() > 256:
            masks = masks[: len(masks) // 2] + bytes(len(masks) - len(masks) // 2)
    return RunFrame(
        draw(st.integers(1, U64)),
        draw(st.integers(1, 254)),
        draw(st.integers(0, MAX_CLUSTERS - count)),
        count,
        masks,
        memoryview(b"\xa5" * (4096 * int.from_bytes(masks, "big").bit_count())),
    )


@st.composite
def shared_runs(draw: st.DrawFn) -> SharedRun:
    run = draw(run_frames().filter(lambda frame: frame.masks != b""))
    return SharedRun(*run[:5], draw(uints), run.payload.nbytes)


@st.composite
def scattered(draw: st.DrawFn) -> Scattered:
    cluster = st.builds(
        SharedCluster,
        st.integers(0, MAX_CLUSTERS - 1),
        uints,
        st.sampled_from((0, 1, 0x8001, 0xFFFF)) | st.integers(0, 0xFFFF),
    )
    # 64 clusters may all be full.
    many = draw(st.lists(cluster, min_size=1, max_size=64))
    return Scattered(draw(st.integers(1, U64)), draw(st.integers(1, 254)), tuple(many))


@st.composite
def unchanged_runs(draw: st.DrawFn) -> UnchangedRun:
    first = draw(st.integers(0, MAX_CLUSTERS - 1))
    count = draw(st.integers(1, MAX_CLUSTERS - first))
    return UnchangedRun(draw(st.integers(1, U64)), draw(st.integers(1, 254)), first, count)


data_frames = cluster_frames | run_frames() | shared_runs() | scattered() | unchanged_runs()


def encode(message: Message) -> list[Part]:
    match message:
        case ClusterFrame():
            # Only other producers send them.
            return [pack(message.seq), pack([message.dev_id, message.cluster_num, message.data])]
        case RunFrame():
            return encode_run(*message)
        case SharedRun():
            return encode_shared_run(*message[:6])
        case Scattered():
            return encode_scattered(*message)
        case UnchangedRun():
            return encode_unchanged(*message)
        case _:
            return encode_control(message)


def refusal(*parts: Part) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(parts)
    assert caught.value.code in ("malformed", "too-large", "version")
    assert f"[{caught.value.code}]" in str(caught.value)
    return caught.value


def data(number: Any, frame: Any, *payload: bytes) -> list[Part]:
    return [msgpack.packb(number), msgpack.packb(frame), *payload]
