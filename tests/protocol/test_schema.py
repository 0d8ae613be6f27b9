# SPDX-License-Identifier: Apache-2.0
"""The codec: annotations are checks, in both shapes, whatever a stranger sends."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.protocol import limits
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.schema import Dialogue, Joined, Packed, Uint, between, lengths


class Point(NamedTuple):
    x: Annotated[int, between(-5, 5)]
    label: Annotated[str, lengths(0, 3)] = ""


class Shape(NamedTuple):
    version: Uint
    points: Annotated[tuple[Point, ...], lengths(1, 3)]
    pair: tuple[Uint, bytes]
    offsets: Annotated[tuple[int, ...], Packed("Q")]
    pieces: Annotated[tuple[bytes, ...], Joined(4)]

    def fault(self) -> str | None:
        return "more pieces than offsets" if len(self.pieces) > len(self.offsets) else None


class Order(NamedTuple):
    version: Uint
    urgent: bool
    notes: tuple[str, ...] = ()


SHAPE = Shape(limits.VERSION, (Point(1, "a"), Point(-5)), (7, b"x"), (1, 1 << 40), (b"abcd",))
POSITIONAL = Dialogue(Shape, Point, keyed=False, max_bytes=1000)
KEYED = Dialogue(Order, keyed=True, max_bytes=100, names={Order: "ORDERED"})


def refusal(dialogue: Dialogue, value: object) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        dialogue.decode([msgpack.packb(value)])
    return caught.value.code


def outcome(dialogue: Dialogue, value: object) -> str:
    try:
        dialogue.decode([msgpack.packb(value)])
    except RemoteProtocolError as error:
        return error.code
    return "read"


def test_a_positional_message_is_read_as_it_was_written() -> None:
    assert POSITIONAL.decode(POSITIONAL.encode(SHAPE)) == SHAPE


def test_a_keyed_message_is_read_as_it_was_written_under_its_wire_name() -> None:
    message = Order(limits.VERSION, urgent=True, notes=("a", "b"))
    parts = KEYED.encode(message)
    assert msgpack.unpackb(bytes(parts[0]))[0] == "ORDERED"
    assert KEYED.decode(parts) == message


def test_a_keyed_message_may_lack_defaults_and_have_keys_of_other_versions() -> None:
    raw = msgpack.packb(["ORDERED", {"version": 1, "urgent": False, "later": [1]}])
    assert KEYED.decode([raw]) == Order(1, urgent=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"urgent": True},
        {"version": 1},
        {"version": True, "urgent": True},
        {"version": 1, "urgent": 1},
        {"version": 1, "urgent": True, "notes": "ab"},
        {"version": 1, "urgent": True, "notes": [b"ab"]},
        {"version": -1, "urgent": True},
    ],
)
def test_a_keyed_message_with_a_wrong_or_missing_field_is_refused(fields: object) -> None:
    assert refusal(KEYED, ["ORDERED", fields]) == "malformed"


@pytest.mark.parametrize("item", range(5))
@pytest.mark.parametrize("wrong", [None, True, 1.5, "x", [], [[]], {}, b"abc", -1, 1 << 63])
def test_a_positional_message_with_a_wrong_field_is_refused(item: int, wrong: object) -> None:
    value: list[Any] = ["SHAPE", limits.VERSION, [[1, "a"]], [7, b"x"], bytes(8), b"abcd"]
    POSITIONAL.decode([msgpack.packb(value)])
    value[item + 1] = wrong
    assert refusal(POSITIONAL, value) in ("malformed", "version")


def test_another_version_is_told_before_anything_else_is_looked_at() -> None:
    assert refusal(POSITIONAL, ["SHAPE", limits.VERSION + 1, "anything"]) == "version"
    assert refusal(KEYED, ["ORDERED", {"version": 99, "other": 1}]) == "version"


def test_fields_that_do_not_belong_together_are_refused() -> None:
    assert refusal(POSITIONAL, ["SHAPE", 1, [[1, ""]], [7, b""], bytes(8), bytes(8)]) == "malformed"


def test_what_the_peer_would_refuse_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="points"):
        POSITIONAL.encode(SHAPE._replace(points=(Point(6),)))
    with pytest.raises(LocalProtocolError, match="at most 100"):
        KEYED.encode(Order(1, urgent=True, notes=("x" * 90,)))


def test_a_message_of_more_bytes_than_it_may_have_is_not_unpacked() -> None:
    assert refusal(KEYED, ["ORDERED", {"version": 1, "urgent": True, "notes": ["x" * 99]}]) == (
        "too-large"
    )


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 63) | st.binary() | st.text() | st.floats(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from(["SHAPE", "POINT", "ORDERED", "NONE"]), st.lists(values, max_size=6))
def test_any_value_of_a_stranger_is_a_message_or_is_refused(name: str, fields: list[Any]) -> None:
    for dialogue in (POSITIONAL, KEYED):
        assert outcome(dialogue, [name, *fields]) in ("read", "malformed", "too-large", "version")
