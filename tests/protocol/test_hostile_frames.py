# SPDX-License-Identifier: Apache-2.0
"""Messages that nobody of ours would send: anything is decoded or refused, in little memory and time."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.messages import CONTROLS, EXAMPLES, U64, data, encode, refusal, uints
from tests.vma.memory import peak_bytes
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.transfer import Message, Refuse, decode, encode_control, sayable


@given(st.lists(st.binary(max_size=80), max_size=4))
@settings(max_examples=120)
def test_arbitrary_bytes_are_refused_and_nothing_worse(parts: list[bytes]) -> None:
    _only_refuses(parts)


def _only_refuses(parts: list[Any]) -> None:
    try:
        decode(parts)
    except RemoteProtocolError as error:
        # Nothing of ours makes a refusal that cannot be sent.
        encode_control(Refuse(error.code, sayable(error.reason)))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), U64)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
    | st.sampled_from([*EXAMPLES, *(f for m in CONTROLS for f in m._fields)])
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.lists(values, min_size=1, max_size=3), st.integers(0, 1))
@settings(max_examples=150)
def test_arbitrary_msgpack_values_are_refused_and_nothing_worse(
    parts: list[Any], whole: int
) -> None:
    packed = [msgpack.packb(part) for part in parts]
    _only_refuses(packed)
    _only_refuses([msgpack.packb(1), *packed][: 2 + whole])


@given(
    st.sampled_from(CONTROLS).flatmap(
        lambda m: st.tuples(
            st.just(type(m).__name__.upper()),
            st.fixed_dictionaries(dict.fromkeys(m._fields, values | uints)),
        )
    )
)
@settings(max_examples=120)
def test_a_known_message_with_arbitrary_values_is_refused_and_nothing_worse(
    message: tuple[str, dict[str, Any]],
) -> None:
    _only_refuses([msgpack.packb(message)])


@given(
    st.tuples(uints, st.tuples(uints | values, uints | values, uints | values)),
    st.binary(max_size=8),
)
@settings(max_examples=100)
def test_a_frame_with_arbitrary_values_is_refused_and_nothing_worse(
    frame: tuple[int, tuple[Any, ...]], payload: bytes
) -> None:
    number, items = frame
    _only_refuses(data(number, items))
    _only_refuses(data(number, [*items, payload], payload))


@given(st.sampled_from(list(EXAMPLES.values())), st.data())
@settings(max_examples=120)
def test_a_flipped_bit_makes_another_message_or_a_refusal(
    message: Message, draw: st.DataObject
) -> None:
    parts = [bytearray(part) for part in encode(message)]
    part = draw.draw(st.sampled_from(parts[:2]))
    part[draw.draw(st.integers(0, min(len(part), 90) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    _only_refuses(parts)


@pytest.mark.parametrize("depth", [10, 511, 512, 1023, 1024, 1025, 60_000])
@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1a"], ids=["arrays", "maps"])
def test_deep_nesting_is_refused(depth: int, opener: bytes) -> None:
    nested = opener * (depth // len(opener)) + b"\xc0"
    refusal(nested)
    refusal(b"\x92\xa4QUIT" + nested)
    refusal(b"\x01", nested)
    refusal(b"\x01", b"\x93" + nested + b"\x00\xc4\x00")
    refusal(b"\x92\xa5HELLO\x81\xa7version" + nested)


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(claim, id=claim.hex())
        for claim in (
            bytes.fromhex("dd ffffffff"),  # an array of 4 Gi
            bytes.fromhex("df ffffffff"),  # a map of 4 Gi
            bytes.fromhex("c6 ffffffff"),  # 4 GiB of bytes
            bytes.fromhex("db ffffffff"),  # 4 GiB of text
            bytes.fromhex("c9 ffffffff 01"),  # 4 GiB of an extension
            bytes.fromhex("92 a5 48454c4c4f df ffffffff"),
            bytes.fromhex("93 01 00 c6 ffffffff"),
            bytes.fromhex("dd 00010000"),
        )
    ],
)
def test_a_giant_claim_is_refused_before_memory_is_taken(claim: bytes) -> None:
    def work() -> None:
        refusal(claim)
        refusal(b"\x01", claim)
        refusal(claim, b"\x93\x01\x00\xc4\x00")

    assert peak_bytes(work) < 1 << 20


def test_the_costliest_values_within_the_limits_take_little_memory() -> None:
    # Maps and arrays of one item make the most objects of a byte.
    bombs = [
        b"\x92\xa4PING" + b"\xdc\x00\x08" * 4 + b"\x90" * 60_000,
        b"\x98" + (b"\x98" + b"\x98\x90\x90\x90\x90\x90\x90\x90\x90" * 8) * 8,
        bytes(msgpack.packb([[[{str(n): {} for n in range(64)}] * 8] * 8] * 8)[:65_000]),
        bytes(msgpack.packb([[[[{"a": {}, "b": {}}] * 8] * 8] * 8] * 8)),
    ]

    def work() -> None:
        for bomb in bombs:
            refusal(bomb)
            refusal(b"\x01", bomb)

    assert peak_bytes(work) < 16 << 20


def test_a_large_part_is_refused_unread() -> None:
    large = bytes(8 << 20)

    def work() -> None:
        for parts in ([large], [large, b""], [b"\x01", large], [b"\x01", large, b""]):
            assert refusal(*parts).code == "too-large"
        assert refusal(*data(1, [1, 0, 1, b"\0\1"]), large).code == "too-large"

    assert peak_bytes(work) < 1 << 20
