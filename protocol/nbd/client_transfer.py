# SPDX-License-Identifier: Apache-2.0
"""A client's transmission phase: requests under way, and what their replies may be.

A read's chunks come in any order and never overlap (proto.md, Structured reply types).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    ERROR_NAMES,
    MAX_CHUNKS,
    MAX_ERROR_CHUNK_BYTES,
    MAX_EXTENTS,
    MAX_STRING_BYTES,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_READ,
    NBD_CMD_WRITE_ZEROES,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_FLAG_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    NBD_SUCCESS,
    Bytes,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError, error_from_peer
from vmapipe.protocol.nbd.reply import (
    DATA_PAYLOAD,
    DESCRIPTOR,
    ERROR_OFFSET,
    ERROR_PAYLOAD,
    HOLE_PAYLOAD,
    SIMPLE_REPLY,
    STATUS_PAYLOAD,
    STRUCTURED_REPLY,
    Data,
    Hole,
    Payload,
    ReplyEvent,
    RequestDone,
    RequestFailed,
    Status,
)
from vmapipe.protocol.nbd.session import NbdRequest, NbdSession, ReceiveBuffer, encode_request


class AnsweredBytes:
    """Ranges of bytes, neighbours joined: chunks in order cost no memory."""

    def __init__(self) -> None:
        self.covered_bytes = 0
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, length: int) -> bool:
        """False, and nothing is added, when the range touches a byte that was there before."""
        starts, ends = self._starts, self._ends
        end = start + length
        at = bisect_right(starts, start)
        if (at and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            return False
        if at and ends[at - 1] == start:
            ends[at - 1] = end
        else:
            starts.insert(at, start)
            ends.insert(at, end)
            at += 1
        if at < len(starts) and starts[at] == end:
            ends[at - 1] = ends[at]
            del starts[at], ends[at]
        self.covered_bytes += length
        return True


class PendingRequest:
    """Every method raises NbdProtocolError for what the server must not answer to this request."""

    def __init__(self, request: NbdRequest) -> None:
        self.request = request
        self._error = NBD_SUCCESS
        self._chunks = 0
        self._contents = 0
        self._coverage = AnsweredBytes()
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

    def failure(self, error: int) -> RequestFailed:
        """A simple reply with an error."""
        error = error_from_peer(error)
        self._error = self._error or error
        return RequestFailed(self.request.cookie, error)

    def error_chunk(self, payload: bytes, *, with_offset: bool) -> RequestFailed:
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

    def done(self, context_ids: Collection[int]) -> RequestDone:
        """The last chunk has been seen; success is checked."""
        request = self.request
        if not self._error:
            covered = self._coverage.covered_bytes
            if request.type == NBD_CMD_READ and covered != request.length:
                raise self._wrong(f"success with {covered} bytes")
            if request.type == NBD_CMD_BLOCK_STATUS and len(self._contexts) != len(context_ids):
                raise self._wrong("success without a block status")
        return RequestDone(request.cookie, self._error)

    def _wrong(self, what: str) -> NbdProtocolError:
        return NbdProtocolError(f"the answer to {self.request} has {what}")


def is_error_length_possible(length: int) -> bool:
    """Return whether the payload of an error chunk may be so long."""
    return ERROR_PAYLOAD.size <= length <= MAX_ERROR_CHUNK_BYTES


def extents_of_length(length: int) -> int:
    """How many descriptors a block status payload of this length holds; 0: it is impossible."""
    count, rest = divmod(length - STATUS_PAYLOAD.size, DESCRIPTOR.size)
    return 0 if rest else max(count, 0)


# A structured reply is longer than a simple one, and the first 16 bytes tell
# its type: what follows for certain is taken in one piece.
_TAIL_BYTES = STRUCTURED_REPLY.size - SIMPLE_REPLY.size
_FIXED_PAYLOADS = {
    NBD_REPLY_TYPE_OFFSET_DATA: DATA_PAYLOAD.size,
    NBD_REPLY_TYPE_OFFSET_HOLE: HOLE_PAYLOAD.size,
}
_BOUNDED = frozenset({NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES})


class NbdClientTransmission:
    """Send what `request` returns; feed what comes, and look at the events.

    The data of reads need not pass through here: while `payload` is there, so
    many bytes may be received elsewhere, and `took` told of them.

    One thread may call `request` while another one feeds.
    """

    def __init__(self, session: NbdSession) -> None:
        self.session = session
        self._context_ids = frozenset(context.id for context in session.meta_contexts)
        self._pending: dict[int, PendingRequest] = {}
        self._last_cookie = 0
        self._disconnected = False
        self._payload: Payload | None = None
        self._reading: PendingRequest | None = None
        self._done = False
        self._head = b""
        self._intake = ReceiveBuffer(SIMPLE_REPLY.size)
        self._next: Callable[[bytes], list[ReplyEvent]] = self._take_head

    # --- requests ---

    @property
    def in_flight(self) -> int:
        """How many requests are not answered yet."""
        return len(self._pending)

    def request(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0) -> NbdRequest:
        """A request under way from now on, NBD_CMD_ `kind` and `flags`; send it with `encode_request`.

        The data of NBD_CMD_WRITE follows it. Raises LocalProtocolError for
        what the session does not allow.
        """
        cookie = self._last_cookie + 1
        request = NbdRequest(flags, kind, cookie, offset, length)
        error = self.session.fault_of(request)
        if error:
            raise LocalProtocolError(f"{request} would be answered {ERROR_NAMES[error]}")
        # proto.md, Block size constraints: this is asked of clients.
        too_long = kind in _BOUNDED and length > self.session.export.block_sizes.maximum
        if too_long and not flags & NBD_CMD_FLAG_FAST_ZERO:
            raise LocalProtocolError(f"{request} is longer than the server's maximum")
        if kind == NBD_CMD_DISC or self._disconnected:
            raise LocalProtocolError(f"{request}, but `disconnect` comes last")
        self._last_cookie = cookie
        self._pending[cookie] = PendingRequest(request)
        return request

    def disconnect(self) -> bytes:
        """NBD_CMD_DISC, the last thing to be sent; the answers that are due still come."""
        self._disconnected = True
        return encode_request(NbdRequest(0, NBD_CMD_DISC, 0, 0, 0))

    # --- replies ---

    @property
    def wanted_bytes(self) -> int:
        """So many bytes at least belong to the message that is being read."""
        return self._payload.length if self._payload else self._intake.missing_bytes

    @property
    def payload(self) -> Payload | None:
        """The export's data that comes next; as it is received, `length` shrinks."""
        return self._payload

    def took(self, count: int) -> list[ReplyEvent]:
        """The caller has received `count` bytes of `payload` itself."""
        payload = self._payload
        if payload is None or not 0 <= count <= payload.length:
            raise LocalProtocolError(f"{count} bytes taken of {payload}")
        if count < payload.length:
            self._payload = Payload(payload.cookie, payload.offset + count, payload.length - count)
            return []
        self._payload = None
        return self._guarded(self._end_of_data, b"")

    def feed(self, data: Bytes) -> Iterator[ReplyEvent]:
        """Take bytes as they come, cut anywhere; yields what they tell: exhaust it.

        Raises NbdProtocolError, after the events that came before. `Data` are
        views of `data`.
        """
        rest = memoryview(data)
        while True:
            if self._payload:
                if not rest:
                    return
                piece = rest[: self._payload.length]
                rest = rest[len(piece) :]
                yield Data(self._payload.cookie, self._payload.offset, piece)
                yield from self.took(len(piece))
                continue
            rest = self._intake.add(rest)
            if self._intake.missing_bytes:
                return
            yield from self._guarded(self._next, self._intake.take())

    def _guarded(self, take: Callable[[bytes], list[ReplyEvent]], raw: bytes) -> list[ReplyEvent]:
        """After a fault of the server nothing that it says is believed."""
        try:
            return take(raw)
        except NbdProtocolError:
            self._payload = None
            self._next = self._take_nothing
            self._intake.expect(0)
            raise

    def _take_nothing(self, _: bytes) -> list[ReplyEvent]:
        raise LocalProtocolError("the server has broken the protocol: close the connection")

    def _take_head(self, raw: bytes) -> list[ReplyEvent]:
        """The first 16 bytes of a reply of either kind."""
        magic, error, cookie = SIMPLE_REPLY.unpack(raw)
        if magic == NBD_SIMPLE_REPLY_MAGIC:
            return self._take_simple(cookie, error)
        if magic != NBD_STRUCTURED_REPLY_MAGIC or not self.session.structured:
            raise NbdProtocolError(f"no reply where one must be (magic {magic:#x})")
        self._head = raw
        kind = error & 0xFFFF
        self._intake.expect(_TAIL_BYTES + _FIXED_PAYLOADS.get(kind, 0))
        self._next = self._take_chunk
        return []

    def _take_simple(self, cookie: int, error: int) -> list[ReplyEvent]:
        self._reading = pending = self._find(cookie)
        request = pending.request
        self._done = True
        if error:
            return [pending.failure(error), *self._end_of_message()]
        if request.type == NBD_CMD_READ and not self.session.structured:
            pending.content(request.offset, request.length)
            self._payload = Payload(cookie, request.offset, request.length)
            return []
        if request.type in (NBD_CMD_READ, NBD_CMD_BLOCK_STATUS):
            raise NbdProtocolError(f"a simple reply to {request}")
        return self._end_of_message()

    def _take_chunk(self, raw: bytes) -> list[ReplyEvent]:
        """The whole header of a chunk, with what is fixed of its payload."""
        raw = self._head + raw
        _, flags, kind, cookie, length = STRUCTURED_REPLY.unpack_from(raw)
        self._reading = pending = self._find(cookie)
        pending.count_chunk()
        self._done = bool(flags & NBD_REPLY_FLAG_DONE)
        fixed = raw[STRUCTURED_REPLY.size :]
        if kind == NBD_REPLY_TYPE_OFFSET_DATA and length > DATA_PAYLOAD.size:
            (offset,) = DATA_PAYLOAD.unpack(fixed)
            pending.content(offset, length - DATA_PAYLOAD.size)
            self._payload = Payload(cookie, offset, length - DATA_PAYLOAD.size)
            return []
        if kind == NBD_REPLY_TYPE_OFFSET_HOLE and length == HOLE_PAYLOAD.size:
            offset, hole_bytes = HOLE_PAYLOAD.unpack(fixed)
            pending.content(offset, hole_bytes)
            return [Hole(cookie, offset, hole_bytes), *self._end_of_message()]
        if kind == NBD_REPLY_TYPE_NONE and not length and self._done:
            return self._end_of_message()
        if kind == NBD_REPLY_TYPE_BLOCK_STATUS and 0 < extents_of_length(length) <= MAX_EXTENTS:
            return self._expect_payload(length, self._take_status)
        if kind & NBD_REPLY_TYPE_FLAG_ERROR and is_error_length_possible(length):
            with_offset = kind == NBD_REPLY_TYPE_ERROR_OFFSET
            take = self._take_error_offset if with_offset else self._take_error
            return self._expect_payload(length, take)
        raise NbdProtocolError(f"a chunk of type {kind:#x} with {length} bytes, flags {flags:#x}")

    def _expect_payload(
        self, length: int, take: Callable[[bytes], list[ReplyEvent]]
    ) -> list[ReplyEvent]:
        self._intake.expect(length)
        self._next = take
        return []

    def _take_status(self, payload: bytes) -> list[ReplyEvent]:
        return [self._current().status(payload, self._context_ids), *self._end_of_message()]

    def _take_error(self, payload: bytes) -> list[ReplyEvent]:
        failure = self._current().error_chunk(payload, with_offset=False)
        return [failure, *self._end_of_message()]

    def _take_error_offset(self, payload: bytes) -> list[ReplyEvent]:
        failure = self._current().error_chunk(payload, with_offset=True)
        return [failure, *self._end_of_message()]

    def _end_of_data(self, _: bytes) -> list[ReplyEvent]:
        return self._end_of_message()

    def _end_of_message(self) -> list[ReplyEvent]:
        self._intake.expect(SIMPLE_REPLY.size)
        self._next = self._take_head
        if not self._done:
            return []
        done: RequestDone = self._current().done(self._context_ids)
        del self._pending[done.cookie]
        return [done]

    def _find(self, cookie: int) -> PendingRequest:
        pending = self._pending.get(cookie)
        if pending is None:
            raise NbdProtocolError(f"an answer to a request that is not under way ({cookie})")
        return pending

    def _current(self) -> PendingRequest:
        if self._reading is None:
            raise RuntimeError("the end of a message without its beginning")
        return self._reading
