# SPDX-License-Identifier: Apache-2.0
"""A disk in memory that answers NBD requests: what the tests put behind the server's codec."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from vmapipe.protocol.nbd import reply
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_FLAG_DF,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_STATE_HOLE,
    NBD_STATE_ZERO,
    Bytes,
)
from vmapipe.protocol.nbd.session import BlockSizes, Export, NbdRequest, NbdSession

ALL_FLAGS = (
    NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_FAST_ZERO
    | NBD_FLAG_SEND_CACHE
    | NBD_FLAG_SEND_DF
    | NBD_FLAG_CAN_MULTI_CONN
)
BLOCK_BYTES = 4096
_ZERO_BLOCK = bytes(BLOCK_BYTES)


def export_of(size_bytes: int, name: str = "disk", flags: int = ALL_FLAGS) -> Export:
    return Export(name, size_bytes, flags, "a disk of a test", BlockSizes(), allocation=True)


class Disk:
    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        #: Every request that came, in order, for tests that want to know.
        self.seen: list[NbdRequest] = []
        self._lock = threading.Lock()

    def answer(self, session: NbdSession, request: NbdRequest, payload: Bytes = b"") -> list[Bytes]:
        """What to send: a head, and the data where there is some."""
        with self._lock:
            self.seen.append(request)
            error = session.fault_of(request)
            if error:
                return [reply.error_reply(session, request, error, "the test's server says no")]
            return self._carry_out(session, request, payload)

    def _carry_out(self, session: NbdSession, request: NbdRequest, payload: Bytes) -> list[Bytes]:
        start, end = request.offset, request.offset + request.length
        match request.type:
            case kind if kind == NBD_CMD_READ:
                return list(self._read(session, request))
            case kind if kind == NBD_CMD_WRITE:
                self.content[start:end] = payload
            case kind if kind in (NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM):
                self.content[start:end] = bytes(request.length)
            case kind if kind == NBD_CMD_BLOCK_STATUS:
                extents = (
                    (length, NBD_STATE_HOLE | NBD_STATE_ZERO if zero else 0)
                    for _, length, zero in self._extents(start, request.length)
                )
                return [reply.status_reply(session, request, extents)]
            case _:
                pass  # NBD_CMD_FLUSH, NBD_CMD_CACHE
        return [reply.success_reply(request)]

    def _read(self, session: NbdSession, request: NbdRequest) -> Iterator[Bytes]:
        data = bytes(self.content[request.offset : request.offset + request.length])
        if not session.structured or request.flags & NBD_CMD_FLAG_DF:
            yield reply.read_reply(session, request.cookie, request.offset, request.length)
            yield data
            return
        for offset, length, zero in self._extents(request.offset, request.length):
            if zero:
                yield reply.hole_chunk(request.cookie, offset, length, done=False)
            else:
                yield reply.data_chunk(request.cookie, offset, length, done=False)
                yield data[offset - request.offset :][:length]
        yield reply.none_chunk(request.cookie)

    def _extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Offset, length, and whether it is all zero, by blocks."""
        end = offset + length
        while offset < end:
            block_end = min(end, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)
            block = self.content[offset:block_end]
            yield offset, len(block), block == _ZERO_BLOCK[: len(block)]
            offset = block_end
