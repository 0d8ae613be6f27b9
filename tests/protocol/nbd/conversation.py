# SPDX-License-Identifier: Apache-2.0
"""Both ends of a connection without a network between them, and what else several tests use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from hypothesis import strategies as st

from tests.protocol.nbd.disk import Disk
from vmapipe.protocol.nbd.client_handshake import NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.constants import NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, Bytes
from vmapipe.protocol.nbd.handshake import CLIENT_FLAGS, OPTION_REPLY
from vmapipe.protocol.nbd.reply import Data, ReplyEvent
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import (
    REQUEST_BYTES,
    NbdRequest,
    NbdSession,
    encode_request,
    parse_request,
)

FIXED = CLIENT_FLAGS.pack(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)


def unhex(text: str) -> bytes:
    """Hex digits with blanks; `|` begins a comment; `00*124` is a byte so many times."""
    text = re.sub(r"\|.*", "", text)
    out = b""
    for token in text.split():
        digits, _, times = token.partition("*")
        out += bytes.fromhex(digits) * int(times or 1)
    return out


def shake_hands(server: NbdServerHandshake, client: NbdClientHandshake) -> None:
    """Until the client is content."""
    to_client = server.greeting()
    while client.wanted_bytes:
        to_server = client.feed(to_client)
        to_client = server.feed(to_server) if to_server and server.wanted_bytes else b""
        if client.wanted_bytes and not to_client:
            client.eof()


def read_replies(raw: bytes) -> list[tuple[int, int, bytes]]:
    """Option replies as (option, reply type, data)."""
    replies = []
    while raw:
        _, option, kind, length = OPTION_REPLY.unpack_from(raw)
        end = OPTION_REPLY.size + length
        replies.append((option, kind, raw[OPTION_REPLY.size : end]))
        raw = raw[end:]
    return replies


def carry_out(
    client: NbdClientTransmission,
    server: NbdSession,
    disk: Disk,
    request: NbdRequest,
    data: Bytes = b"",
) -> list[ReplyEvent]:
    """One request there and back; the bytes of the data joined."""
    parsed = parse_request(encode_request(request))
    assert parsed == request
    parts = disk.answer(server, parsed, data)
    return joined(client.feed(b"".join(parts)))


def serve_stream(session: NbdSession, disk: Disk, raw: bytes) -> bytes:
    """What a server sends for a stream of whole requests."""
    out = b""
    while raw:
        request = parse_request(raw[:REQUEST_BYTES])
        end = REQUEST_BYTES + request.payload_bytes
        out += b"".join(disk.answer(session, request, raw[REQUEST_BYTES:end]))
        raw = raw[end:]
    return out


def joined(events: Iterable[ReplyEvent]) -> list[ReplyEvent]:
    """Pieces of data that continue each other become one; how the bytes were cut is forgotten."""
    out: list[ReplyEvent] = []
    for event in events:
        before = out[-1] if out else None
        if not isinstance(event, Data):
            out.append(event)
        elif (
            isinstance(before, Data)
            and before.cookie == event.cookie
            and before.offset + len(before.data) == event.offset
        ):
            out[-1] = before._replace(data=memoryview(bytes(before.data) + bytes(event.data)))
        else:
            out.append(event._replace(data=memoryview(bytes(event.data))))
    return out


def pieces(raw: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """`raw` in pieces, cut at these places."""
    at = 0
    for cut in sorted(cut for cut in cuts if cut < len(raw)):
        yield raw[at:cut]
        at = cut
    yield raw[at:]


def cuts_of(total: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, max(total, 1)), max_size=12)
