# SPDX-License-Identifier: Apache-2.0
"""Messages between reader and workers: what was sent arrives, and nothing else is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.restore import (
    MAX_RANGE_EXTENTS,
    MAX_SETUP_BYTES,
    ExtentWork,
    FinishWork,
    FromReader,
    RangeWork,
    Ready,
    Setup,
    SyncWork,
    TargetSetup,
    WorkDone,
    decode_for_reader,
    decode_for_worker,
    encode,
)
from vmapipe.protocol.schema import pack

U64 = st.integers(0, (1 << 63) - 1)
target = st.builds(
    TargetSetup,
    st.integers(1, 254),
    st.integers(0, 1000),
    U64,
    st.booleans(),
    st.binary(max_size=300),
    st.binary(max_size=300),
)
extent_size = st.integers(512, 512 + 59 * 65536)
left_out = st.lists(st.integers(0, 58), max_size=59, unique=True).map(tuple)
digest = st.binary(min_size=16, max_size=16)


@st.composite
def ranges(draw: st.DrawFn) -> RangeWork:
    count = draw(st.integers(1, 20))
    offsets = tuple(draw(st.lists(U64, min_size=count, max_size=count)))
    sizes = tuple(draw(st.lists(extent_size, min_size=count, max_size=count)))
    digests = draw(st.just([]) | st.lists(digest, min_size=count, max_size=count))
    some = draw(left_out) if count == 1 else ()
    return RangeWork(draw(U64), offsets, sizes, tuple(digests), draw(st.booleans()), some)


from_reader = st.one_of(
    st.builds(
        Setup,
        st.binary(min_size=16, max_size=16),
        st.integers(-1, 100),
        st.integers(-1, 100),
        st.lists(target, max_size=254).map(tuple),
        st.booleans(),
    ),
    ranges(),
    st.builds(SyncWork, U64, st.integers(1, 254)),
    st.just(FinishWork()),
    st.builds(
        ExtentWork,
        U64,
        U64,
        st.just(b"") | digest,
        st.binary(min_size=512, max_size=512),
        U64,
        st.booleans(),
        left_out,
    ),
)


@given(from_reader)
def test_what_the_reader_says_arrives(message: FromReader) -> None:
    assert decode_for_worker(encode(message)) == message


@given(st.builds(WorkDone, U64, U64, left_out) | st.just(Ready(limits.VERSION)))
def test_what_a_worker_says_arrives(message: WorkDone | Ready) -> None:
    assert decode_for_reader(encode(message)) == message


def test_the_largest_messages_fit() -> None:
    names = TargetSetup(254, 500, 1 << 48, True, b"n" * 255, b"p" * 1500, b"q" * 107)
    setup = Setup(bytes(16), 3, -1, (names,) * 254)
    assert decode_for_worker(encode(setup)) == setup
    assert len(encode(setup)[0]) < MAX_SETUP_BYTES
    count = MAX_RANGE_EXTENTS
    work = RangeWork(1, (1 << 60,) * count, (512,) * count, (bytes(16),) * count)
    assert decode_for_worker(encode(work)) == work
    assert len(encode(work)[0]) < limits.MAX_CONTROL_BYTES


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_is_refused(parts: list[bytes]) -> None:
    for decode in (decode_for_worker, decode_for_reader):
        with pytest.raises(RemoteProtocolError):
            decode(parts)


def setup_of(*target: object) -> list[object]:
    return ["SETUP", bytes(16), 3, -1, [list(target)]]


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        [1],
        ["NONSENSE"],
        ["SETUP", b"short", 3, -1, []],
        ["SETUP", bytes(16), "3", -1, []],
        ["SETUP", bytes(16), 3, []],
        setup_of(0, 3, 512, True, b"", b"", b""),
        setup_of(255, 3, 512, True, b"", b"", b""),
        setup_of(1, -3, 512, True, b"", b"", b""),
        setup_of(1, 3, -512, True, b"", b"", b""),
        setup_of(1, 3, 512, 1, b"", b"", b""),
        setup_of(1, 3, 512, True, "name", b"", b""),
        setup_of(1, 3, 512, True, b"", b""),
        ["RANGE", 1, b"", b"", b""],
        ["RANGE", 1, bytes(8), bytes(4), b""],
        ["RANGE", 1, bytes(8), b"\xff\xff\xff\xff", b""],
        ["RANGE", 1, bytes(8), b"\0\0\x02\0", bytes(15)],
        ["RANGE", 1, bytes(16), b"\0\0\x02\0", b""],
        ["RANGE", 1, bytes(8 * 513), b"\0\0\x02\0" * 513, b""],
        ["SYNC", 1],
        ["FINISH", 1],
        ["DONE", "x"],
        ["EXTENT", 1, 2, b"", bytes(512)],
        ["EXTENT", 1, 2, b"", bytes(511), 0],
        ["EXTENT", 1, 2, b"", bytes(512), -1],
        ["EXTENT", 1, -2, b"", bytes(512), 0],
        ["EXTENT", 1, 2, bytes(15), bytes(512), 0],
    ],
)
def test_what_makes_no_sense_is_refused(value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_for_worker([pack(value)])


def test_a_message_is_one_part() -> None:
    with pytest.raises(RemoteProtocolError):
        decode_for_worker([pack(["FINISH"]), b""])


def test_a_worker_of_another_version_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="version"):
        decode_for_reader([pack(["READY", limits.VERSION + 1])])


def test_nothing_is_unpacked_that_is_too_large() -> None:
    with pytest.raises(RemoteProtocolError, match="too-large"):
        decode_for_worker([pack(["SYNC", bytes(MAX_SETUP_BYTES)])])
    with pytest.raises(RemoteProtocolError, match="too-large"):
        decode_for_reader([pack(["DONE", bytes(limits.MAX_CONTROL_BYTES)])])
