# SPDX-License-Identifier: Apache-2.0
"""Replies to requests: as bytes (server), and as the events that a client sees.

See proto.md: Structured reply types. Every event begins with the request's cookie.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    MAX_EXTENTS_SENT,
    MAX_STRING_BYTES,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    NBD_SUCCESS,
)
from vmapipe.protocol.nbd.session import NbdRequest, NbdSession


class Data(NamedTuple):
    """Bytes of the export at `offset`, as far as they were fed: one chunk may come as several."""

    cookie: int
    offset: int
    data: memoryview


class Hole(NamedTuple):
    """`length` bytes at `offset` are zeroes."""

    cookie: int
    offset: int
    length: int


class Status(NamedTuple):
    """Consecutive extents from `offset` on, of one metadata context."""

    cookie: int
    context_id: int
    offset: int
    descriptors: bytes

    def extents(self) -> Iterator[tuple[int, int]]:
        """Length in bytes and flags (NBD_STATE_ for base:allocation) of each.

        They may end before the request does, and the last one after it.
        """
        return DESCRIPTOR.iter_unpack(self.descriptors)


class RequestFailed(NamedTuple):
    """The request fails, with an NBD_E number; at `offset`, if the server says where.

    The request still ends with `Done`.
    """

    cookie: int
    error: int
    message: str = ""
    offset: int | None = None


class RequestDone(NamedTuple):
    """The request is answered: NBD_SUCCESS, or the first error."""

    cookie: int
    error: int


ReplyEvent = Data | Hole | Status | RequestFailed | RequestDone


class Payload(NamedTuple):
    """The next `length` bytes on the wire are the export's at `offset`."""

    cookie: int
    offset: int
    length: int


# magic, error, cookie
SIMPLE_REPLY = struct.Struct(">IIQ")
# magic, flags, type, cookie, length of the payload
STRUCTURED_REPLY = struct.Struct(">IHHQI")
# The payloads of chunks, or their beginnings.
DATA_PAYLOAD = struct.Struct(">Q")  # offset
HOLE_PAYLOAD = struct.Struct(">QI")  # offset, length
ERROR_PAYLOAD = struct.Struct(">IH")  # error, length of the message
ERROR_OFFSET = struct.Struct(">Q")
STATUS_PAYLOAD = struct.Struct(">I")  # metadata context id
DESCRIPTOR = struct.Struct(">II")  # length, status flags

_DATA_CHUNK = struct.Struct(">IHHQIQ")

# --- Answers that fit what the session has settled ---


def read_reply(session: NbdSession, cookie: int, offset: int, length: int) -> bytes:
    """Return the bytes before the whole data of an NBD_CMD_READ, `length` bytes."""
    if session.structured:
        return data_chunk(cookie, offset, length)
    return simple_reply(cookie)


def status_reply(
    session: NbdSession, request: NbdRequest, extents: Iterable[tuple[int, int]]
) -> bytes:
    """The answer to NBD_CMD_BLOCK_STATUS, of the one context that is known here.

    `extents`: length in bytes and NBD_STATE_ flags of each part of the export
    from `request.offset` on. They are read only as far as the answer needs
    them: to the request's end, the first with NBD_CMD_FLAG_REQ_ONE.
    """
    context_id = session.allocation_id
    if context_id is None:
        raise LocalProtocolError("base:allocation was not selected")
    limit = 1 if request.flags & NBD_CMD_FLAG_REQ_ONE else MAX_EXTENTS_SENT
    return status_chunk(request.cookie, context_id, _merged(extents, request.length, limit))


def success_reply(request: NbdRequest) -> bytes:
    """Done. For all commands but NBD_CMD_READ and NBD_CMD_BLOCK_STATUS, in every session."""
    return simple_reply(request.cookie)


def error_reply(session: NbdSession, request: NbdRequest, error: int, message: str = "") -> bytes:
    """The command failed: `error` is an NBD_E number, `message` is for people."""
    if session.structured:
        return error_chunk(request.cookie, error, message)
    return simple_reply(request.cookie, _failing(error))


# --- The messages ---


def simple_reply(cookie: int, error: int = NBD_SUCCESS) -> bytes:
    """16 bytes; the data of a successful NBD_CMD_READ follows when replies are not structured."""
    return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)


def data_chunk(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    """NBD_REPLY_TYPE_OFFSET_DATA: 28 bytes, `length` bytes of data follow.

    `done`: the last chunk of the reply. Once these bytes are sent, a failure to
    read can only be told in a later chunk: not with `done`.
    """
    if length < 1:
        raise LocalProtocolError("a chunk of data holds at least one byte")
    return _DATA_CHUNK.pack(
        NBD_STRUCTURED_REPLY_MAGIC,
        done,
        NBD_REPLY_TYPE_OFFSET_DATA,
        cookie,
        DATA_PAYLOAD.size + length,
        offset,
    )


def hole_chunk(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    """NBD_REPLY_TYPE_OFFSET_HOLE: these bytes of an NBD_CMD_READ are zeroes, and not sent."""
    if length < 1:
        raise LocalProtocolError("a hole has at least one byte")
    return _chunk(NBD_REPLY_TYPE_OFFSET_HOLE, cookie, HOLE_PAYLOAD.pack(offset, length), done)


def none_chunk(cookie: int) -> bytes:
    """NBD_REPLY_TYPE_NONE: the end of a reply whose last chunk was not `done`."""
    return _chunk(NBD_REPLY_TYPE_NONE, cookie, b"", done=True)


def status_chunk(
    cookie: int, context_id: int, extents: Iterable[tuple[int, int]], *, done: bool = True
) -> bytes:
    """NBD_REPLY_TYPE_BLOCK_STATUS: lengths in bytes and flags of consecutive extents."""
    descriptors = b"".join(DESCRIPTOR.pack(length, flags) for length, flags in extents)
    if not descriptors:
        raise LocalProtocolError("a block status has at least one extent")
    payload = STATUS_PAYLOAD.pack(context_id) + descriptors
    return _chunk(NBD_REPLY_TYPE_BLOCK_STATUS, cookie, payload, done)


def error_chunk(
    cookie: int, error: int, message: str = "", *, offset: int | None = None, done: bool = True
) -> bytes:
    """NBD_REPLY_TYPE_ERROR, or NBD_REPLY_TYPE_ERROR_OFFSET if it is known where it happened.

    A message that is too long is cut.
    """
    text = message.encode(errors="replace")[:MAX_STRING_BYTES]
    text = text.decode(errors="ignore").encode()  # whole characters
    payload = ERROR_PAYLOAD.pack(_failing(error), len(text)) + text
    if offset is None:
        return _chunk(NBD_REPLY_TYPE_ERROR, cookie, payload, done)
    payload += ERROR_OFFSET.pack(offset)
    return _chunk(NBD_REPLY_TYPE_ERROR_OFFSET, cookie, payload, done)


def _chunk(kind: int, cookie: int, payload: bytes, done: bool) -> bytes:
    flags = NBD_REPLY_FLAG_DONE if done else 0
    head = STRUCTURED_REPLY.pack(NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload))
    return head + payload


def _failing(error: int) -> int:
    if error == NBD_SUCCESS:
        raise LocalProtocolError("an error must have a number")
    return error


def _merged(
    extents: Iterable[tuple[int, int]], total_bytes: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Neighbours with equal flags become one; at most `limit` extents of `total_bytes` together."""
    held_bytes = held_flags = given = 0
    left_bytes = total_bytes
    for length, flags in extents:
        taken = min(length, left_bytes)
        if held_bytes and flags != held_flags:
            yield held_bytes, held_flags
            given += 1
            held_bytes = 0
            if given == limit:
                return
        held_bytes += taken
        held_flags = flags
        left_bytes -= taken
        if not left_bytes:
            break
    if held_bytes:
        yield held_bytes, held_flags
