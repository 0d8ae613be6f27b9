# SPDX-License-Identifier: Apache-2.0
"""Bytes written by hand from the protocol document, both directions."""

from __future__ import annotations

from tests.protocol.nbd.conversation import joined, unhex
from tests.protocol.nbd.disk import export_of
from vmapipe.protocol.nbd import reply
from vmapipe.protocol.nbd.client_handshake import Goal, NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_EIO,
)
from vmapipe.protocol.nbd.reply import Data, Hole, RequestDone, RequestFailed, Status
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import (
    BlockSizes,
    Export,
    MetaContext,
    NbdRequest,
    NbdSession,
    encode_request,
    parse_request,
)

GREETING = unhex("""
    4e42444d41474943  | NBDMAGIC
    49484156454f5054  | IHAVEOPT
    0003              | NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES
""")
CLIENT_FLAGS = unhex("00000003  | NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES")
ASK_STRUCTURED = unhex("""
    49484156454f5054  00000008  00000000  | IHAVEOPT, NBD_OPT_STRUCTURED_REPLY, no data
""")
ACK_STRUCTURED = unhex("""
    0003e889045565a9  00000008  00000001  00000000  | magic, option, NBD_REP_ACK, no data
""")
ASK_CONTEXT = unhex("""
    49484156454f5054  0000000a  0000001f  | NBD_OPT_SET_META_CONTEXT, 31 bytes
    00000004  6469736b                    | "disk"
    00000001                              | one query
    0000000f  626173653a616c6c6f636174696f6e  | "base:allocation"
""")
CONTEXT = unhex("""
    0003e889045565a9  0000000a  00000004  00000013  | NBD_REP_META_CONTEXT, 19 bytes
    00000001  626173653a616c6c6f636174696f6e        | id 1, "base:allocation"
    0003e889045565a9  0000000a  00000001  00000000  | NBD_REP_ACK
""")
ASK_GO = unhex("""
    49484156454f5054  00000007  00000010  | NBD_OPT_GO, 16 bytes
    00000004  6469736b                    | "disk"
    0003  0001 0002 0003                  | NBD_INFO_NAME, _DESCRIPTION, _BLOCK_SIZE
""")
GO_REPLIES = unhex("""
    0003e889045565a9  00000007  00000003  0000000c  | NBD_REP_INFO, 12 bytes
    0000  0000000000100000  0ded  | NBD_INFO_EXPORT, 1 MiB, all flags but READ_ONLY, ROTATIONAL
    0003e889045565a9  00000007  00000003  00000006
    0001  6469736b                | NBD_INFO_NAME, "disk"
    0003e889045565a9  00000007  00000003  00000012
    0002  61206469736b206f6620612074657374  | NBD_INFO_DESCRIPTION, "a disk of a test"
    0003e889045565a9  00000007  00000003  0000000e
    0003  00000001  00001000  02000000      | NBD_INFO_BLOCK_SIZE: 1, 4096, 32 MiB
    0003e889045565a9  00000007  00000001  00000000  | NBD_REP_ACK
""")
ASK_EXPORT_NAME = unhex("49484156454f5054  00000001  00000004  6469736b  | NBD_OPT_EXPORT_NAME")
ASK_LIST = unhex("49484156454f5054  00000003  00000000  | NBD_OPT_LIST")
LIST_REPLIES = unhex("""
    0003e889045565a9  00000003  00000002  00000018  | NBD_REP_SERVER, 24 bytes
    00000004  6469736b  61206469736b206f6620612074657374  | "disk", "a disk of a test"
    0003e889045565a9  00000003  00000001  00000000  | NBD_REP_ACK
""")
ABORT = unhex("49484156454f5054  00000002  00000000  | NBD_OPT_ABORT")
ACK_ABORT = unhex("0003e889045565a9  00000002  00000001  00000000")

DISK = export_of(1 << 20)
CONTEXTS = (MetaContext(1, "base:allocation"),)
STRUCTURED = NbdSession(DISK, DISK.flags, structured=True, no_zeroes=True, meta_contexts=CONTEXTS)
SIMPLE = NbdSession(DISK, DISK.flags)


def test_a_server_negotiates_with_the_bytes_of_the_document() -> None:
    server = NbdServerHandshake([DISK])
    assert server.greeting() == GREETING
    assert server.feed(CLIENT_FLAGS) == b""
    assert server.feed(ASK_STRUCTURED) == ACK_STRUCTURED
    assert server.feed(ASK_LIST) == LIST_REPLIES
    assert server.feed(ASK_CONTEXT) == CONTEXT
    assert server.feed(ASK_GO) == GO_REPLIES
    assert server.session == STRUCTURED


def test_a_client_negotiates_with_the_bytes_of_the_document() -> None:
    client = NbdClientHandshake("disk")
    assert client.feed(GREETING) == CLIENT_FLAGS + ASK_STRUCTURED
    assert client.feed(ACK_STRUCTURED) == ASK_CONTEXT
    assert client.feed(CONTEXT) == ASK_GO
    assert client.feed(GO_REPLIES) == b""
    assert client.session is not None
    assert client.session.export == Export(
        "disk", 1 << 20, DISK.flags, "a disk of a test", BlockSizes(1, 4096, 32 << 20)
    )
    assert client.session.meta_contexts == CONTEXTS


def test_a_client_lists_and_leaves_with_the_bytes_of_the_document() -> None:
    client = NbdClientHandshake(goal=Goal.LIST)
    assert client.feed(GREETING) == CLIENT_FLAGS + ASK_LIST
    assert client.feed(LIST_REPLIES) == ABORT
    assert client.listed == [("disk", "a disk of a test")]


def test_a_server_lets_a_client_go_with_the_bytes_of_the_document() -> None:
    server = NbdServerHandshake([DISK])
    assert server.feed(CLIENT_FLAGS + ABORT) == ACK_ABORT
    assert server.wanted_bytes == 0
    assert server.session is None


def test_an_old_client_gets_size_flags_and_124_zeroes() -> None:
    server = NbdServerHandshake([DISK])
    answer = server.feed(unhex("00000000") + ASK_EXPORT_NAME)
    # NBD_FLAG_SEND_DF is clear without structured replies
    assert answer == unhex("0000000000100000  0d6d  00*124")


def test_requests_have_the_bytes_of_the_document() -> None:
    raw = unhex("""
        25609513  0001  0001        | NBD_REQUEST_MAGIC, NBD_CMD_FLAG_FUA, NBD_CMD_WRITE
        0102030405060708            | cookie
        0000000000010000  00001000  | offset 65536, length 4096
    """)
    request = NbdRequest(NBD_CMD_FLAG_FUA, NBD_CMD_WRITE, 0x0102030405060708, 65536, 4096)
    assert encode_request(request) == raw
    assert parse_request(raw) == parse_request(bytearray(raw)) == request
    assert request.payload_bytes == 4096


def test_simple_replies_have_the_bytes_of_the_document() -> None:
    client = NbdClientTransmission(SIMPLE)
    request = client.request(NBD_CMD_READ, 8, 4)
    head = unhex("67446698  00000000  0000000000000001  | NBD_SIMPLE_REPLY_MAGIC, error, cookie")
    assert reply.read_reply(SIMPLE, request.cookie, request.offset, request.length) == head
    assert joined(client.feed(head + b"data")) == [
        Data(1, 8, memoryview(b"data")),
        RequestDone(1, 0),
    ]
    request = client.request(NBD_CMD_READ, 8, 4)
    head = unhex("67446698  00000005  0000000000000002")
    assert reply.error_reply(SIMPLE, request, NBD_EIO, "not told") == head
    assert list(client.feed(head)) == [RequestFailed(2, NBD_EIO), RequestDone(2, NBD_EIO)]


def test_chunks_of_a_read_have_the_bytes_of_the_document() -> None:
    client = NbdClientTransmission(STRUCTURED)
    cookie = client.request(NBD_CMD_READ, 4096, 8192).cookie
    data = reply.data_chunk(cookie, 4096, 4096, done=False)
    assert data == unhex("""
        668e33ef  0000  0001        | NBD_STRUCTURED_REPLY_MAGIC, no flag, OFFSET_DATA
        0000000000000001  00001008  | cookie, 4104 bytes
        0000000000001000            | offset, then 4096 bytes of data
    """)
    hole = reply.hole_chunk(cookie, 8192, 4096, done=False)
    assert hole == unhex("""
        668e33ef  0000  0002  0000000000000001  0000000c  | OFFSET_HOLE, 12 bytes
        0000000000002000  00001000                        | offset, size
    """)
    none = reply.none_chunk(cookie)
    assert none == unhex("668e33ef  0001  0000  0000000000000001  00000000  | DONE, NONE")
    events = joined(client.feed(data + b"x" * 4096 + hole + none))
    assert events == [
        Data(1, 4096, memoryview(b"x" * 4096)),
        Hole(1, 8192, 4096),
        RequestDone(1, 0),
    ]


def test_error_chunks_have_the_bytes_of_the_document() -> None:
    client = NbdClientTransmission(STRUCTURED)
    cookie = client.request(NBD_CMD_READ, 0, 4096).cookie
    at_offset = reply.error_chunk(cookie, NBD_EIO, "bad", offset=512, done=False)
    assert at_offset == unhex("""
        668e33ef  0000  8002  0000000000000001  00000011  | ERROR_OFFSET, 17 bytes
        00000005  0003  626164  0000000000000200          | NBD_EIO, "bad", offset 512
    """)
    whole = reply.error_chunk(cookie, NBD_EIO)
    assert whole == unhex("""
        668e33ef  0001  8001  0000000000000001  00000006  | DONE, ERROR, 6 bytes
        00000005  0000                                    | NBD_EIO, no message
    """)
    assert list(client.feed(at_offset + whole)) == [
        RequestFailed(1, NBD_EIO, "bad", 512),
        RequestFailed(1, NBD_EIO),
        RequestDone(1, NBD_EIO),
    ]


def test_a_block_status_has_the_bytes_of_the_document() -> None:
    client = NbdClientTransmission(STRUCTURED)
    request = client.request(NBD_CMD_BLOCK_STATUS, 0, 1 << 20)
    raw = reply.status_reply(STRUCTURED, request, [(65536, 0), (983040, 3)])
    assert raw == unhex("""
        668e33ef  0001  0005  0000000000000001  00000014  | DONE, BLOCK_STATUS, 20 bytes
        00000001                                          | metadata context 1
        00010000  00000000                                | 64 KiB of data
        000f0000  00000003                                | the rest: HOLE, ZERO
    """)
    status, done = client.feed(raw)
    assert isinstance(status, Status)
    assert (status.context_id, status.offset) == (1, 0)
    assert list(status.extents()) == [(65536, 0), (983040, 3)]
    assert done == RequestDone(1, 0)
