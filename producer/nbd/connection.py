# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one connection.

What can be done at once is done where it is read, many requests to a system
call; whatever may wait (an uncached read, a flush, a write whose old data has
to be saved first) goes to a thread of its own, so that nothing waits behind it.
"""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Sequence

from vmapipe.producer.nbd.backend import Backend
from vmapipe.producer.nbd.workers import Budget, Workers
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_SUCCESS,
    Bytes,
)
from vmapipe.protocol.nbd.errors import error_of_errno
from vmapipe.protocol.nbd.reply import error_reply, read_reply, status_reply, success_reply
from vmapipe.protocol.nbd.request import REQUEST_BYTES, Request, parse_request
from vmapipe.protocol.nbd.session import Session
from vmapipe.runtime.errors import os_error_text

# One megabyte is what most clients send at most; larger writes get memory of their own.
_BUFFER_BYTES = (1 << 20) + (64 << 10)
# Requests in other threads, a connection: QEMU has at most 16 under way. Memory
# for their data: two of the largest.
_MAX_REQUESTS = 64
_MAX_REQUEST_BYTES = 64 << 20
# sendmsg takes 1024 pieces (IOV_MAX).
_MAX_PIECES = 1000
# The client goes on with these while we go on with the rest: of 1, 4, 6, 8 and
# all, 6 gave the most operations a second. So many small writes are carried out together.
_REPLIES_AT_ONCE = 6
# How long a connection polls for its next request. QEMU's own threads poll 32 us
# (poll-max-ns); here the answers of others take longer on a busy host, and a
# sleep that is begun too early costs two of them: 200 us took 4K writes at queue
# depth 1 from 0.86 to 1.15 times nbdkit's rate.
_POLL_NS = 200_000


class Connection:
    """Serves until the client leaves. `stop` ends it from another thread."""

    def __init__(
        self, sock: socket.socket, session: Session, backend: Backend, workers: Workers
    ) -> None:
        self._socket = sock
        self._session = session
        self._backend = backend
        self._workers = workers
        self._budget = Budget(_MAX_REQUESTS, _MAX_REQUEST_BYTES)
        self._sending = threading.Lock()
        # Replies of the connection's own thread, and the memory of their data.
        self._replies: list[Bytes] = []
        self._scratch = memoryview(bytearray(_BUFFER_BYTES))
        self._scratch_used = 0
        # Writes that were read and not yet carried out; their data is where it was read.
        self._writes: list[tuple[Request, memoryview]] = []
        self._polls = False

    def serve(self, unread: bytes = b"") -> None:
        """Raises NbdProtocolError, OSError. All that was begun has ended when it returns."""
        try:
            try:
                self._serve(unread)
            finally:
                self._carry_out_writes()  # those in front of what ended it
        finally:
            self._backend.settle(idle=True)
            self._budget.wait_idle()

    def stop(self) -> None:
        """No further request is taken; those that were are answered."""
        try:
            self._socket.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # it has ended already

    def _serve(self, unread: bytes) -> None:
        view = memoryview(bytearray(_BUFFER_BYTES))
        view[: len(unread)] = unread
        start, end = 0, len(unread)
        while True:
            wanted = REQUEST_BYTES
            while end - start >= REQUEST_BYTES:
                request = parse_request(view[start : start + REQUEST_BYTES])
                if request.type == NBD_CMD_DISC:
                    self._send_replies()
                    return
                wanted = REQUEST_BYTES + request.payload_bytes
                if end - start < wanted:
                    break
                self._take(request, view[start + REQUEST_BYTES : start + wanted])
                start += wanted
                if len(self._writes) + len(self._replies) >= _REPLIES_AT_ONCE:
                    self._send_replies()
                wanted = REQUEST_BYTES
            self._send_replies()
            if wanted > _BUFFER_BYTES:
                payload = self._large_payload(view[start + REQUEST_BYTES : end], wanted)
                if payload is None:
                    return
                self._take(parse_request(view[start : start + REQUEST_BYTES]), payload)
                start = end = 0
                continue
            if start:
                view[: end - start] = view[start:end]
                start, end = 0, end - start
            # All of a payload, but no more when it is large: what follows would have to move.
            most = wanted if wanted > _BUFFER_BYTES // 2 else _BUFFER_BYTES
            got = self._receive(view[end:most])
            if not got:
                return
            end += got

    def _receive(self, target: memoryview) -> int:
        """Wait for more. Polls first while requests follow closely, as QEMU's own threads do.

        Going to sleep and being woken takes longer than most requests.
        """
        started = time.perf_counter_ns()
        if self._polls:
            until = started + _POLL_NS
            while time.perf_counter_ns() < until:
                try:
                    return self._socket.recv_into(target, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    pass
        self._backend.settle(idle=True)
        got = self._socket.recv_into(target)
        self._polls = time.perf_counter_ns() - started < _POLL_NS
        return got

    def _large_payload(self, begun: memoryview, wanted: int) -> memoryview | None:
        """A write's data that the buffer cannot hold; None: the client is gone."""
        payload = memoryview(bytearray(wanted - REQUEST_BYTES))
        payload[: len(begun)] = begun
        rest = payload[len(begun) :]
        while rest:
            got = self._socket.recv_into(rest)
            if not got:
                return None
            rest = rest[got:]
        return payload

    def _take(self, request: Request, payload: memoryview) -> None:
        """Answer it, or put it with the writes that are carried out before anything else."""
        error = self._session.fault_of(request)
        is_plain = request.type == NBD_CMD_WRITE and not request.flags & NBD_CMD_FLAG_FUA
        if is_plain and error == NBD_SUCCESS:
            self._writes.append((request, payload))
            return
        self._carry_out_writes()
        if error != NBD_SUCCESS:
            self._replies.append(error_reply(self._session, request, error))
            return
        try:
            if self._try_at_once(request):
                return
        except OSError as failure:
            self._replies.append(self._failed(request, failure))
            return
        self._hand_over(request, payload)

    def _carry_out_writes(self) -> None:
        writes, self._writes = self._writes, []
        while writes:
            outcomes = self._backend.try_writes([(data, r.offset) for r, data in writes])
            for (request, _), failure in zip(writes, outcomes, strict=False):
                self._replies.append(
                    success_reply(request) if failure is None else self._failed(request, failure)
                )
            tried = len(outcomes)
            if tried < len(writes):
                self._hand_over(*writes[tried])
            writes = writes[tried + 1 :]

    def _hand_over(self, request: Request, payload: memoryview) -> None:
        """It may take long: to a thread of the workers."""
        size = request.length if request.type in (NBD_CMD_READ, NBD_CMD_WRITE) else 0
        if not self._budget.fits(size):
            self._send_replies()
        self._budget.take(size)
        # The buffer is used again: what waits has its own copy.
        work = functools.partial(self._carry_out, request, bytes(payload), size)
        self._workers.submit(work)

    def _try_at_once(self, request: Request) -> bool:
        """Whether it is a read, or zeroes, and could be answered at once."""
        if request.type == NBD_CMD_WRITE_ZEROES and not request.flags & ~NBD_CMD_FLAG_NO_HOLE:
            if not self._backend.try_zeroes(request.offset, request.length):
                return False
            self._replies.append(success_reply(request))
            return True
        if request.type == NBD_CMD_READ and request.length <= _BUFFER_BYTES:
            if self._scratch_used + request.length > _BUFFER_BYTES:
                self._send_replies()
            at = self._scratch_used
            target = self._scratch[at : at + request.length]
            if not self._backend.try_read(target, request.offset):
                return False
            self._scratch_used += request.length
            self._replies += (read_reply(self._session, request), target)
            return True
        return False

    def _carry_out(self, request: Request, payload: bytes, size: int) -> None:
        """In a thread of the workers."""
        answered = False
        try:
            try:
                reply = self._do(request, payload)
            except OSError as failure:
                reply = [self._failed(request, failure)]
            self._send(reply)
            answered = True
        except OSError:
            pass  # the client is gone: its connection's own thread sees that too
        finally:
            if not answered:
                # Rather no connection than one that waits for an answer for ever.
                self.stop()
            self._budget.give_back(size)

    def _do(self, request: Request, payload: bytes) -> Sequence[Bytes]:
        backend, (flags, kind, _, offset, length) = self._backend, request
        if kind == NBD_CMD_READ:
            target = memoryview(bytearray(length))
            backend.read(target, offset)
            return [read_reply(self._session, request), target]
        if kind == NBD_CMD_BLOCK_STATUS:
            return [status_reply(self._session, request, backend.extents(offset, length))]
        if kind == NBD_CMD_WRITE:
            backend.write(memoryview(payload), offset)
        elif kind == NBD_CMD_WRITE_ZEROES:
            backend.write_zeroes(
                offset,
                length,
                may_hole=not flags & NBD_CMD_FLAG_NO_HOLE,
                fast_only=bool(flags & NBD_CMD_FLAG_FAST_ZERO),
            )
        elif kind == NBD_CMD_TRIM:
            backend.trim(offset, length)
        elif kind == NBD_CMD_CACHE:
            backend.cache(offset, length)
        if kind == NBD_CMD_FLUSH or flags & NBD_CMD_FLAG_FUA:
            backend.flush()
        return [success_reply(request)]

    def _failed(self, request: Request, failure: OSError) -> bytes:
        error = error_of_errno(failure.errno)
        return error_reply(self._session, request, error, os_error_text(failure))

    def _send_replies(self) -> None:
        self._carry_out_writes()
        self._backend.settle(idle=False)
        if self._replies:
            self._send(self._replies)
            self._replies.clear()
        self._scratch_used = 0

    def _send(self, parts: Sequence[Bytes]) -> None:
        """Raises OSError."""
        with self._sending:
            for at in range(0, len(parts), _MAX_PIECES):
                pieces = parts[at : at + _MAX_PIECES]
                total = sum(map(len, pieces))
                sent = self._socket.sendmsg(pieces)
                if sent < total:
                    self._socket.sendall(b"".join(pieces)[sent:])
