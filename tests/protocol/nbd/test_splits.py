# SPDX-License-Identifier: Apache-2.0
"""How the bytes were cut on their way changes nothing; nor does what the peer invents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.nbd.conversation import FIXED, cuts_of, joined, pieces
from tests.protocol.nbd.disk import ALL_FLAGS, export_of
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd import reply
from vmapipe.protocol.nbd.client_handshake import Goal, NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.constants import MAX_PAYLOAD_BYTES
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.handshake import (
    EXPORT_NAME_REPLY,
    GREETING,
    InfoQuery,
    MetaQuery,
    encode_info_query,
    encode_meta_query,
    encode_option,
    encode_option_reply,
)
from vmapipe.protocol.nbd.reply import Data, ReplyEvent
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import Export, MetaContext, NbdSession

EXPORTS = (export_of(1 << 20, "disk"), Export("", 1000))
SIZE = 1 << 16
SESSION = NbdSession(
    export_of(SIZE),
    ALL_FLAGS | c.NBD_FLAG_HAS_FLAGS,
    structured=True,
    meta_contexts=(MetaContext(1, c.BASE_ALLOCATION),),
)
SIMPLE = NbdSession(export_of(SIZE), ALL_FLAGS)

# --- what peers send: mostly right, sometimes not ---

NAMES = st.sampled_from(["disk", "", "nothing"])
OPTIONS = st.one_of(
    st.builds(
        encode_option,
        st.sampled_from([c.NBD_OPT_INFO, c.NBD_OPT_GO]),
        st.builds(encode_info_query, st.builds(InfoQuery, NAMES, st.lists(st.integers(0, 5)))),
    ),
    st.builds(
        encode_option,
        st.sampled_from([c.NBD_OPT_SET_META_CONTEXT, c.NBD_OPT_LIST_META_CONTEXT]),
        st.builds(
            encode_meta_query,
            st.builds(
                MetaQuery, NAMES, st.lists(st.sampled_from(["base:allocation", "base:", "x"]))
            ),
        ),
    ),
    st.sampled_from([encode_option(c.NBD_OPT_STRUCTURED_REPLY), encode_option(c.NBD_OPT_LIST)]),
    st.builds(encode_option, st.integers(1, 12), st.binary(max_size=20)),
    st.binary(max_size=20),
)
CLIENTS = st.builds(
    lambda flags, options: flags + b"".join(options),
    st.one_of(st.just(FIXED), st.sampled_from([bytes(4), b"\0\0\0\1"]), st.binary(max_size=4)),
    st.lists(OPTIONS, max_size=8),
)
OPTION_REPLIES = st.one_of(
    st.builds(
        encode_option_reply,
        st.integers(1, 10),
        st.one_of(st.integers(1, 4), st.sampled_from(sorted(c.REPLY_ERROR_NAMES))),
        st.one_of(
            st.just(b""),
            st.just(b"\0\0" + EXPORT_NAME_REPLY.pack(1 << 20, ALL_FLAGS | 1)),
            st.just(b"\0\0\0\1base:allocation"),
            st.binary(max_size=30),
        ),
    ),
    st.binary(max_size=20),
)
GOOD_REPLIES = [
    encode_option_reply(c.NBD_OPT_STRUCTURED_REPLY, c.NBD_REP_ACK),
    encode_option_reply(c.NBD_OPT_SET_META_CONTEXT, c.NBD_REP_ACK),
    encode_option_reply(
        c.NBD_OPT_GO, c.NBD_REP_INFO, b"\0\0" + EXPORT_NAME_REPLY.pack(1 << 20, ALL_FLAGS | 1)
    ),
]
SERVERS = st.builds(
    lambda greeting, good, replies: greeting + b"".join(GOOD_REPLIES[:good]) + b"".join(replies),
    st.one_of(
        st.builds(
            GREETING.pack,
            st.just(c.INIT_PASSWD),
            st.just(c.IHAVEOPT),
            st.sampled_from([0, 1, 2, 3]),
        ),
        st.binary(max_size=20),
    ),
    st.integers(0, 3),
    st.lists(OPTION_REPLIES, max_size=6),
)
COOKIES = st.integers(1, 5)
OFFSETS = st.sampled_from([0, 512, 4096, 8192, SIZE, 1 << 63])
LENGTHS = st.sampled_from([1, 512, 3584, 4096, 70000])
REPLIES = st.one_of(
    st.builds(reply.simple_reply, COOKIES, st.sampled_from([0, 0, 5, 4711])),
    st.builds(
        lambda cookie, offset, length, done: (
            reply.data_chunk(cookie, offset, length, done=done) + bytes(length)
        ),
        COOKIES,
        OFFSETS,
        LENGTHS,
        st.booleans(),
    ),
    st.builds(
        lambda cookie, offset, length, done: reply.hole_chunk(cookie, offset, length, done=done),
        COOKIES,
        OFFSETS,
        LENGTHS,
        st.booleans(),
    ),
    st.builds(
        lambda cookie, extents, done: reply.status_chunk(cookie, 1, extents, done=done),
        COOKIES,
        st.lists(st.tuples(LENGTHS, st.integers(0, 3)), min_size=1, max_size=4),
        st.booleans(),
    ),
    st.builds(
        lambda cookie, offset, done: reply.error_chunk(cookie, 5, "no", offset=offset, done=done),
        COOKIES,
        st.one_of(st.none(), OFFSETS),
        st.booleans(),
    ),
    st.builds(reply.none_chunk, COOKIES),
    st.just(bytes(4096)),
    st.binary(max_size=40),
)


# --- handshakes ---


def run_handshake(hand: NbdServerHandshake | NbdClientHandshake, parts: Iterable[bytes]) -> object:
    """All that a handshake says and settles."""
    sent = unread = b""
    fault = None
    for part in parts:
        if fault or not hand.wanted_bytes:
            unread += part
            continue
        try:
            sent += hand.feed(part)
            unread += hand.unread
        except (NbdProtocolError, NbdRefusedError) as error:
            sent += error.unsent
            fault = str(error)
    session = hand.session
    return sent, session, fault, unread if session else b"", hand.wanted_bytes


@given(CLIENTS, st.data(), st.booleans())
def test_a_server_says_the_same_however_the_bytes_come(
    raw: bytes, data: st.DataObject, structured: bool
) -> None:
    def server() -> NbdServerHandshake:
        return NbdServerHandshake(EXPORTS, structured=structured)

    whole = run_handshake(server(), [raw])
    assert run_handshake(server(), pieces(raw, data.draw(cuts_of(len(raw))))) == whole
    assert run_handshake(server(), pieces(raw, range(len(raw)))) == whole


@given(SERVERS, st.data(), st.sampled_from(Goal), st.booleans())
def test_a_client_says_the_same_however_the_bytes_come(
    raw: bytes, data: st.DataObject, goal: Goal, structured: bool
) -> None:
    def client() -> NbdClientHandshake:
        return NbdClientHandshake("disk", goal=goal, structured=structured)

    whole = run_handshake(client(), [raw])
    assert run_handshake(client(), pieces(raw, data.draw(cuts_of(len(raw))))) == whole
    assert run_handshake(client(), pieces(raw, range(len(raw)))) == whole


@given(CLIENTS)
def test_who_reads_only_what_is_wanted_reads_nothing_beyond_the_handshake(raw: bytes) -> None:
    whole, exact = NbdServerHandshake(EXPORTS), NbdServerHandshake(EXPORTS)
    said = run_handshake(whole, [raw + bytes(100)])
    rest = raw + bytes(100)
    try:
        while exact.wanted_bytes and rest:
            piece, rest = rest[: exact.wanted_bytes], rest[exact.wanted_bytes :]
            exact.feed(piece)
            assert exact.unread == b""
    except NbdProtocolError:
        assert whole.session is None
    assert exact.session == whole.session
    assert not exact.session or rest == whole.unread
    assert said


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_arbitrary_bytes_do_no_harm_to_a_server(parts: list[bytes]) -> None:
    run_handshake(NbdServerHandshake(EXPORTS), [FIXED, *parts])
    run_handshake(NbdServerHandshake(EXPORTS), parts)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_arbitrary_bytes_do_no_harm_to_a_client(parts: list[bytes]) -> None:
    greeting = GREETING.pack(c.INIT_PASSWD, c.IHAVEOPT, 3)
    run_handshake(NbdClientHandshake(), [greeting, *parts])
    run_handshake(NbdClientHandshake(), parts)


# --- transmission ---


def waiting(session: NbdSession) -> NbdClientTransmission:
    """A client with a few requests under way."""
    client = NbdClientTransmission(session)
    client.request(c.NBD_CMD_READ, 0, 4096)
    client.request(c.NBD_CMD_READ, 512, 8192)
    client.request(c.NBD_CMD_WRITE, 0, 4096)
    client.request(c.NBD_CMD_FLUSH)
    if session.meta_contexts:
        client.request(c.NBD_CMD_BLOCK_STATUS, 0, SIZE)
    return client


class Heard(NamedTuple):
    """What a client makes of some replies."""

    events: list[ReplyEvent]
    fault: str | None
    in_flight: int
    wanted_bytes: int


def run_replies(session: NbdSession, parts: Iterable[bytes]) -> Heard:
    client = waiting(session)
    heard: list[ReplyEvent] = []
    fault = None
    for part in parts:
        try:
            heard.extend(client.feed(part))
        except NbdProtocolError as error:
            fault = str(error)
            break
    return Heard(joined(heard), fault, client.in_flight, client.wanted_bytes)


@given(st.lists(REPLIES, max_size=10), st.data(), st.sampled_from([SIMPLE, SESSION]))
def test_a_client_hears_the_same_however_the_replies_come(
    replies: list[bytes], data: st.DataObject, session: NbdSession
) -> None:
    raw = b"".join(replies)
    whole = run_replies(session, [raw])
    assert run_replies(session, pieces(raw, data.draw(cuts_of(len(raw))))) == whole
    assert run_replies(session, pieces(raw, range(0, len(raw), 7))) == whole


@given(st.lists(REPLIES, max_size=10), st.sampled_from([SIMPLE, SESSION]))
def test_data_that_is_received_elsewhere_makes_the_same_events(
    replies: list[bytes], session: NbdSession
) -> None:
    """`took` in place of `feed`, whenever data is due: nothing but the data is missing."""
    raw = b"".join(replies)
    whole = run_replies(session, [raw])
    client = waiting(session)
    heard: list[ReplyEvent] = []
    told = None
    try:
        while raw:
            count = min(client.wanted_bytes, len(raw))
            heard += client.took(count) if client.payload else client.feed(raw[:count])
            raw = raw[count:]
    except NbdProtocolError as error:
        told = str(error)
    without_data = [event for event in whole.events if not isinstance(event, Data)]
    assert (heard, told) == (without_data, whole.fault)
    assert (client.in_flight, client.wanted_bytes) == whole[2:]


@given(st.lists(st.binary(max_size=100), max_size=10), st.booleans())
def test_arbitrary_bytes_do_no_harm_to_a_waiting_client(parts: list[bytes], magic: bool) -> None:
    start = [c.NBD_STRUCTURED_REPLY_MAGIC.to_bytes(4, "big")] if magic else []
    run_replies(SESSION, [*start, *parts])


@given(st.lists(REPLIES, max_size=10))
def test_a_client_never_expects_more_than_the_limits(replies: list[bytes]) -> None:
    client = waiting(SESSION)
    try:
        for part in replies:
            list(client.feed(part))
            assert 0 < client.wanted_bytes <= MAX_PAYLOAD_BYTES
    except NbdProtocolError:
        assert client.wanted_bytes == 0
