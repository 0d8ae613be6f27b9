# SPDX-License-Identifier: Apache-2.0
"""The client's side of the transmission phase: requests out, replies in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    ERROR_NAMES,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FAST_ZERO,
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
    Bytes,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.events import Data, Done, Event, Hole, Payload
from vmapipe.protocol.nbd.intake import Intake
from vmapipe.protocol.nbd.limits import MAX_EXTENTS
from vmapipe.protocol.nbd.pending import Pending, extents_of_length, is_error_length_possible
from vmapipe.protocol.nbd.reply import (
    DATA_PAYLOAD,
    HOLE_PAYLOAD,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
)
from vmapipe.protocol.nbd.request import Request, encode_request
from vmapipe.protocol.nbd.session import Session

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

    def __init__(self, session: Session) -> None:
        self.session = session
        self._context_ids = frozenset(context.id for context in session.meta_contexts)
        self._pending: dict[int, Pending] = {}
        self._last_cookie = 0
        self._disconnected = False
        self._payload: Payload | None = None
        self._reading: Pending | None = None
        self._done = False
        self._head = b""
        self._intake = Intake(SIMPLE_REPLY.size)
        self._next: Callable[[bytes], list[Event]] = self._take_head

    # --- requests ---

    @property
    def in_flight(self) -> int:
        """How many requests are not answered yet."""
        return len(self._pending)

    def request(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0) -> Request:
        """A request under way from now on, NBD_CMD_ `kind` and `flags`; send it with `encode_request`.

        The data of NBD_CMD_WRITE follows it. Raises LocalProtocolError for
        what the session does not allow.
        """
        cookie = self._last_cookie + 1
        request = Request(flags, kind, cookie, offset, length)
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
        self._pending[cookie] = Pending(request)
        return request

    def disconnect(self) -> bytes:
        """NBD_CMD_DISC, the last thing to be sent; the answers that are due still come."""
        self._disconnected = True
        return encode_request(Request(0, NBD_CMD_DISC, 0, 0, 0))

    # --- replies ---

    @property
    def wanted_bytes(self) -> int:
        """So many bytes at least belong to the message that is being read."""
        return self._payload.length if self._payload else self._intake.missing_bytes

    @property
    def payload(self) -> Payload | None:
        """The export's data that comes next; as it is received, `length` shrinks."""
        return self._payload

    def took(self, count: int) -> list[Event]:
        """The caller has received `count` bytes of `payload` itself."""
        payload = self._payload
        if payload is None or not 0 <= count <= payload.length:
            raise LocalProtocolError(f"{count} bytes taken of {payload}")
        if count < payload.length:
            self._payload = Payload(payload.cookie, payload.offset + count, payload.length - count)
            return []
        self._payload = None
        return self._guarded(self._end_of_data, b"")

    def feed(self, data: Bytes) -> Iterator[Event]:
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

    def _guarded(self, take: Callable[[bytes], list[Event]], raw: bytes) -> list[Event]:
        """After a fault of the server nothing that it says is believed."""
        try:
            return take(raw)
        except NbdProtocolError:
            self._payload = None
            self._next = self._take_nothing
            self._intake.expect(0)
            raise

    def _take_nothing(self, _: bytes) -> list[Event]:
        raise LocalProtocolError("the server has broken the protocol: close the connection")

    def _take_head(self, raw: bytes) -> list[Event]:
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

    def _take_simple(self, cookie: int, error: int) -> list[Event]:
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

    def _take_chunk(self, raw: bytes) -> list[Event]:
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

    def _expect_payload(self, length: int, take: Callable[[bytes], list[Event]]) -> list[Event]:
        self._intake.expect(length)
        self._next = take
        return []

    def _take_status(self, payload: bytes) -> list[Event]:
        return [self._current().status(payload, self._context_ids), *self._end_of_message()]

    def _take_error(self, payload: bytes) -> list[Event]:
        failure = self._current().error_chunk(payload, with_offset=False)
        return [failure, *self._end_of_message()]

    def _take_error_offset(self, payload: bytes) -> list[Event]:
        failure = self._current().error_chunk(payload, with_offset=True)
        return [failure, *self._end_of_message()]

    def _end_of_data(self, _: bytes) -> list[Event]:
        return self._end_of_message()

    def _end_of_message(self) -> list[Event]:
        self._intake.expect(SIMPLE_REPLY.size)
        self._next = self._take_head
        if not self._done:
            return []
        done: Done = self._current().done(self._context_ids)
        del self._pending[done.cookie]
        return [done]

    def _find(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise NbdProtocolError(f"an answer to a request that is not under way ({cookie})")
        return pending

    def _current(self) -> Pending:
        if self._reading is None:
            raise RuntimeError("the end of a message without its beginning")
        return self._reading
