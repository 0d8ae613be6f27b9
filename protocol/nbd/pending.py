# SPDX-License-Identifier: Apache-2.0
"""A request under way, and what its chunks may be (proto.md, Structured reply types)."""

from __future__ import annotations

from collections.abc import Collection

from vmapipe.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_READ,
    NBD_SUCCESS,
)
from vmapipe.protocol.nbd.coverage import Coverage
from vmapipe.protocol.nbd.errors import NbdProtocolError, error_from_peer
from vmapipe.protocol.nbd.events import Done, Failure, Status
from vmapipe.protocol.nbd.limits import MAX_CHUNKS, MAX_ERROR_CHUNK_BYTES, MAX_STRING_BYTES
from vmapipe.protocol.nbd.reply import DESCRIPTOR, ERROR_OFFSET, ERROR_PAYLOAD, STATUS_PAYLOAD
from vmapipe.protocol.nbd.request import Request


class Pending:
    """Every method raises NbdProtocolError for what the server must not answer to this request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._error = NBD_SUCCESS
        self._chunks = 0
        self._contents = 0
        self._coverage = Coverage()
        self._contexts: set[int] = set()

    def count_chunk(self) -> None:
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise self._wrong(f"more than {MAX_CHUNKS} chunks")

    def content(self, offset: int, length: int) -> None:
        """A chunk with data, or a hole."""
        request = self.request
        if request.type != NBD_CMD_READ:
            raise self._wrong("a chunk of data")
        end = request.offset + request.length
        if not (length and request.offset <= offset and offset + length <= end):
            raise self._wrong(f"{length} bytes at {offset}")
        self._contents += 1
        if self._contents > 1 and request.flags & NBD_CMD_FLAG_DF:
            raise self._wrong("a second chunk of data")
        if not self._coverage.add(offset, length):
            raise self._wrong(f"a second time {length} bytes at {offset}")

    def status(self, payload: bytes, context_ids: Collection[int]) -> Status:
        """A block status chunk, whose payload is a context's id and at least one descriptor."""
        request = self.request
        if request.type != NBD_CMD_BLOCK_STATUS:
            raise self._wrong("a block status")
        (context_id,) = STATUS_PAYLOAD.unpack_from(payload)
        if context_id not in context_ids:
            raise self._wrong(f"an unknown metadata context {context_id}")
        if context_id in self._contexts:
            raise self._wrong(f"metadata context {context_id} a second time")
        self._contexts.add(context_id)
        status = Status(request.cookie, context_id, request.offset, payload[STATUS_PAYLOAD.size :])
        self._check_extents(status)
        return status

    def _check_extents(self, status: Status) -> None:
        """Each has a length, and only the last one ends after the request."""
        request = self.request
        total = before_last = 0
        for length, _ in status.extents():
            before_last = total
            total += length
            if not length or before_last >= request.length:
                raise self._wrong("an extent that is empty or beyond the request")
        one = request.flags & NBD_CMD_FLAG_REQ_ONE
        if one and (before_last or total > request.length):
            raise self._wrong("more than the one extent that was asked for")

    def failure(self, error: int) -> Failure:
        """A simple reply with an error."""
        error = error_from_peer(error)
        self._error = self._error or error
        return Failure(self.request.cookie, error)

    def error_chunk(self, payload: bytes, *, with_offset: bool) -> Failure:
        """An error chunk of known or unknown type; its payload was limited before."""
        request = self.request
        error, length = ERROR_PAYLOAD.unpack_from(payload)
        end = ERROR_PAYLOAD.size + length
        if not error or length > MAX_STRING_BYTES or end > len(payload):
            raise self._wrong("an error chunk with wrong contents")
        offset = None
        if with_offset:
            if len(payload) != end + ERROR_OFFSET.size:
                raise self._wrong("an error chunk of the wrong length")
            (offset,) = ERROR_OFFSET.unpack_from(payload, end)
            if not request.offset <= offset < request.offset + request.length:
                raise self._wrong(f"an error at {offset}")
        message = payload[ERROR_PAYLOAD.size : end].decode(errors="replace")
        return self.failure(error)._replace(message=message, offset=offset)

    def done(self, context_ids: Collection[int]) -> Done:
        """The last chunk has been seen; success is checked."""
        request = self.request
        if not self._error:
            covered = self._coverage.covered_bytes
            if request.type == NBD_CMD_READ and covered != request.length:
                raise self._wrong(f"success with {covered} bytes")
            if request.type == NBD_CMD_BLOCK_STATUS and len(self._contexts) != len(context_ids):
                raise self._wrong("success without a block status")
        return Done(request.cookie, self._error)

    def _wrong(self, what: str) -> NbdProtocolError:
        return NbdProtocolError(f"the answer to {self.request} has {what}")


def is_error_length_possible(length: int) -> bool:
    """Whether the payload of an error chunk may be so long."""
    return ERROR_PAYLOAD.size <= length <= MAX_ERROR_CHUNK_BYTES


def extents_of_length(length: int) -> int:
    """How many descriptors a block status payload of this length holds; 0: it is impossible."""
    count, rest = divmod(length - STATUS_PAYLOAD.size, DESCRIPTOR.size)
    return 0 if rest else max(count, 0)
