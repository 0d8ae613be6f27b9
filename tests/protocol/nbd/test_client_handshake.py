# SPDX-License-Identifier: Apache-2.0
"""What the client asks, and what it makes of every kind of answer."""

from __future__ import annotations

import pytest

from tests.protocol.nbd.disk import ALL_FLAGS
from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd import constants
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.client_handshake import Goal, NbdClientHandshake
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.handshake import (
    EXPORT_NAME_REPLY,
    GREETING,
    OPTION,
    OPTION_REPLY,
    encode_option,
    encode_option_reply,
)
from vmapipe.protocol.nbd.session import DEFAULT_BLOCK_SIZES, BlockSizes

FLAGS = ALL_FLAGS | c.NBD_FLAG_HAS_FLAGS
EXPORT_INFO = b"\0\0" + EXPORT_NAME_REPLY.pack(1 << 20, FLAGS)
ABORT = encode_option(c.NBD_OPT_ABORT)
GO, LIST, INFO = c.NBD_OPT_GO, c.NBD_OPT_LIST, c.NBD_OPT_INFO
SET, STRUCTURED = c.NBD_OPT_SET_META_CONTEXT, c.NBD_OPT_STRUCTURED_REPLY


def greeting(flags: int = 3) -> bytes:
    return GREETING.pack(c.INIT_PASSWD, c.IHAVEOPT, flags)


def ack(option: int) -> bytes:
    return encode_option_reply(option, c.NBD_REP_ACK)


def info(data: bytes, option: int = GO) -> bytes:
    return encode_option_reply(option, c.NBD_REP_INFO, data)


def asked(raw: bytes) -> list[int]:
    """The options in what a client sends."""
    options = []
    while raw:
        _, option, length = OPTION.unpack_from(raw)
        options.append(option)
        raw = raw[OPTION.size + length :]
    return options


def at(option: int, name: str = "disk") -> NbdClientHandshake:
    """A client that has just sent this option."""
    goal = option if option in (LIST, INFO) else GO
    client = NbdClientHandshake(name, goal=Goal(goal))
    sent = client.feed(greeting())[4:]
    while asked(sent) != [option]:
        (last,) = asked(sent)
        sent = client.feed(ack(last))
    return client


# --- the greeting ---


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (GREETING.pack(c.INIT_PASSWD, c.CLISERV_MAGIC, 0), "oldstyle"),
        (b"SSH-2.0-OpenSSH_9.2", "not an NBD server"),
        (GREETING.pack(c.INIT_PASSWD, 1, 3), "not an NBD server"),
    ],
)
def test_a_server_of_another_kind_is_recognized(raw: bytes, reason: str) -> None:
    client = NbdClientHandshake()
    with pytest.raises(NbdProtocolError, match=reason):
        client.feed(raw)
    assert client.wanted_bytes == 0


@pytest.mark.parametrize("flags", [1, 3, 0xFFFF])
def test_the_client_sets_no_flag_that_the_server_did_not(flags: int) -> None:
    sent = NbdClientHandshake().feed(greeting(flags))
    assert int.from_bytes(sent[:4], "big") == flags & 3
    assert asked(sent[4:]) == [STRUCTURED]


@pytest.mark.parametrize("flags", [0, 2])
def test_a_server_without_fixed_newstyle_is_asked_for_the_export_at_once(flags: int) -> None:
    client = NbdClientHandshake("disk")
    assert client.feed(greeting(flags)) == bytes([0, 0, 0, flags]) + encode_option(
        c.NBD_OPT_EXPORT_NAME, b"disk"
    )
    assert client.wanted_bytes == (10 if flags else 134)


@pytest.mark.parametrize("goal", [Goal.LIST, Goal.INFORMATION])
def test_a_server_without_fixed_newstyle_tells_nothing(goal: Goal) -> None:
    with pytest.raises(NbdRefusedError):
        NbdClientHandshake(goal=goal).feed(greeting(0))


def test_a_name_that_no_export_can_have_is_refused() -> None:
    for name in ("x" * 4097, "a\0", "\udc80"):
        with pytest.raises(LocalProtocolError):
            NbdClientHandshake(name)


# --- the way to the transmission phase ---


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("allocation", [True, False])
def test_the_client_asks_for_what_it_was_told_to(structured: bool, allocation: bool) -> None:
    contexts = (c.BASE_ALLOCATION,) if allocation else ()
    client = NbdClientHandshake("disk", structured=structured, contexts=contexts)
    options = asked(client.feed(greeting())[4:])
    while options[-1] != GO:
        options += asked(client.feed(ack(options[-1])))
    wanted = [STRUCTURED] if structured else []
    if structured and allocation:
        wanted.append(SET)
    assert options == [*wanted, GO]


@pytest.mark.parametrize("error", [c.NBD_REP_ERR_UNSUP, c.NBD_REP_ERR_POLICY, 0x80001234])
def test_without_structured_replies_the_client_goes_on(error: int) -> None:
    client = at(STRUCTURED)
    assert asked(client.feed(encode_option_reply(STRUCTURED, error, b"no"))) == [GO]
    client.feed(info(EXPORT_INFO) + ack(GO))
    assert client.session is not None
    assert not client.session.structured
    assert not client.session.flags & c.NBD_FLAG_SEND_DF


@pytest.mark.parametrize("error", [c.NBD_REP_ERR_UNSUP, c.NBD_REP_ERR_UNKNOWN])
def test_without_contexts_the_client_goes_on(error: int) -> None:
    client = at(SET)
    context = encode_option_reply(SET, c.NBD_REP_META_CONTEXT, b"\0\0\0\7base:allocation")
    assert asked(client.feed(context + encode_option_reply(SET, error))) == [GO]
    client.feed(info(EXPORT_INFO) + ack(GO))
    assert client.session is not None
    assert client.session.structured
    assert client.session.meta_contexts == ()


def test_the_session_is_what_the_server_says() -> None:
    client = at(SET)
    context = encode_option_reply(SET, c.NBD_REP_META_CONTEXT, b"\0\0\0\7base:allocation")
    client.feed(context + ack(SET))
    raw = b"".join(
        [
            info(b"\0\1canonical"),
            info(b"\0\2what it is"),
            info(b"\0\x63something new"),
            info(b"\0\3" + bytes.fromhex("00000200 00010000 ffffffff")),
            info(EXPORT_INFO),
            ack(GO),
        ]
    )
    assert client.feed(raw + b"more") == b""
    assert client.unread == b"more"
    assert client.wanted_bytes == 0
    session = client.session
    assert session is not None
    assert session.export is client.export
    assert session.export.name == "canonical"
    assert session.export.description == "what it is"
    assert session.export.size_bytes == 1 << 20
    assert session.export.block_sizes == BlockSizes(512, 65536, 0xFFFFFFFF)
    assert session.max_data_bytes == constants.MAX_PAYLOAD_BYTES
    assert session.flags == FLAGS
    assert session.allocation_id == 7
    assert session.no_zeroes


def test_unknown_and_contradictory_flags_are_ignored() -> None:
    client = at(GO)
    flags = 0xF000 | c.NBD_FLAG_HAS_FLAGS | c.NBD_FLAG_SEND_FAST_ZERO
    client.feed(info(b"\0\0" + EXPORT_NAME_REPLY.pack(5, flags)) + ack(GO))
    assert client.session is not None
    assert client.session.flags == c.NBD_FLAG_HAS_FLAGS
    assert client.session.export.block_sizes == DEFAULT_BLOCK_SIZES


@pytest.mark.parametrize("flags", [1, 3])
def test_a_server_without_go_is_asked_by_export_name(flags: int) -> None:
    client = NbdClientHandshake("disk", structured=False)
    client.feed(greeting(flags))
    sent = client.feed(encode_option_reply(GO, c.NBD_REP_ERR_UNSUP))
    assert sent == encode_option(c.NBD_OPT_EXPORT_NAME, b"disk")
    zeroes = b"" if flags & 2 else bytes(124)
    assert client.wanted_bytes == 10 + len(zeroes)
    client.feed(EXPORT_NAME_REPLY.pack(77, FLAGS) + zeroes + b"more")
    assert client.session is not None
    assert client.session.export.size_bytes == 77
    assert client.unread == b"more"


def test_a_server_that_hangs_up_after_an_export_name_has_no_such_export() -> None:
    client = at(GO)
    client.feed(encode_option_reply(GO, c.NBD_REP_ERR_UNSUP))
    with pytest.raises(NbdRefusedError, match="no export of that name") as caught:
        client.eof()
    assert caught.value.reply_type is None


def test_a_server_that_hangs_up_before_breaks_the_protocol() -> None:
    client = at(GO)
    with pytest.raises(NbdProtocolError, match="closed the connection"):
        client.eof()
    assert client.wanted_bytes == 0


@pytest.mark.parametrize(
    "error",
    [number for number in c.REPLY_ERROR_NAMES if number != c.NBD_REP_ERR_UNSUP] + [0x8000FFFF],
)
def test_a_refused_export_is_told_with_the_servers_words(error: int) -> None:
    client = at(GO)
    with pytest.raises(NbdRefusedError, match="not for you") as caught:
        client.feed(encode_option_reply(GO, error, "not for you ✗".encode()))
    refusal = caught.value
    assert (refusal.option, refusal.reply_type, refusal.message) == (GO, error, "not for you ✗")
    assert refusal.unsent == ABORT
    assert c.REPLY_ERROR_NAMES.get(error, "error 0x8000ffff") in str(refusal)
    with pytest.raises(LocalProtocolError):
        client.feed(b"")


@pytest.mark.parametrize("option", [STRUCTURED, SET, GO, LIST, INFO])
@pytest.mark.parametrize("error", [c.NBD_REP_ERR_SHUTDOWN, c.NBD_REP_ERR_TLS_REQD])
def test_after_some_errors_the_client_leaves_whatever_it_asked(option: int, error: int) -> None:
    with pytest.raises(NbdRefusedError) as caught:
        at(option).feed(encode_option_reply(option, error))
    assert caught.value.unsent == ABORT


# --- lists and information ---


def test_the_client_lists_exports() -> None:
    client = at(LIST)
    entries = [b"\0\0\0\1a", b"\0\0\0\0", b"\0\0\0\1bwords"]
    raw = b"".join(encode_option_reply(LIST, c.NBD_REP_SERVER, entry) for entry in entries)
    assert client.feed(raw + ack(LIST)) == ABORT
    assert client.listed == [("a", ""), ("", ""), ("b", "words")]
    assert client.wanted_bytes == 0
    assert client.session is None


@pytest.mark.parametrize("error", c.REPLY_ERROR_NAMES)
def test_a_refused_list_is_told(error: int) -> None:
    with pytest.raises(NbdRefusedError):
        at(LIST).feed(encode_option_reply(LIST, error))


def test_the_client_asks_about_one_export() -> None:
    client = NbdClientHandshake("disk", goal=Goal.INFORMATION)
    client.feed(greeting())
    option = c.NBD_OPT_LIST_META_CONTEXT
    assert asked(client.feed(ack(STRUCTURED))) == [option]
    names = (b"base:allocation", b"qemu:dirty-bitmap:x")
    raw = b"".join(encode_option_reply(option, c.NBD_REP_META_CONTEXT, bytes(4) + n) for n in names)
    assert asked(client.feed(raw + ack(option))) == [INFO]
    assert client.feed(info(EXPORT_INFO, INFO) + ack(INFO)) == ABORT
    assert client.offered_contexts == ("base:allocation", "qemu:dirty-bitmap:x")
    assert client.export is not None
    assert client.export.size_bytes == 1 << 20
    assert client.session is None


def test_a_server_without_info_tells_nothing() -> None:
    with pytest.raises(NbdRefusedError, match="NBD_OPT_INFO"):
        at(INFO).feed(encode_option_reply(INFO, c.NBD_REP_ERR_UNSUP))


# --- wrong servers ---


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return encode_option_reply(option, kind, data)


@pytest.mark.parametrize(
    ("option", "raw", "reason"),
    [
        (GO, OPTION_REPLY.pack(1, GO, 1, 0), "magic"),
        (GO, ack(LIST), "option 3"),
        (GO, reply(GO, c.NBD_REP_ACK, b"x"), "with data"),
        (GO, ack(GO), "without NBD_INFO_EXPORT"),
        (INFO, ack(INFO), "without NBD_INFO_EXPORT"),
        (GO, OPTION_REPLY.pack(c.REP_MAGIC, GO, 3, 16385), "16385"),
        (GO, OPTION_REPLY.pack(c.REP_MAGIC, GO, 0x80000001, 0xFFFFFFFF), "4294967295"),
        (GO, reply(GO, c.NBD_REP_SERVER, bytes(4)), "reply type 2"),
        (GO, reply(GO, 99), "reply type 99"),
        (SET, reply(SET, c.NBD_REP_INFO, EXPORT_INFO), "reply type 3"),
        (LIST, reply(LIST, c.NBD_REP_META_CONTEXT, bytes(5)), "reply type 4"),
        (STRUCTURED, reply(STRUCTURED, c.NBD_REP_SERVER, bytes(4)), "reply type 2"),
        (GO, info(b""), "0 bytes"),
        (GO, info(b"\0"), "1 bytes"),
        (GO, info(EXPORT_INFO[:-1]), "11 bytes"),
        (GO, info(EXPORT_INFO + b"x"), "13 bytes"),
        (GO, info(b"\0\0" + EXPORT_NAME_REPLY.pack(1 << 63, FLAGS)), "an export of"),
        (GO, info(b"\0\0" + EXPORT_NAME_REPLY.pack(1, 2)), "HAS_FLAGS"),
        (GO, info(b"\0\1\xff"), "UTF-8"),
        (GO, info(b"\0\1" + b"x" * 4097), "4096"),
        (GO, info(b"\0\3" + bytes(12)), "minimum block size"),
        (GO, info(b"\0\3" + bytes(11)), "13 bytes"),
        (LIST, reply(LIST, c.NBD_REP_SERVER, b""), "0 bytes"),
        (LIST, reply(LIST, c.NBD_REP_SERVER, b"\0\0\0\2x"), "longer than"),
        (LIST, reply(LIST, c.NBD_REP_SERVER, b"\0\0\0\1\0"), "NUL"),
        (SET, reply(SET, c.NBD_REP_META_CONTEXT, b"\0"), "1 bytes"),
        (SET, reply(SET, c.NBD_REP_META_CONTEXT, bytes(4) + b"x:y") + ack(SET), "not asked for"),
        (
            SET,
            reply(SET, c.NBD_REP_META_CONTEXT, bytes(4) + b"base:allocation") * 2 + ack(SET),
            "not",
        ),
    ],
)
def test_a_server_that_breaks_the_protocol_is_left(option: int, raw: bytes, reason: str) -> None:
    client = at(option)
    with pytest.raises(NbdProtocolError, match=reason) as caught:
        client.feed(raw)
    assert client.wanted_bytes == 0
    assert caught.value.unsent == b""


@pytest.mark.parametrize(
    ("option", "kind", "data"),
    [
        (LIST, c.NBD_REP_SERVER, bytes(4) + b"x" * 4096),
        (GO, c.NBD_REP_INFO, b"\0\x63" + bytes(4096)),
        (SET, c.NBD_REP_META_CONTEXT, bytes(4) + b"x" * 4096),
    ],
)
def test_endless_answers_are_left(option: int, kind: int, data: bytes) -> None:
    client = at(option)
    raw = encode_option_reply(option, kind, data)
    many = constants.MAX_ANSWERS_BYTES // len(raw)
    client.feed(raw * (many - 1))
    with pytest.raises(NbdProtocolError, match="bytes of option replies"):
        client.feed(raw * 2)


# --- TLS ---


def test_tls_comes_before_everything_else_and_the_handshake_goes_on_behind_it() -> None:
    client = NbdClientHandshake("disk", tls=True)
    assert asked(client.feed(greeting())[4:]) == [c.NBD_OPT_STARTTLS]
    assert client.feed(ack(c.NBD_OPT_STARTTLS)) == b""
    before = client.wants_tls
    assert asked(client.secured()) == [STRUCTURED]
    assert (before, client.wants_tls) == (True, False)
    with pytest.raises(LocalProtocolError):
        client.secured()


@pytest.mark.parametrize("cut", [True, False], ids=["a part of it", "all of it"])
@pytest.mark.parametrize("injected", [ack(STRUCTURED), info(EXPORT_INFO), b"\0"])
def test_what_comes_unencrypted_behind_the_answer_is_not_believed(
    injected: bytes, cut: bool
) -> None:
    client = NbdClientHandshake("disk", tls=True)
    client.feed(greeting())
    with pytest.raises(NbdProtocolError, match="data without TLS"):
        client.feed(ack(c.NBD_OPT_STARTTLS) + (injected[:1] if cut else injected))


@pytest.mark.parametrize("error", [c.NBD_REP_ERR_UNSUP, c.NBD_REP_ERR_POLICY])
def test_a_server_without_tls_is_left_and_nothing_is_asked_in_plain_text(error: int) -> None:
    client = NbdClientHandshake("disk", tls=True)
    client.feed(greeting())
    with pytest.raises(NbdRefusedError) as raised:
        client.feed(encode_option_reply(c.NBD_OPT_STARTTLS, error))
    assert raised.value.unsent == ABORT
    old = NbdClientHandshake("disk", tls=True)
    with pytest.raises(NbdRefusedError):
        old.feed(greeting(0))
