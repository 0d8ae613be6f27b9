# SPDX-License-Identifier: Apache-2.0
"""The reader of JSON objects: whatever comes, in whatever pieces, an object or one clear reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.qmp.reader import (
    QMP_LIMITS,
    JsonLimits,
    JsonReader,
    Unreadable,
    read_object,
)

SMALL = JsonLimits(most_bytes=4096, most_values=100, most_depth=8)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text('a"\\{}[]\n,é€', max_size=8)
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=9,
)
_OBJECTS = st.dictionaries(st.text(max_size=4), _VALUES, max_size=4)


def read(data: bytes, limits: JsonLimits = QMP_LIMITS) -> list[dict[str, Any]]:
    """All at once."""
    reader = JsonReader(limits)
    reader.feed(data)
    found = []
    while (message := reader.next()) is not None:
        found.append(message)
    return found


@given(
    st.lists(_OBJECTS, max_size=5),
    st.sampled_from([None, 4]),
    st.sampled_from(["", "\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 50),
)
def test_objects_are_found_in_any_pieces_on_one_line_or_on_several(
    objects: list[dict[str, Any]], indent: int | None, end: str, ascii_only: bool, piece: int
) -> None:
    text = "".join(
        json.dumps(each, indent=indent, ensure_ascii=ascii_only) + end for each in objects
    )
    reader = JsonReader(QMP_LIMITS)
    found = []
    data = text.encode()
    for at in range(0, len(data), piece):
        reader.feed(data[at : at + piece])
        while (message := reader.next()) is not None:
            found.append(message)
    assert found == objects


@given(st.binary(max_size=300), st.integers(1, 300))
def test_any_bytes_are_objects_or_unreadable_and_the_pieces_do_not_matter(
    data: bytes, piece: int
) -> None:
    def outcome(pieces: list[bytes]) -> tuple[list[dict[str, Any]], bool]:
        reader = JsonReader(SMALL)
        found = []
        for each in pieces:
            reader.feed(each)
            try:
                while (message := reader.next()) is not None:
                    found.append(message)
            except Unreadable:
                return found, True
        return found, False

    assert outcome([data]) == outcome([data[at : at + piece] for at in range(0, len(data), piece)])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[1]\n", "it is not a JSON object"),
        (b"HTTP/1.1 400\r\n", "it is not a JSON object"),
        (b'{"a": [[[[[[[[', "it is nested deeper than 8"),
        (b'{"a": ' + b"[" * 100_000, "it is nested deeper than 8"),
        (b'{"a": "' + b"x" * 4096, "it has more than 4,096 bytes"),
        (b'{"a": [' + b"0," * 200 + b"0]}", "it has more than 100 values"),
        (b'{"a": ' + b"9" * 21 + b"}", "a number beyond 64 bits"),
        (b'{"a": ' + b"9" * 4000 + b"}", "a number beyond 64 bits"),
        (b'{"a": 1e999}', "a number beyond all bounds"),
        (b'{"a": NaN}', "it has NaN for a number"),
        (b'{"a": -Infinity}', "it has -Infinity for a number"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
        (b'{"a": "x\\ud800"}', "it has half of a character"),
        (b'{"a": }', "it is not JSON"),
        (b'{"a": 1]', "it is not JSON"),
        (b'{"a": "\n"}', "it is not JSON"),
    ],
)
def test_what_cannot_be_read_says_why_and_how_it_began(data: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why) as caught:
        read(data, SMALL)
    assert data.startswith(caught.value.said)
    assert len(caught.value.said) <= 200


def test_a_character_of_two_halves_is_one() -> None:
    assert read(b'{"a": "\\ud83d\\ude00"}') == [{"a": "\U0001f600"}]


def test_the_limits_let_the_largest_machine_pass() -> None:
    """254 disks, each with a chain of 60 images: as QEMU nests them in query-block."""
    image: dict[str, Any] = {}
    for number in range(60):
        image = {
            "virtual-size": 1 << 40,
            "filename": f"/var/lib/vz/images/100/vm-100-disk-0-snapshot-{number:04}.qcow2",
            "cluster-size": 65536,
            "format": "qcow2",
            "actual-size": 123456789,
            "format-specific": {
                "type": "qcow2",
                "data": {"compat": "1.1", "compression-type": "zlib", "lazy-refcounts": False},
            },
            "dirty-flag": False,
            **({"backing-image": image} if image else {}),
        }
    blocks = [{"device": f"drive{n}", "inserted": {"image": image}} for n in range(254)]
    data = json.dumps({"return": blocks, "id": 3}).encode()
    assert len(data) > 4 << 20
    assert read(data) == [{"return": blocks, "id": 3}]


def test_no_more_is_held_than_the_limit_however_much_comes() -> None:
    reader = JsonReader(SMALL)
    piece = b'{"a": "' + b"x" * 1000

    def feed_on() -> None:
        for _ in range(1000):
            reader.feed(piece)
            reader.next()

    with pytest.raises(Unreadable):
        feed_on()
    assert reader.held_bytes < SMALL.most_bytes + 2 * len(piece)


@pytest.mark.parametrize("text", ["", "{}x", '{"a": 1}{', "[1]", '{"a": ', "\ud800"])
def test_a_text_that_is_not_one_object_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        read_object(text, SMALL)
