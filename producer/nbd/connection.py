# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one connection.

What can be done at once is done where it is read, many requests to a system
call; whatever may wait (an uncached read, a flush, a write whose old data has
to be saved first) goes to a thread of its own, so that nothing waits behind it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from vmapipe.producer.nbd.backend import Backend, IncomingWrite, Mapped, Placing
from vmapipe.producer.nbd.workers import Budget, Pool, Share, Workers
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
from vmapipe.protocol.nbd.errors import NbdProtocolError, error_of_errno
from vmapipe.protocol.nbd.reply import error_reply, read_reply, status_reply, success_reply
from vmapipe.protocol.nbd.session import REQUEST_BYTES, NbdRequest, NbdSession, parse_request
from vmapipe.runtime.errors import os_error_text

# One megabyte is what most clients send at most; larger writes get memory of their own.
_BUFFER_BYTES = (1 << 20) + (64 << 10)
# What an answer to block status may take: the most descriptors that are sent.
_STATUS_BYTES = 1 << 20
_NOTHING = memoryview(b"")
# A client that takes, or sends, nothing for so long is cut off, but only when it holds
# memory that others wait for: a guest that stands still comes back to its disk.
_STALL_S = 5.0
# sendmsg takes 1024 pieces (IOV_MAX).
_MAX_PIECES = 1000
# The client goes on with these while we go on with the rest: of 1, 4, 6, 8 and
# all, 6 gave the most operations a second. So many small writes are carried out together.
_REPLIES_AT_ONCE = 6
# An answer that is sent from where it lies took no time to make: one system call for 16 of them is
# worth more than an early start (4K at depth 16: 9 us of CPU, with 3 of them 16). Larger ones go at once.
_PIECES_AT_ONCE = 32
_VIEWED_AT_ONCE_BYTES = 256 << 10
# From here on the data of a write is received where it is to lie, by a system call of its own: that
# costs less than a copy.
_PLACED_BYTES = 64 << 10
# How long a connection polls for its next request. QEMU's own threads poll 32 us
# (poll-max-ns); here the answers of others take longer on a busy host, and a
# sleep that is begun too early costs two of them: 200 us took 4K writes at queue
# depth 1 from 0.86 to 1.15 times nbdkit's rate.
_POLL_NS = 200_000


def _is_plain_write(request: NbdRequest) -> bool:
    return request.type == NBD_CMD_WRITE and not request.flags & NBD_CMD_FLAG_FUA


class Connection:
    """Serves until the client leaves. `stop` ends it from another thread."""

    def __init__(
        self,
        sock: socket.socket,
        session: NbdSession,
        backend: Backend,
        workers: Workers,
        pool: Pool,
        request_limit_s: float | None = None,
        report_failure: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`request_limit_s`: so long a request may take to come in; None: for ever.

        `report_failure`: called by any thread with each request that the backend failed, and why.
        """
        self._socket = sock
        self._session = session
        self._backend = backend
        self._mapped = backend if isinstance(backend, Mapped) else None
        self._placing = backend if isinstance(backend, Placing) else None
        # Requests of so much are not received into the buffer.
        self._apart_bytes = _BUFFER_BYTES + 1 if self._placing is None else _PLACED_BYTES
        self._workers = workers
        self._budget = Budget(pool)
        self._report_failure = report_failure
        self._request_limit_s = math.inf if request_limit_s is None else request_limit_s
        # How long was waited for the rest of the request that is coming in.
        self._waited_s = 0.0
        #: Requests that came in whole.
        self.requests = 0
        #: Since when nothing has come (time.monotonic()); infinity: it works.
        self.idle_since = time.monotonic()
        #: True: the bytes that came last are part of a request.
        self.is_amid = False
        self._sending = threading.Lock()
        # The client takes no answers any more: what it has asked for is not worth the work.
        self._is_lost = False
        # Replies of the connection's own thread, and the memory of their data.
        self._replies: list[Bytes] = []
        self._scratch = memoryview(bytearray(_BUFFER_BYTES))
        self._scratch_used = 0
        self._viewed_bytes = 0
        self._replies_at_once = _REPLIES_AT_ONCE if self._mapped is None else _PIECES_AT_ONCE
        # Writes that were read and not yet carried out; their data is where it was read.
        self._writes: list[tuple[NbdRequest, memoryview]] = []
        self._polls = False
        for option, longest_s in (
            (socket.SO_SNDTIMEO, _STALL_S),
            (socket.SO_RCVTIMEO, min(_STALL_S, self._request_limit_s)),
        ):
            timeval = struct.pack("@ll", int(longest_s), int(longest_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, option, timeval)

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
        first_bytes = _BUFFER_BYTES
        while True:
            wanted = REQUEST_BYTES
            while end - start >= REQUEST_BYTES:
                read = self._session.valid_read(view, start)
                if read is not None:
                    self._take_read(*read)
                else:
                    request = parse_request(view[start : start + REQUEST_BYTES])
                    if request.type == NBD_CMD_DISC:
                        self._send_replies()
                        return
                    wanted = REQUEST_BYTES + request.payload_bytes
                    if end - start < wanted:
                        break
                    self._take(request, view[start + REQUEST_BYTES : start + wanted])
                start += wanted
                self.requests += 1
                self._waited_s = 0.0
                if len(self._writes) + len(self._replies) >= self._replies_at_once:
                    self._send_replies()
                wanted = REQUEST_BYTES
            self._send_replies()
            if wanted >= self._apart_bytes and self._take_apart(view[start:end]):
                start = end = 0
                # The next one is probably as large: its data goes elsewhere.
                first_bytes = REQUEST_BYTES
                continue
            if start:
                view[: end - start] = view[start:end]
                start, end = 0, end - start
            # All of a payload, but no more when it is large: what follows would have to move.
            most = wanted if wanted > _BUFFER_BYTES // 2 else _BUFFER_BYTES
            if end:
                got = self._receive_rest(view[end:most], wanted - end)
            else:
                got = self._receive(view[: min(first_bytes, most)])
                first_bytes = _BUFFER_BYTES
            if not got:
                return
            end += got

    def _receive(self, target: memoryview) -> int:
        """Wait for the next request."""
        started = time.perf_counter_ns()
        got = self._poll(target)
        if got is None:
            self._backend.settle(idle=True)
            self.idle_since = time.monotonic()
            while got is None:
                with contextlib.suppress(BlockingIOError):  # nothing for so long: it may be silent
                    got = self._socket.recv_into(target)
            self.idle_since = math.inf
        self._polls = time.perf_counter_ns() - started < _POLL_NS
        return got

    def _poll(self, target: memoryview) -> int | None:
        """Receive without waiting; poll for a moment while requests follow closely.

        As QEMU's own threads do: going to sleep and being woken takes longer than most requests.
        """
        until = time.perf_counter_ns() + (_POLL_NS if self._polls else 0)
        while True:
            try:
                return self._socket.recv_into(target, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.perf_counter_ns() >= until:
                    return None

    def _receive_rest(self, target: memoryview, needed: int) -> int:
        """More of a request that has begun, of which `needed` bytes are missing: what is there, or else
        all of it when it has come.

        The kernel collects it then: a socket holds less than QEMU writes at once, and waking up for
        each part took most of a write's time. Raises NbdProtocolError when it takes too long.
        """
        got = self._poll(target) if needed < _PLACED_BYTES else None
        if got is not None:
            return got
        self._backend.settle(idle=True)
        self.is_amid = True
        started = self.idle_since = time.monotonic()
        while got is None:
            if self._waited_s + time.monotonic() - started >= self._request_limit_s:
                raise NbdProtocolError(
                    f"a request was begun and not finished within {self._request_limit_s:.0f} s"
                )
            try:
                got = self._socket.recv_into(target, needed, socket.MSG_WAITALL)
            except BlockingIOError:  # nothing, for _STALL_S
                if self._budget.is_in_the_way:
                    raise NbdProtocolError(
                        "a write was begun and not finished; others need its memory"
                    ) from None
        self._waited_s += time.monotonic() - started
        self.idle_since = math.inf
        self.is_amid = False
        return got

    def _take_apart(self, begun: memoryview) -> bool:
        """Take a large write that has begun to come; False: its data is to go through the buffer.

        Also true when the client has left meanwhile.
        """
        request, begun = parse_request(begun[:REQUEST_BYTES]), begun[REQUEST_BYTES:]
        placing, place = self._placing, None
        is_valid = self._session.fault_of(request) == NBD_SUCCESS
        if placing is not None and is_valid and _is_plain_write(request):
            place = placing.place(request.offset, request.length)
        if placing is not None and place is not None:
            self._take_placed(request, placing, place, begun)
        elif REQUEST_BYTES + request.length > _BUFFER_BYTES:
            self._take_large(request, begun)
        else:
            return False
        self.requests += 1
        self._waited_s = 0.0
        return True

    def _take_placed(
        self, request: NbdRequest, placing: Placing, place: IncomingWrite, begun: memoryview
    ) -> None:
        """Receive the data of a write where it is to lie."""
        rest = place.room[len(begun) :]
        try:
            place.room[: len(begun)] = begun
            while rest and (got := self._receive_rest(rest, len(rest))):
                rest = rest[got:]
        finally:
            if rest:
                placing.unplaced(place)
        if not rest:
            placing.placed(place, request.offset)
            self._replies.append(success_reply(request))

    def _take_large(self, request: NbdRequest, begun: memoryview) -> None:
        """A write whose data the buffer cannot hold."""
        share = self._budget.take(request.length)
        is_handed_over = False
        try:
            payload = memoryview(bytearray(request.length))
            payload[: len(begun)] = begun
            rest = payload[len(begun) :]
            while rest:
                got = self._receive_rest(rest, len(rest))
                if not got:
                    return
                rest = rest[got:]
            self._carry_out_writes()
            error = self._session.fault_of(request)
            if error != NBD_SUCCESS:
                self._replies.append(error_reply(self._session, request, error))
                return
            is_handed_over = True
            self._workers.submit(functools.partial(self._carry_out, request, payload, share))
        finally:
            if not is_handed_over:
                self._budget.give_back(share)

    def _take(self, request: NbdRequest, payload: memoryview) -> None:
        """Answer it, or put it with the writes that are carried out before anything else."""
        error = self._session.fault_of(request)
        if error == NBD_SUCCESS and _is_plain_write(request):
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

    def _take_read(self, cookie: int, offset: int, length: int) -> None:
        """Answer a read that may be carried out. Most requests are one, so that little is done for each."""
        if self._writes:
            self._carry_out_writes()
        if self._mapped is not None:
            views = self._mapped.views(offset, length)
            if views is not None:
                self._replies.append(read_reply(self._session, cookie, offset, length))
                self._replies += views
                self._viewed_bytes += length
                if self._viewed_bytes >= _VIEWED_AT_ONCE_BYTES:
                    self._send_replies()
                return
        request = NbdRequest(0, NBD_CMD_READ, cookie, offset, length)
        if length > _BUFFER_BYTES:
            self._hand_over(request, _NOTHING)
            return
        if self._scratch_used + length > _BUFFER_BYTES:
            self._send_replies()
        target = self._scratch[self._scratch_used : self._scratch_used + length]
        try:
            is_done = self._backend.try_read(target, offset)
        except OSError as failure:
            self._replies.append(self._failed(request, failure))
            return
        if not is_done:
            self._hand_over(request, _NOTHING)
            return
        self._scratch_used += length
        self._replies += (read_reply(self._session, cookie, offset, length), target)

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

    def _hand_over(self, request: NbdRequest, payload: memoryview) -> None:
        """It may take long: to a thread of the workers."""
        size = request.length if request.type in (NBD_CMD_READ, NBD_CMD_WRITE) else 0
        if request.type == NBD_CMD_BLOCK_STATUS:
            size = _STATUS_BYTES
        if not self._budget.fits(size):
            self._send_replies()
        share = self._budget.take(size)
        if self._is_lost:
            self._budget.give_back(share)
            raise ConnectionAbortedError
        # The buffer is used again: what waits has its own copy.
        work = functools.partial(self._carry_out, request, memoryview(bytes(payload)), share)
        self._workers.submit(work)

    def _try_at_once(self, request: NbdRequest) -> bool:
        """Answer zeroes at once; False: it cannot be."""
        if request.type == NBD_CMD_WRITE_ZEROES and not request.flags & ~NBD_CMD_FLAG_NO_HOLE:
            if not self._backend.try_zeroes(request.offset, request.length):
                return False
            self._replies.append(success_reply(request))
            return True
        return False

    def _carry_out(self, request: NbdRequest, payload: memoryview, share: Share) -> None:
        """Carry out a request, in a thread of the workers."""
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
        except MemoryError:
            # No answer but this: the client may come back and ask again, a guest's QEMU does.
            self._report(request, "out of memory; the client was disconnected")
        finally:
            if not answered:
                # Close the connection rather than leave a request unanswered.
                self._is_lost = True
                self.stop()
            self._budget.give_back(share)

    def _do(self, request: NbdRequest, payload: memoryview) -> Sequence[Bytes]:
        backend, (flags, kind, _, offset, length) = self._backend, request
        if kind == NBD_CMD_READ:
            target = memoryview(bytearray(length))
            backend.read(target, offset)
            return [read_reply(self._session, request.cookie, offset, length), target]
        if kind == NBD_CMD_BLOCK_STATUS:
            return [status_reply(self._session, request, backend.extents(offset, length))]
        if kind == NBD_CMD_WRITE:
            backend.write(payload, offset)
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

    def _failed(self, request: NbdRequest, failure: OSError) -> bytes:
        error, reason = error_of_errno(failure.errno), os_error_text(failure)
        # Zeroing that would be slow is declined, which is an answer and no fault.
        if not (failure.errno == errno.EOPNOTSUPP and request.flags & NBD_CMD_FLAG_FAST_ZERO):
            self._report(request, reason)
        return error_reply(self._session, request, error, reason)

    def _report(self, request: NbdRequest, reason: str) -> None:
        name = self._session.export.name
        self._report_failure(f"export {name!r}, {request.describe()} failed: {reason}")

    def _send_replies(self) -> None:
        self._carry_out_writes()
        self._backend.settle(idle=False)
        if self._replies:
            self._send(self._replies)
            self._replies.clear()
        self._scratch_used = self._viewed_bytes = 0

    def _send(self, parts: Sequence[Bytes]) -> None:
        """Raises OSError."""
        with self._sending:
            for at in range(0, len(parts), _MAX_PIECES):
                self._send_pieces(parts[at : at + _MAX_PIECES])

    def _send_pieces(self, pieces: Sequence[Bytes]) -> None:
        left = sum(map(len, pieces))
        while left:
            sent = self._send_some(pieces)
            left -= sent
            if left:
                passed = 0
                while sent >= len(pieces[passed]):
                    sent -= len(pieces[passed])
                    passed += 1
                pieces = [memoryview(pieces[passed])[sent:], *pieces[passed + 1 :]]

    def _send_some(self, pieces: Sequence[Bytes]) -> int:
        try:
            return self._socket.sendmsg(pieces)
        except OSError as error:
            if error.errno == errno.EFAULT and self._mapped is not None:
                # A part of an answer that was begun is not there. All that is left is to end it:
                # whoever connects again is told by an error where.
                self._mapped.distrust_views()
                self._report_failure(
                    f"export {self._session.export.name!r}: data of its file could not be sent: the file "
                    "became shorter, or its disk fails; the client was disconnected"
                )
                raise ConnectionAbortedError from None
            if not isinstance(error, BlockingIOError):
                raise
            # It has taken nothing for _STALL_S.
            if not self._budget.is_in_the_way:
                return 0
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError from None
