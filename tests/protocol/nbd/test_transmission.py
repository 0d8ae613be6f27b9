# SPDX-License-Identifier: Apache-2.0
"""The client's requests and what it makes of every kind of reply."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.protocol.nbd.conversation import joined
from tests.protocol.nbd.disk import ALL_FLAGS, export_of
from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd import constants, reply
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.reply import (
    STRUCTURED_REPLY,
    Data,
    Hole,
    Payload,
    ReplyEvent,
    RequestDone,
    RequestFailed,
    Status,
)
from vmapipe.protocol.nbd.session import BlockSizes, Export, MetaContext, NbdRequest, NbdSession

SIZE = 1 << 26
EVERYTHING = ALL_FLAGS | c.NBD_FLAG_HAS_FLAGS
SIMPLE = NbdSession(export_of(SIZE), EVERYTHING & ~c.NBD_FLAG_SEND_DF)
STRUCTURED = NbdSession(
    export_of(SIZE), EVERYTHING, structured=True, meta_contexts=(MetaContext(1, "base:allocation"),)
)
TWO_CONTEXTS = NbdSession(
    export_of(SIZE), EVERYTHING, True, True, (MetaContext(1, "a:x"), MetaContext(9, "b:y"))
)
WITHOUT_DATA = [
    (c.NBD_CMD_WRITE, 4096),
    (c.NBD_CMD_FLUSH, 0),
    (c.NBD_CMD_TRIM, 4096),
    (c.NBD_CMD_CACHE, 4096),
    (c.NBD_CMD_WRITE_ZEROES, 4096),
]
ALL = [*WITHOUT_DATA, (c.NBD_CMD_READ, 4096), (c.NBD_CMD_BLOCK_STATUS, 4096)]
MiB = 1 << 20


def asking(
    session: NbdSession,
    kind: int = c.NBD_CMD_READ,
    offset: int = 0,
    length: int = 4096,
    flags: int = 0,
) -> NbdClientTransmission:
    """A client with one request under way, whose cookie is 1."""
    client = NbdClientTransmission(session)
    client.request(kind, offset, length, flags)
    return client


def events_of(client: NbdClientTransmission, *raw: bytes) -> list[ReplyEvent]:
    return joined(client.feed(b"".join(raw)))


def payload_of(client: NbdClientTransmission) -> Payload | None:
    return client.payload


def chunk(kind: int, payload: bytes, flags: int = 1, cookie: int = 1) -> bytes:
    head = (c.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload))
    return STRUCTURED_REPLY.pack(*head) + payload


# --- requests ---


def test_every_request_has_a_cookie_of_its_own() -> None:
    client = NbdClientTransmission(SIMPLE)
    cookies = {client.request(kind, 0, length).cookie for kind, length in WITHOUT_DATA}
    assert len(cookies) == client.in_flight == len(WITHOUT_DATA)


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags"),
    [
        (c.NBD_CMD_READ, 0, 0, 0),
        (c.NBD_CMD_READ, SIZE, 1, 0),
        (c.NBD_CMD_READ, 0, constants.MAX_PAYLOAD_BYTES + 1, 0),
        (c.NBD_CMD_READ, 0, 512, c.NBD_CMD_FLAG_NO_HOLE),
        (c.NBD_CMD_WRITE_ZEROES, 0, constants.MAX_PAYLOAD_BYTES + 1, 0),
        (c.NBD_CMD_CACHE, 0, constants.MAX_PAYLOAD_BYTES + 1, 0),
        (c.NBD_CMD_FLUSH, 0, 1, 0),
        (c.NBD_CMD_DISC, 0, 0, 0),
        (99, 0, 1, 0),
    ],
)
def test_what_the_server_would_refuse_is_not_sent(
    kind: int, offset: int, length: int, flags: int
) -> None:
    client = NbdClientTransmission(STRUCTURED)
    with pytest.raises(LocalProtocolError):
        client.request(kind, offset, length, flags)
    assert client.in_flight == 0


def test_what_has_no_data_and_is_fast_may_be_longer_than_the_maximum() -> None:
    client = NbdClientTransmission(STRUCTURED)
    client.request(c.NBD_CMD_WRITE_ZEROES, 0, SIZE, c.NBD_CMD_FLAG_FAST_ZERO)
    client.request(c.NBD_CMD_TRIM, 0, SIZE)
    client.request(c.NBD_CMD_BLOCK_STATUS, 0, SIZE)
    assert client.in_flight == 3


def test_a_server_without_a_maximum_still_gets_no_request_for_more_than_32_mib() -> None:
    export = Export("x", SIZE, ALL_FLAGS, block_sizes=BlockSizes(1, 4096, 0xFFFFFFFF))
    client = NbdClientTransmission(NbdSession(export, export.flags))
    with pytest.raises(LocalProtocolError):
        client.request(c.NBD_CMD_READ, 0, constants.MAX_PAYLOAD_BYTES + 1)
    client.request(c.NBD_CMD_WRITE_ZEROES, 0, SIZE)


def test_nothing_is_sent_after_a_disconnection_but_answers_still_come() -> None:
    client = asking(SIMPLE)
    assert client.disconnect() == bytes.fromhex("25609513 0000 0002") + bytes(20)
    with pytest.raises(LocalProtocolError):
        client.request(c.NBD_CMD_FLUSH)
    raw = reply.simple_reply(1) + bytes(4096)
    assert events_of(client, raw) == [Data(1, 0, memoryview(bytes(4096))), RequestDone(1, 0)]


# --- simple replies ---


@pytest.mark.parametrize("session", [SIMPLE, STRUCTURED], ids=["simple", "structured"])
@pytest.mark.parametrize(("kind", "length"), WITHOUT_DATA)
def test_a_simple_reply_ends_what_has_no_data(session: NbdSession, kind: int, length: int) -> None:
    client = asking(session, kind, 0, length)
    assert events_of(client, reply.simple_reply(1)) == [RequestDone(1, 0)]
    assert client.in_flight == 0


@pytest.mark.parametrize("session", [SIMPLE, STRUCTURED], ids=["simple", "structured"])
@pytest.mark.parametrize(("kind", "length"), ALL)
def test_a_simple_reply_with_an_error_ends_everything(
    session: NbdSession, kind: int, length: int
) -> None:
    if kind == c.NBD_CMD_BLOCK_STATUS and session is SIMPLE:
        return
    client = asking(session, kind, 0, length)
    events = events_of(client, reply.simple_reply(1, c.NBD_ESHUTDOWN))
    assert events == [RequestFailed(1, c.NBD_ESHUTDOWN), RequestDone(1, c.NBD_ESHUTDOWN)]


def test_an_unknown_error_is_einval() -> None:
    events = events_of(asking(SIMPLE), reply.simple_reply(1, 4711))
    assert events == [RequestFailed(1, c.NBD_EINVAL), RequestDone(1, c.NBD_EINVAL)]


@pytest.mark.parametrize("kind", [c.NBD_CMD_READ, c.NBD_CMD_BLOCK_STATUS])
def test_a_simple_success_is_wrong_where_chunks_must_come(kind: int) -> None:
    with pytest.raises(NbdProtocolError, match="simple reply"):
        list(asking(STRUCTURED, kind).feed(reply.simple_reply(1)))


def test_replies_come_in_any_order() -> None:
    client = NbdClientTransmission(SIMPLE)
    for number in range(4):
        client.request(c.NBD_CMD_READ, number * 10, 10)
    raw = [reply.simple_reply(cookie) + bytes([cookie]) * 10 for cookie in (3, 1, 4, 2)]
    ended = [event.cookie for event in events_of(client, *raw) if isinstance(event, RequestDone)]
    assert ended == [3, 1, 4, 2]
    assert client.in_flight == 0


# --- the data passes by ---


@pytest.mark.parametrize("session", [SIMPLE, STRUCTURED], ids=["simple", "structured"])
def test_data_may_be_received_without_the_codec(session: NbdSession) -> None:
    client = asking(session, offset=512, length=8192)
    head = reply.read_reply(session, 1, 512, 8192)
    while head:
        count = client.wanted_bytes
        assert list(client.feed(head[:count])) == []
        head = head[count:]
    assert payload_of(client) == Payload(1, 512, 8192)
    assert client.wanted_bytes == 8192
    assert client.took(0) == []
    assert client.took(8000) == []
    assert payload_of(client) == Payload(1, 8512, 192)
    with pytest.raises(LocalProtocolError):
        client.took(193)
    assert client.took(192) == [RequestDone(1, 0)]
    assert payload_of(client) is None
    with pytest.raises(LocalProtocolError):
        client.took(1)


def test_a_chunk_that_is_not_the_last_ends_nothing() -> None:
    client = asking(STRUCTURED)
    assert list(client.feed(reply.data_chunk(1, 0, 4096, done=False))) == []
    assert client.took(4096) == []
    assert events_of(client, reply.none_chunk(1)) == [RequestDone(1, 0)]


# --- chunks ---


@pytest.mark.parametrize(("kind", "length"), WITHOUT_DATA)
def test_a_none_chunk_ends_what_has_no_data(kind: int, length: int) -> None:
    assert events_of(asking(STRUCTURED, kind, 0, length), reply.none_chunk(1)) == [
        RequestDone(1, 0)
    ]


@pytest.mark.parametrize(("kind", "length"), ALL)
def test_an_error_chunk_ends_everything(kind: int, length: int) -> None:
    events = events_of(asking(STRUCTURED, kind, 0, length), reply.error_chunk(1, c.NBD_EIO, "ü"))
    assert events == [RequestFailed(1, c.NBD_EIO, "ü"), RequestDone(1, c.NBD_EIO)]


def test_chunks_of_several_requests_are_mixed_and_out_of_order() -> None:
    client = NbdClientTransmission(STRUCTURED)
    client.request(c.NBD_CMD_READ, 0, 30)
    client.request(c.NBD_CMD_READ, 1000, 20)
    events = events_of(
        client,
        reply.data_chunk(1, 20, 10, done=False) + b"c" * 10,
        reply.hole_chunk(2, 1000, 10, done=False),
        reply.data_chunk(1, 0, 10, done=False) + b"a" * 10,
        reply.data_chunk(2, 1010, 10) + b"x" * 10,
        reply.hole_chunk(1, 10, 10),
    )
    assert events == [
        Data(1, 20, memoryview(b"c" * 10)),
        Hole(2, 1000, 10),
        Data(1, 0, memoryview(b"a" * 10)),
        Data(2, 1010, memoryview(b"x" * 10)),
        RequestDone(2, 0),
        Hole(1, 10, 10),
        RequestDone(1, 0),
    ]


def test_a_read_that_fails_halfway_need_not_be_complete() -> None:
    events = events_of(
        asking(STRUCTURED),
        reply.data_chunk(1, 0, 512, done=False) + bytes(512),
        reply.error_chunk(1, c.NBD_EIO, "here", offset=100, done=False),
        reply.error_chunk(1, c.NBD_ENOMEM, offset=4095, done=False),
        reply.none_chunk(1),
    )
    assert events[1:] == [
        RequestFailed(1, c.NBD_EIO, "here", 100),
        RequestFailed(1, c.NBD_ENOMEM, "", 4095),
        RequestDone(1, c.NBD_EIO),
    ]


def test_an_unknown_kind_of_error_is_an_error() -> None:
    payload = b"\0\0\0\5\0\2no" + b"something else"
    events = events_of(asking(STRUCTURED), chunk(0x8007, payload))
    assert events == [RequestFailed(1, c.NBD_EIO, "no"), RequestDone(1, c.NBD_EIO)]


def test_an_error_chunk_may_be_as_long_as_its_limit() -> None:
    payload = b"\0\0\0\5\0\0" + bytes(constants.MAX_ERROR_CHUNK_BYTES - 6)
    assert events_of(asking(STRUCTURED), chunk(0x8007, payload))[-1] == RequestDone(1, c.NBD_EIO)


def test_unknown_reply_flags_are_ignored() -> None:
    assert events_of(asking(STRUCTURED), chunk(2, bytes(8) + b"\0\0\x10\0", 0xFFFF))[
        -1
    ] == RequestDone(1, 0)


def test_a_block_status_comes_once_for_every_context() -> None:
    client = asking(TWO_CONTEXTS, c.NBD_CMD_BLOCK_STATUS, 4096, 8192)
    events = events_of(
        client,
        reply.status_chunk(1, 9, [(4096, 1), (1 << 31, 2)], done=False),
        reply.status_chunk(1, 1, [(512, 3)]),
    )
    assert [
        (event.context_id, event.offset, list(event.extents()))
        for event in events
        if isinstance(event, Status)
    ] == [(9, 4096, [(4096, 1), (1 << 31, 2)]), (1, 4096, [(512, 3)])]
    assert events[-1] == RequestDone(1, 0)


@pytest.mark.parametrize(
    ("kind", "flags", "raw", "reason"),
    [
        (0, 0, b"HTTP/1.1 400 Bad Request", "magic"),
        (0, 0, reply.simple_reply(2), "not under way"),
        (0, 0, reply.none_chunk(2), "not under way"),
        (0, 0, reply.none_chunk(1), "success with 0 bytes"),
        (0, 0, reply.hole_chunk(1, 0, 4095), "success with 4095 bytes"),
        (0, 0, chunk(0, b"", flags=0) + bytes(16), "type 0x0"),
        (0, 0, chunk(0, b"x"), "type 0x0 with 1 bytes"),
        (0, 0, chunk(1, bytes(8)), "type 0x1 with 8 bytes"),
        (0, 0, chunk(1, b"") + bytes(8), "type 0x1 with 0 bytes"),
        (0, 0, reply.data_chunk(1, 0, 4097), "4097 bytes at 0"),
        (0, 0, reply.data_chunk(1, 4096, 1), "1 bytes at 4096"),
        (0, 0, reply.data_chunk(1, (1 << 64) - 1, 1), "1 bytes at"),
        (0, 0, chunk(2, bytes(12)), "0 bytes at 0"),
        (0, 0, chunk(2, bytes(13)), "with 13 bytes"),
        (0, 0, reply.hole_chunk(1, 0, 9, done=False) + reply.hole_chunk(1, 8, 1), "second time"),
        (0, 4, reply.hole_chunk(1, 0, 9, done=False) + reply.hole_chunk(1, 9, 1), "second chunk"),
        (0, 0, reply.status_chunk(1, 1, [(1, 0)]), "a block status"),
        (0, 0, chunk(3, b""), "type 0x3"),
        (0, 0, chunk(6, bytes(8)), "type 0x6"),
        (0, 0, chunk(0x8001, bytes(5)), "with 5 bytes"),
        (0, 0, chunk(0x8001, bytes(8193)), "with 8193 bytes"),
        (0, 0, chunk(0x8001, bytes(6)), "wrong contents"),
        (0, 0, chunk(0x8001, b"\0\0\0\5\0\1"), "wrong contents"),
        (0, 0, chunk(0x8001, b"\0\0\0\5\x10\1" + bytes(4097)), "wrong contents"),
        (0, 0, chunk(0x8002, b"\0\0\0\5\0\0" + bytes(7)), "wrong length"),
        (0, 0, chunk(0x8002, b"\0\0\0\5\0\0" + bytes(9)), "wrong length"),
        (0, 0, reply.error_chunk(1, 5, offset=4096), "an error at 4096"),
        (1, 0, reply.data_chunk(1, 0, 1), "a chunk of data"),
        (6, 0, reply.hole_chunk(1, 0, 1), "a chunk of data"),
        (7, 0, reply.none_chunk(1), "without a block status"),
        (7, 0, reply.data_chunk(1, 0, 1), "a chunk of data"),
        (7, 0, reply.status_chunk(1, 2, [(1, 0)]), "unknown metadata context"),
        (7, 0, reply.status_chunk(1, 1, [(1, 0)], done=False) * 2, "a second time"),
        (7, 0, reply.status_chunk(1, 1, [(0, 0)]), "an extent that is empty"),
        (7, 0, reply.status_chunk(1, 1, [(4096, 0), (1, 0)]), "beyond the request"),
        (7, 8, reply.status_chunk(1, 1, [(1, 0), (1, 0)]), "the one extent"),
        (7, 8, reply.status_chunk(1, 1, [(4097, 0)]), "the one extent"),
        (7, 0, chunk(5, bytes(4)), "type 0x5 with 4 bytes"),
        (7, 0, chunk(5, bytes(13)), "type 0x5 with 13 bytes"),
        (7, 0, chunk(5, b""), "type 0x5 with 0 bytes"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_left(
    kind: int, flags: int, raw: bytes, reason: str
) -> None:
    client = asking(STRUCTURED, kind, flags=flags)
    with pytest.raises(NbdProtocolError, match=reason):
        list(client.feed(raw))
    with pytest.raises(LocalProtocolError):
        list(client.feed(reply.none_chunk(1)))


def test_chunks_are_wrong_where_they_were_not_negotiated() -> None:
    with pytest.raises(NbdProtocolError, match="magic"):
        list(asking(SIMPLE, c.NBD_CMD_FLUSH, length=0).feed(reply.none_chunk(1)))


def test_events_before_a_fault_are_heard() -> None:
    client = asking(SIMPLE, c.NBD_CMD_FLUSH, length=0)
    heard = client.feed(reply.simple_reply(1) + bytes(16))
    assert next(heard) == RequestDone(1, 0)
    with pytest.raises(NbdProtocolError):
        next(heard)


# --- limits, before memory is taken ---


def test_a_block_status_beyond_the_limit_is_left_at_its_header() -> None:
    too_many = 4 + 8 * (constants.MAX_EXTENTS + 1)
    head = STRUCTURED_REPLY.pack(c.NBD_STRUCTURED_REPLY_MAGIC, 1, 5, 1, too_many)
    with pytest.raises(NbdProtocolError, match="type 0x5"):
        list(asking(STRUCTURED, c.NBD_CMD_BLOCK_STATUS).feed(head))
    head = STRUCTURED_REPLY.pack(c.NBD_STRUCTURED_REPLY_MAGIC, 1, 5, 1, too_many - 8)
    client = asking(STRUCTURED, c.NBD_CMD_BLOCK_STATUS)
    assert list(client.feed(head)) == []
    assert client.wanted_bytes == too_many - 8


def test_endless_chunks_are_left() -> None:
    client = asking(STRUCTURED)
    raw = reply.error_chunk(1, c.NBD_EIO, done=False)
    for _ in range(constants.MAX_CHUNKS):
        list(client.feed(raw))
    with pytest.raises(NbdProtocolError, match="more than 65536 chunks"):
        list(client.feed(raw))


# --- the server's encoders ---


@pytest.mark.parametrize(
    ("extents", "sent"),
    [
        ([(4096, 0)], [(4096, 0)]),
        ([(1024, 0), (1024, 0), (2048, 3)], [(2048, 0), (2048, 3)]),
        ([(1024, 0), (9000, 3), (1, 0)], [(1024, 0), (3072, 3)]),
        ([(9000, 3)], [(4096, 3)]),
        ([(10, 0)], [(10, 0)]),
        ([(1 << 40, 0)], [(4096, 0)]),
    ],
)
@pytest.mark.parametrize("one", [False, True])
def test_a_status_reply_is_cut_to_the_request(
    extents: list[tuple[int, int]], sent: list[tuple[int, int]], one: bool
) -> None:
    flags = c.NBD_CMD_FLAG_REQ_ONE if one else 0
    client = asking(STRUCTURED, c.NBD_CMD_BLOCK_STATUS, flags=flags)
    request = NbdRequest(flags, c.NBD_CMD_BLOCK_STATUS, 1, 0, 4096)
    status, _ = client.feed(reply.status_reply(STRUCTURED, request, extents))
    assert isinstance(status, Status)
    assert list(status.extents()) == (sent[:1] if one else sent)


def test_a_status_reply_stops_at_its_limit() -> None:
    many = ((1, number & 1) for number in range(SIZE))
    request = NbdRequest(0, c.NBD_CMD_BLOCK_STATUS, 1, 0, SIZE)
    raw = reply.status_reply(STRUCTURED, request, many)
    assert len(raw) == 24 + 8 * constants.MAX_EXTENTS_SENT


def test_a_long_message_is_cut_between_two_characters() -> None:
    (failure, _) = asking(STRUCTURED).feed(reply.error_chunk(1, c.NBD_EIO, "x" + "ü" * 4096))
    assert isinstance(failure, RequestFailed)
    assert failure.message == "x" + "ü" * 2047


def test_a_server_cannot_say_what_the_protocol_has_no_words_for() -> None:
    request = NbdRequest(0, c.NBD_CMD_BLOCK_STATUS, 1, 0, 1)
    wrongs: list[Callable[[], bytes]] = [
        lambda: reply.data_chunk(1, 0, 0),
        lambda: reply.hole_chunk(1, 0, 0),
        lambda: reply.status_chunk(1, 1, []),
        lambda: reply.error_chunk(1, 0),
        lambda: reply.error_reply(SIMPLE, request, 0),
        lambda: reply.status_reply(SIMPLE, request, [(1, 0)]),
    ]
    for wrong in wrongs:
        with pytest.raises(LocalProtocolError):
            wrong()
