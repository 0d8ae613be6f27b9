# SPDX-License-Identifier: Apache-2.0
"""What the server answers to every option in every state."""

from __future__ import annotations

import pytest

from tests.protocol.nbd.conversation import FIXED, read_replies
from tests.protocol.nbd.disk import ALL_FLAGS, export_of
from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd import constants
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.handshake import (
    OPTION,
    U32,
    InfoQuery,
    MetaQuery,
    encode_info_query,
    encode_meta_query,
    encode_option,
)
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import BlockSizes, Export, MetaContext

ONE = export_of(1 << 20, "one")
TWO = Export("two", 512, c.NBD_FLAG_READ_ONLY)
ALLOCATION = (c.BASE_ALLOCATION,)
STRUCTURED = encode_option(c.NBD_OPT_STRUCTURED_REPLY)
SELECT_ONE = encode_option(
    c.NBD_OPT_SET_META_CONTEXT, encode_meta_query(MetaQuery("one", ALLOCATION))
)
# What a client may have done before it sends the option in question.
STATES = {"fresh": b"", "structured": STRUCTURED, "selected": STRUCTURED + SELECT_ONE}


def negotiating(before: bytes = b"", *exports: Export, **options: bool) -> NbdServerHandshake:
    server = NbdServerHandshake(exports or (ONE, TWO), **options)
    server.feed(FIXED + before)
    return server


def go(name: str, *wanted: int, option: int = c.NBD_OPT_GO) -> bytes:
    return encode_option(option, encode_info_query(InfoQuery(name, wanted)))


def meta(option: int, name: str, *queries: str) -> bytes:
    return encode_option(option, encode_meta_query(MetaQuery(name, queries)))


def replies_to(server: NbdServerHandshake, raw: bytes) -> list[tuple[int, int, bytes]]:
    return read_replies(server.feed(raw))


def error_of(server: NbdServerHandshake, raw: bytes) -> str:
    """The one error reply to an option, after which the server still negotiates."""
    ((option, kind, text),) = replies_to(server, raw)
    assert option == OPTION.unpack_from(raw)[1]
    assert text.decode().isprintable()
    assert server.session is None
    assert server.wanted_bytes == OPTION.size
    return c.REPLY_ERROR_NAMES[kind]


# --- greeting and client flags ---


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_are_taken(flags: int) -> None:
    server = NbdServerHandshake([ONE])
    assert server.wanted_bytes == 4
    assert server.feed(flags.to_bytes(4, "big")) == b""
    assert server.wanted_bytes == OPTION.size


@pytest.mark.parametrize("flags", [4, 7, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    server = NbdServerHandshake([ONE])
    with pytest.raises(NbdProtocolError, match="client flags"):
        server.feed(flags.to_bytes(4, "big"))
    assert server.wanted_bytes == 0
    with pytest.raises(LocalProtocolError):
        server.feed(b"more")


@pytest.mark.parametrize(
    "option", [c.NBD_OPT_ABORT, c.NBD_OPT_LIST, c.NBD_OPT_GO, c.NBD_OPT_STRUCTURED_REPLY, 99]
)
def test_without_fixed_newstyle_only_an_export_name_may_come(option: int) -> None:
    server = NbdServerHandshake([ONE])
    server.feed(bytes(4))
    with pytest.raises(NbdProtocolError, match="fixed newstyle"):
        server.feed(encode_option(option))


def test_a_wrong_magic_ends_the_connection() -> None:
    with pytest.raises(NbdProtocolError, match="no option"):
        negotiating().feed(b"GET / HTTP/1.1\r\n")


# --- EXPORT_NAME ---


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("zeroes", [True, False])
def test_an_export_name_begins_the_transmission(state: str, zeroes: bool) -> None:
    server = NbdServerHandshake([ONE, TWO])
    server.feed(bytes([0, 0, 0, 1 if zeroes else 3]) + STATES[state])
    answer = server.feed(encode_option(c.NBD_OPT_EXPORT_NAME, b"one"))
    assert len(answer) == 10 + (124 if zeroes else 0)
    assert not any(answer[10:])
    assert int.from_bytes(answer[:8], "big") == 1 << 20
    assert server.wanted_bytes == 0
    session = server.session
    assert session is not None
    assert session.export is ONE
    assert session.flags == int.from_bytes(answer[8:10], "big")
    assert session.structured == (state != "fresh")
    assert session.no_zeroes != zeroes
    assert session.allocation_id == (1 if state == "selected" else None)


@pytest.mark.parametrize("name", [b"three", b"", b"\xff", b"one\0", b"ONE"])
def test_an_export_name_that_is_none_ends_the_connection(name: bytes) -> None:
    with pytest.raises(NbdProtocolError, match="NBD_OPT_EXPORT_NAME"):
        negotiating().feed(encode_option(c.NBD_OPT_EXPORT_NAME, name))


def test_a_long_export_name_ends_the_connection_before_it_is_read() -> None:
    with pytest.raises(NbdProtocolError, match="4097"):
        negotiating().feed(OPTION.pack(c.IHAVEOPT, c.NBD_OPT_EXPORT_NAME, 4097))


# --- ABORT ---


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("data", [b"", b"why not", bytes(constants.MAX_OPTION_BYTES + 1)])
def test_abort_is_acknowledged_and_ends_the_handshake(state: str, data: bytes) -> None:
    server = negotiating(STATES[state])
    assert replies_to(server, encode_option(c.NBD_OPT_ABORT, data)) == [
        (c.NBD_OPT_ABORT, c.NBD_REP_ACK, b"")
    ]
    assert server.session is None
    assert server.wanted_bytes == 0


# --- LIST ---


@pytest.mark.parametrize("state", STATES)
def test_a_list_names_every_export(state: str) -> None:
    server = negotiating(STATES[state])
    assert replies_to(server, encode_option(c.NBD_OPT_LIST)) == [
        (c.NBD_OPT_LIST, c.NBD_REP_SERVER, b"\0\0\0\3one" + b"a disk of a test"),
        (c.NBD_OPT_LIST, c.NBD_REP_SERVER, b"\0\0\0\3two"),
        (c.NBD_OPT_LIST, c.NBD_REP_ACK, b""),
    ]


def test_a_list_with_data_is_invalid() -> None:
    assert error_of(negotiating(), encode_option(c.NBD_OPT_LIST, b"x")) == "NBD_REP_ERR_INVALID"


def test_a_list_can_be_forbidden() -> None:
    server = negotiating(listable=False)
    assert error_of(server, encode_option(c.NBD_OPT_LIST)) == "NBD_REP_ERR_POLICY"


def test_a_list_is_too_big_beyond_the_limit_of_a_handshake() -> None:
    many = [Export(f"{number}{'x' * 4000}", 1) for number in range(200)]
    server = negotiating(b"", *many)
    assert len(replies_to(server, encode_option(c.NBD_OPT_LIST))) == 201
    assert error_of(server, encode_option(c.NBD_OPT_LIST)) == "NBD_REP_ERR_TOO_BIG"


# --- INFO and GO ---


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("option", [c.NBD_OPT_INFO, c.NBD_OPT_GO])
def test_info_and_go_tell_what_is_asked_for(state: str, option: int) -> None:
    server = negotiating(STATES[state])
    flags = (ONE.flags if state != "fresh" else ONE.flags & ~c.NBD_FLAG_SEND_DF).to_bytes(2, "big")
    export = b"\0\0" + (1 << 20).to_bytes(8, "big") + flags
    kinds = (c.NBD_INFO_BLOCK_SIZE, c.NBD_INFO_NAME, c.NBD_INFO_DESCRIPTION, 77)
    assert replies_to(server, go("one", *kinds, option=option)) == [
        (option, c.NBD_REP_INFO, export),
        (option, c.NBD_REP_INFO, b"\0\1one"),
        (option, c.NBD_REP_INFO, b"\0\2a disk of a test"),
        (option, c.NBD_REP_INFO, b"\0\3" + bytes.fromhex("00000001 00001000 02000000")),
        (option, c.NBD_REP_ACK, b""),
    ]
    assert (server.session is not None) == (option == c.NBD_OPT_GO)
    assert server.wanted_bytes == (0 if option == c.NBD_OPT_GO else OPTION.size)


@pytest.mark.parametrize("wanted", [(), (0,), (0, 0), (500,)])
def test_without_a_wish_only_size_and_flags_are_told(wanted: tuple[int, ...]) -> None:
    replies = replies_to(negotiating(), go("two", *wanted))
    assert [(kind, data[:2]) for _, kind, data in replies] == [
        (c.NBD_REP_INFO, b"\0\0"),
        (c.NBD_REP_ACK, b""),
    ]


def test_an_empty_description_is_not_told() -> None:
    assert len(replies_to(negotiating(), go("two", c.NBD_INFO_DESCRIPTION))) == 2


@pytest.mark.parametrize("option", [c.NBD_OPT_INFO, c.NBD_OPT_GO])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (encode_info_query(InfoQuery("three", ())), "NBD_REP_ERR_UNKNOWN"),
        (encode_info_query(InfoQuery("", ())), "NBD_REP_ERR_UNKNOWN"),
        (encode_info_query(InfoQuery("x" * 4096, ())), "NBD_REP_ERR_UNKNOWN"),
        (encode_info_query(InfoQuery("x" * 4097, ())), "NBD_REP_ERR_TOO_BIG"),
        (bytes(constants.MAX_OPTION_BYTES + 1), "NBD_REP_ERR_TOO_BIG"),
        (encode_info_query(InfoQuery("one\0", ())), "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\1\xff\0\0", "NBD_REP_ERR_INVALID"),
        (b"", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one\0", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\4one", "NBD_REP_ERR_INVALID"),
        (b"\xff\xff\xff\xffone\0\0", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one\0\1", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one\0\0\0", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one\0\1\0\3\0", "NBD_REP_ERR_INVALID"),
    ],
)
def test_wrong_info_requests_are_answered_and_the_client_may_try_again(
    option: int, data: bytes, error: str
) -> None:
    server = negotiating()
    assert error_of(server, encode_option(option, data)) == error
    server.feed(go("one"))
    assert server.session is not None


def test_the_empty_name_is_the_only_export() -> None:
    server = negotiating(b"", ONE)
    replies = replies_to(server, go("", c.NBD_INFO_NAME))
    assert replies[1][2] == b"\0\1one"
    assert server.session is not None
    assert server.session.export is ONE


def test_an_export_may_itself_have_the_empty_name() -> None:
    nameless = Export("", 7)
    server = negotiating(b"", ONE, nameless)
    server.feed(go(""))
    assert server.session is not None
    assert server.session.export is nameless


# --- STRUCTURED_REPLY, metadata contexts ---


@pytest.mark.parametrize("state", STATES)
def test_structured_replies_are_granted_also_twice(state: str) -> None:
    server = negotiating(STATES[state])
    assert replies_to(server, STRUCTURED) == [(c.NBD_OPT_STRUCTURED_REPLY, c.NBD_REP_ACK, b"")]
    server.feed(go("one"))
    assert server.session is not None
    assert server.session.structured
    assert server.session.flags & c.NBD_FLAG_SEND_DF


def test_structured_replies_with_data_are_invalid() -> None:
    raw = encode_option(c.NBD_OPT_STRUCTURED_REPLY, b"x")
    assert error_of(negotiating(), raw) == "NBD_REP_ERR_INVALID"


@pytest.mark.parametrize(
    "option", [c.NBD_OPT_STRUCTURED_REPLY, c.NBD_OPT_LIST_META_CONTEXT, c.NBD_OPT_SET_META_CONTEXT]
)
def test_a_server_may_do_without_structured_replies(option: int) -> None:
    server = negotiating(structured=False)
    assert error_of(server, encode_option(option)) == "NBD_REP_ERR_UNSUP"
    server.feed(go("one"))
    assert server.session is not None
    assert not server.session.structured


@pytest.mark.parametrize("option", [c.NBD_OPT_LIST_META_CONTEXT, c.NBD_OPT_SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (encode_meta_query(MetaQuery("three", ALLOCATION)), "NBD_REP_ERR_UNKNOWN"),
        (encode_meta_query(MetaQuery("one", ["x" * 4097])), "NBD_REP_ERR_TOO_BIG"),
        (encode_meta_query(MetaQuery("x" * 4097, ())), "NBD_REP_ERR_TOO_BIG"),
        (
            encode_meta_query(MetaQuery("one", ["a:"] * (constants.MAX_QUERIES + 1))),
            "NBD_REP_ERR_TOO_BIG",
        ),
        (bytes(constants.MAX_OPTION_BYTES + 1), "NBD_REP_ERR_TOO_BIG"),
        (encode_meta_query(MetaQuery("one", ["allocation"])), "NBD_REP_ERR_INVALID"),
        (encode_meta_query(MetaQuery("one", [""])), "NBD_REP_ERR_INVALID"),
        (encode_meta_query(MetaQuery("one", ["a:\0"])), "NBD_REP_ERR_INVALID"),
        (encode_meta_query(MetaQuery("one", ALLOCATION)) + b"x", "NBD_REP_ERR_INVALID"),
        (encode_meta_query(MetaQuery("one", ALLOCATION))[:-1], "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one\0\0\0", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one\xff\xff\xff\xff", "NBD_REP_ERR_INVALID"),
        (b"\0\0\0\3one\0\0\0\1", "NBD_REP_ERR_INVALID"),
        (b"", "NBD_REP_ERR_INVALID"),
    ],
)
def test_wrong_context_queries_are_answered_and_leave_none_selected(
    option: int, data: bytes, error: str
) -> None:
    server = negotiating(STATES["selected"])
    assert error_of(server, encode_option(option, data)) == error
    server.feed(go("one"))
    assert server.session is not None
    left = server.session.meta_contexts
    assert left == (
        () if option == c.NBD_OPT_SET_META_CONTEXT else (MetaContext(1, ALLOCATION[0]),)
    )


@pytest.mark.parametrize("option", [c.NBD_OPT_LIST_META_CONTEXT, c.NBD_OPT_SET_META_CONTEXT])
def test_contexts_need_structured_replies_first(option: int) -> None:
    assert error_of(negotiating(), meta(option, "one", *ALLOCATION)) == "NBD_REP_ERR_INVALID"


@pytest.mark.parametrize(
    ("name", "queries", "found"),
    [
        ("one", (), True),
        ("one", ("base:",), True),
        ("one", ("qemu:dirty-bitmap:x", "base:allocation"), True),
        ("one", ("base:alloc", "qemu:"), False),
        ("two", (), False),
        ("two", ("base:allocation",), False),
    ],
)
def test_contexts_are_listed(name: str, queries: tuple[str, ...], found: bool) -> None:
    option = c.NBD_OPT_LIST_META_CONTEXT
    context = [(option, c.NBD_REP_META_CONTEXT, bytes(4) + b"base:allocation")]
    replies = replies_to(negotiating(STRUCTURED), meta(option, name, *queries))
    assert replies == [*(context if found else []), (option, c.NBD_REP_ACK, b"")]


@pytest.mark.parametrize(
    ("name", "queries", "found"),
    [
        ("one", ("base:allocation",), True),
        ("one", ("x-y:z", "base:allocation", "base:allocation"), True),
        ("one", (), False),
        ("one", ("base:",), False),
        ("one", ("base:allocation2",), False),
        ("two", ("base:allocation",), False),
    ],
)
def test_contexts_are_selected(name: str, queries: tuple[str, ...], found: bool) -> None:
    option = c.NBD_OPT_SET_META_CONTEXT
    server = negotiating(STATES["selected"])
    context = [(option, c.NBD_REP_META_CONTEXT, b"\0\0\0\1base:allocation")]
    replies = replies_to(server, meta(option, name, *queries))
    assert replies == [*(context if found else []), (option, c.NBD_REP_ACK, b"")]
    server.feed(go(name))
    assert server.session is not None
    assert (server.session.allocation_id is not None) == found


def test_contexts_hold_only_for_the_export_they_were_selected_for() -> None:
    server = negotiating(STATES["selected"], ONE)
    server.feed(go(""))
    assert server.session is not None
    assert server.session.meta_contexts == ()


# --- what is not spoken, and limits ---


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("option", [0, c.NBD_OPT_PEEK_EXPORT, c.NBD_OPT_EXTENDED_HEADERS, 1 << 31])
@pytest.mark.parametrize("length", [0, 1, constants.MAX_SKIPPED_BYTES])
def test_unknown_options_are_read_past(state: str, option: int, length: int) -> None:
    server = negotiating(STATES[state])
    assert error_of(server, encode_option(option, bytes(length))) == "NBD_REP_ERR_UNSUP"


def test_tls_is_refused() -> None:
    server = negotiating()
    assert error_of(server, encode_option(c.NBD_OPT_STARTTLS)) == "NBD_REP_ERR_UNSUP"
    assert error_of(server, encode_option(c.NBD_OPT_STARTTLS, b"x")) == "NBD_REP_ERR_INVALID"


@pytest.mark.parametrize("option", [c.NBD_OPT_ABORT, c.NBD_OPT_LIST, c.NBD_OPT_GO, 99])
def test_an_enormous_option_ends_the_connection_before_it_is_read(option: int) -> None:
    head = OPTION.pack(c.IHAVEOPT, option, constants.MAX_SKIPPED_BYTES + 1)
    with pytest.raises(NbdProtocolError, match="an option of"):
        negotiating().feed(head)


def test_endless_haggling_ends_the_connection_with_the_answers_due() -> None:
    server = negotiating()
    with pytest.raises(NbdProtocolError, match="options") as caught:
        server.feed(encode_option(99) * (constants.MAX_OPTIONS + 1))
    assert len(read_replies(caught.value.unsent)) == constants.MAX_OPTIONS


@pytest.mark.parametrize("raw", [encode_option(c.NBD_OPT_LIST), go("one"), STRUCTURED, SELECT_ONE])
def test_a_server_that_shuts_down_refuses_every_option(raw: bytes) -> None:
    server = negotiating(STRUCTURED)
    server.shutting_down = True
    assert error_of(server, raw) == "NBD_REP_ERR_SHUTDOWN"
    with pytest.raises(NbdProtocolError, match="shutting down"):
        server.feed(encode_option(c.NBD_OPT_EXPORT_NAME, b"one"))


def test_a_server_that_shuts_down_still_lets_clients_go() -> None:
    server = negotiating()
    server.shutting_down = True
    assert replies_to(server, encode_option(c.NBD_OPT_ABORT))[0][1] == c.NBD_REP_ACK


def test_nothing_of_the_transmission_phase_is_swallowed() -> None:
    server = negotiating()
    server.feed(go("one") + b"the first request")
    assert server.unread == b"the first request"
    with pytest.raises(LocalProtocolError):
        server.feed(b"the second")


# --- exports ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "x" * 4097},
        {"name": "a\0b"},
        {"name": "\udc80"},
        {"description": "x" * 4097},
        {"size_bytes": -1},
        {"size_bytes": 1 << 63},
        {"flags": 1 << 9},
        {"flags": c.NBD_FLAG_SEND_FAST_ZERO},
        {"block_sizes": BlockSizes(0, 4096, 1 << 20)},
        {"block_sizes": BlockSizes(3, 4096, 1 << 20)},
        {"block_sizes": BlockSizes(1 << 17, 1 << 17, 1 << 20)},
        {"block_sizes": BlockSizes(1, 256, 1 << 20)},
        {"block_sizes": BlockSizes(4096, 512, 1 << 20)},
        {"block_sizes": BlockSizes(4096, 4096, 4097)},
        {"block_sizes": BlockSizes(512, 4096, 0)},
    ],
)
def test_an_export_that_the_protocol_cannot_express_is_refused(
    arguments: dict[str, object],
) -> None:
    with pytest.raises(LocalProtocolError):
        Export(**{"name": "x", "size_bytes": 1, "flags": ALL_FLAGS} | arguments)  # type: ignore[arg-type]


def test_two_exports_of_the_same_name_are_refused() -> None:
    with pytest.raises(LocalProtocolError):
        NbdServerHandshake([ONE, ONE])


def test_an_unlimited_block_size_is_possible() -> None:
    raw = go("x", c.NBD_INFO_BLOCK_SIZE)
    server = negotiating(b"", Export("x", 1, block_sizes=BlockSizes(512, 512, 0xFFFFFFFF)))
    assert U32.unpack(replies_to(server, raw)[1][2][-4:]) == (0xFFFFFFFF,)
