# SPDX-License-Identifier: Apache-2.0
"""Whoever stands before a ZeroMQ socket knows when a client was let in, and holds little until then."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.protocol.zmtp import (
    GREETING_BYTES,
    MAX_COMMAND_BYTES,
    ConnectionOpening,
    HandshakeRefused,
    Stage,
    greeting,
)


def client_greeting(mechanism: bytes, *, version: bytes = b"\3\1", as_server: int = 0) -> bytes:
    head = b"\xff" + (1).to_bytes(8, "big") + b"\x7f" + version + mechanism.ljust(20, b"\0")
    return (head + bytes([as_server])).ljust(GREETING_BYTES, b"\0")


def command(name: bytes, body: bytes) -> bytes:
    data = bytes([len(name)]) + name + body
    if len(data) > 255:
        return b"\6" + len(data).to_bytes(8, "big") + data
    return b"\4" + bytes([len(data)]) + data


def metadata(**properties: bytes) -> bytes:
    return b"".join(
        bytes([len(name)]) + name.encode() + len(value).to_bytes(4, "big") + value
        for name, value in ((name.replace("_", "-"), value) for name, value in properties.items())
    )


HELLO = command(b"HELLO", bytes(194))
INITIATE = command(b"INITIATE", bytes(400))
WELCOME = command(b"WELCOME", bytes(160))
READY = command(b"READY", bytes(60))
ERROR = command(b"ERROR", b"\x03400")


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


@given(st.lists(st.integers(0, 2000)), st.lists(st.integers(0, 2000)), st.binary(max_size=100))
def test_a_client_that_proves_its_key_is_passed_on_to_the_byte(
    cuts: list[int], more: list[int], data: bytes
) -> None:
    opening, up, down = ConnectionOpening(curve=True), b"", b""
    first = client_greeting(b"CURVE") + HELLO
    for piece in pieces(first, cuts):
        assert opening.stage in (Stage.GREETING, Stage.COMMAND)
        assert len(piece) <= opening.wanted_bytes
        opening.receive(piece)
    assert opening.stage is Stage.QUEUED
    up += opening.take_pending()
    for piece in pieces(greeting(curve=True) + WELCOME, more):
        down += opening.answered(piece)
    assert down == WELCOME
    for piece in pieces(INITIATE, more):
        assert not opening.is_authenticating
        opening.receive(piece)
        up, opening.pending = up + opening.pending, b""
    assert opening.is_authenticating
    assert up == first + INITIATE
    for piece in pieces(READY + data, cuts):
        down += opening.answered(piece)
    assert opening.is_accepted()
    assert down == WELCOME + READY + data


@given(st.lists(st.integers(0, 2000)))
def test_without_keys_ready_is_the_first_word_and_the_answer(cuts: list[int]) -> None:
    opening = ConnectionOpening(curve=False)
    first = client_greeting(b"NULL") + command(
        b"READY", metadata(Socket_Type=b"DEALER", Identity=b"")
    )
    for piece in pieces(first, cuts):
        opening.receive(piece)
    assert opening.stage is Stage.QUEUED
    assert opening.take_pending() == first
    assert opening.answered(greeting(curve=False) + READY) == READY
    assert opening.is_accepted()


def test_a_client_that_the_socket_rejects_was_never_accepted() -> None:
    opening = ConnectionOpening(curve=True)
    opening.receive(client_greeting(b"CURVE") + HELLO)
    opening.take_pending()
    opening.answered(greeting(curve=True) + WELCOME)
    opening.receive(INITIATE)
    assert opening.answered(ERROR) == ERROR
    assert opening.rejected
    assert opening.stage is Stage.AUTHENTICATING


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\1\0\5\0junk",
        bytes(64),
        b"\xff" + bytes(63),
        client_greeting(b"NULL"),
        client_greeting(b"CURVE", version=b"\1\0"),
        client_greeting(b"CURVE", as_server=1),
        client_greeting(b"CURVE") + b"\2" + (1 << 40).to_bytes(8, "big"),
        client_greeting(b"CURVE") + b"\6" + (4 << 20).to_bytes(8, "big") + b"\5HELLO",
        client_greeting(b"CURVE") + b"\6" + (200).to_bytes(8, "big") + b"\5HELLO",
        client_greeting(b"CURVE") + command(b"HELLO", bytes(10)),
        client_greeting(b"CURVE") + command(b"OTHER", bytes(194)),
        client_greeting(b"CURVE") + INITIATE,
        client_greeting(b"CURVE") + b"\0\5hello",
    ],
)
def test_what_is_no_opening_is_refused_as_soon_as_that_can_be_seen(said: bytes) -> None:
    with pytest.raises(HandshakeRefused):
        ConnectionOpening(curve=True).receive(said)


def test_a_name_of_ones_own_choice_is_refused_where_it_can_be_read() -> None:
    opening = ConnectionOpening(curve=False)
    own = metadata(Socket_Type=b"DEALER", identity=b"\0abcd")
    with pytest.raises(HandshakeRefused, match="identity"):
        opening.receive(client_greeting(b"NULL") + command(b"READY", own))


@pytest.mark.parametrize("cut", range(0, 40, 7))
def test_metadata_that_end_too_early_are_refused(cut: int) -> None:
    whole = metadata(Socket_Type=b"DEALER", Other=b"12345678")
    opening = ConnectionOpening(curve=False)
    opening.receive(client_greeting(b"NULL"))
    if cut in (0, len(whole)):
        return
    with pytest.raises(HandshakeRefused):
        opening.receive(command(b"READY", whole[:cut]))


@given(st.binary(max_size=3000), st.booleans())
def test_nothing_that_a_stranger_says_makes_it_hold_more_than_two_words(
    junk: bytes, fits: bool
) -> None:
    opening = ConnectionOpening(curve=True)
    said = (client_greeting(b"CURVE") + HELLO if fits else b"") + junk
    held = 0
    try:
        while said and opening.wanted_bytes:
            piece, said = said[: opening.wanted_bytes], said[opening.wanted_bytes :]
            opening.receive(piece)
            if opening.stage is Stage.QUEUED:
                opening.take_pending()
            held += len(piece) - len(opening.pending)
            opening.pending = b""
            assert not opening.is_accepted()
    except HandshakeRefused:
        return
    assert opening.wanted_bytes <= GREETING_BYTES + MAX_COMMAND_BYTES
