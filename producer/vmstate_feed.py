# SPDX-License-Identifier: Apache-2.0
"""Reads a stream from a pipe into memory, and never lets its writer stand for long.

While QEMU saves a running guest's memory, the guest waits whenever QEMU cannot
write. So the stream is read as fast as it comes while there is room; a wait
for room has an end, after which the backup is over and everything is dropped.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.producer.runs import packed, piece_bytes
from vmapipe.producer.session import RefusedByArchiver, Session
from vmapipe.producer.shared_memory import RING_BYTES, Ring, RingAllocator
from vmapipe.producer.transmit import REPORT_S, BufferUse, ProgressReporter
from vmapipe.protocol import limits
from vmapipe.protocol.errors import ProtocolError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.syscalls import readable

_DROP_BYTES = 1 << 20


class PipeChunk(NamedTuple):
    """Bytes of the stream at `position` of the memory; the last one may end inside a cluster."""

    position: int
    length: int


#: All of the stream has been taken.
END = PipeChunk(-1, 0)


class PipeReader:
    """A thread that reads `fd` from `start` on; its pieces wait for `next`.

    They lie in `memory`, in the range `room`, `piece_bytes` each.
    """

    def __init__(
        self, fd: int, memory: memoryview, room: range, piece_bytes: int, guest_wait_s: float
    ) -> None:
        if piece_bytes % CLUSTER_BYTES:
            raise ValueError("a piece is whole clusters")
        #: Why the backup has failed; empty: it has not. Everything is dropped then.
        self.failure = ""
        #: Becomes readable when there is a piece, or the end, after `next` had nothing.
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stream_fd = fd
        self._memory = memory
        self._piece_bytes = piece_bytes
        self._guest_wait_s = guest_wait_s
        self._changed = threading.Condition(threading.Lock())
        self._room = RingAllocator(room.start, len(room))
        self._queue: deque[PipeChunk] = deque()
        self._ended = self._sleeping = self._waiting = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="intake", daemon=True).start()

    @property
    def used_bytes(self) -> int:
        return self._room.used

    @property
    def is_waiting(self) -> bool:
        """Whether the stream stands still for want of room."""
        return self._waiting

    def next(self) -> PipeChunk | None:
        """The first piece, until it is `taken`; END. None: nothing now, and `fd` will tell."""
        with self._changed:
            if self._queue:
                return self._queue[0]
            if not self._sleeping:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.fd)
            self._sleeping = not self._ended
            return END if self._ended else None

    def taken(self) -> None:
        """The first piece is sent; its memory is held until `give_back`."""
        with self._changed:
            if self._queue:  # it is empty when all has failed meanwhile
                self._queue.popleft()

    def give_back(self, position: int) -> None:
        with self._changed:
            self._room.give_back(position)
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """From now on everything is read and dropped."""
        with self._changed:
            self._fail(reason)

    def _run(self) -> None:
        try:
            while (position := self._take_room()) is not None:
                length = self._fill(position)
                with self._changed:
                    if self.failure:
                        break
                    if length:
                        self._queue.append(PipeChunk(position, length))
                    self._ended = length < self._piece_bytes
                    self._wake()
                    if self._ended:
                        return
            while os.read(self._stream_fd, _DROP_BYTES):
                pass
        except OSError as error:
            self.fail(f"vmstate: the memory's stream cannot be read: {os_error_text(error)}")

    def _take_room(self) -> int | None:
        """None: the backup is over."""
        deadline = time.monotonic() + self._guest_wait_s
        with self._changed:
            while not self.failure:
                position = self._room.take(self._piece_bytes)
                if position is not None:
                    self._waiting = False
                    return position
                self._waiting = True
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    self._fail(
                        f"vmstate: the machine's memory has waited {self._guest_wait_s:.0f} s for "
                        "the archiver to take what came before; the guest goes on, the backup "
                        "does not (allow more with --guest-wait, or more --buffer)"
                    )
            return None

    def _fill(self, position: int) -> int:
        """A whole piece; less only at the stream's end."""
        view = self._memory[position : position + self._piece_bytes]
        filled = 0
        while filled < len(view):
            count = os.readv(self._stream_fd, [view[filled:]])
            if not count:
                break
            filled += count
        return filled

    def _fail(self, reason: str) -> None:
        if not self.failure:
            self.failure = reason
            self._queue.clear()
            self._changed.notify_all()
            self._sleeping = True  # even if it waits for something else: credit
            self._wake()

    def _wake(self) -> None:
        if self._sleeping:
            self._sleeping = False
            os.eventfd_write(self.fd, 1)


# The room for what was read must hold several pieces, or reading and sending take turns.
_PIECES = 8
# QEMU's word comes milliseconds after the stream's end.
_LOOK_S = 0.02


class StreamOptions(NamedTuple):
    """`fd`: the pipe. `verdict_fd`: who started QEMU's saving writes a byte there when QEMU says
    that all of it is in the pipe; -1: the pipe's end is the stream's. Sizes in bytes.
    """

    fd: int
    verdict_fd: int
    estimate_bytes: int
    memory_bytes: int
    guest_wait_s: int


class StreamSender:
    """One stream, from HELLO to DONE."""

    def __init__(
        self,
        name: str,
        options: StreamOptions,
        job: bytes,
        link: ArchiverConnection,
        cancel: Cancel,
    ) -> None:
        #: Of the stream, as far as it was sent.
        self.size_bytes = 0
        self._name = name
        self._options = options
        self._link = link
        self._cancel = cancel
        self._ring = Ring(options.memory_bytes)
        self._session = Session(name, options.estimate_bytes, link, job, self._ring, cancel)
        # Sent pieces, (frame, where their data lies), oldest first.
        self._sent: deque[tuple[int, int]] = deque()

    @property
    def zero_clusters(self) -> int:
        return self._session.zero_clusters

    def run(self, emit: Emit) -> None:
        """Raises Failure; the stream is then read on and dropped for as long as we live."""
        session = self._session
        session.greet()
        intake = self._new_intake()
        self._link.watch(intake.fd)
        intake.start()
        emit({"event": "attached", "device": self._name})
        try:
            self._send_all(intake, ProgressReporter(self._name, emit))
            self._hear_verdict()
            session.end()
        except (Failure, ProtocolError) as failure:
            intake.fail(str(failure))
            if not isinstance(failure, RefusedByArchiver):
                session.fail(str(failure))
            raise

    def close(self) -> None:
        self._ring.close()

    def _new_intake(self) -> PipeReader:
        options = self._options
        share = options.memory_bytes // _PIECES // CLUSTER_BYTES * CLUSTER_BYTES
        return PipeReader(
            options.fd,
            self._ring.view,
            range(RING_BYTES, RING_BYTES + options.memory_bytes),
            min(piece_bytes(self._session.frame_bytes), share),
            options.guest_wait_s,
        )

    def _send_all(self, intake: PipeReader, teller: ProgressReporter) -> None:
        session = self._session
        while (piece := intake.next()) is not END:
            if piece is not None and self._send(intake, piece):
                session.hear()
                session.keep_alive(time.monotonic())
            else:
                session.step(REPORT_S)
            self._release(intake)
            teller.tell(BufferUse(intake.used_bytes, 0, int(intake.is_waiting)))
            self._cancel.check()
            if intake.failure:
                raise Failure(intake.failure)

    def _send(self, intake: PipeReader, piece: PipeChunk) -> bool:
        """One frame; False when the credit does not suffice."""
        session = self._session
        clusters = -(-piece.length // CLUSTER_BYTES)
        whole = clusters * CLUSTER_BYTES
        if session.credit < limits.charge(clusters, whole):
            return False
        view = self._ring.view
        view[piece.position + piece.length : piece.position + whole] = bytes(whole - piece.length)
        run = packed(view, piece.position, session.sent_clusters, whole)
        session.send(run)
        self.size_bytes += piece.length
        intake.taken()
        if run.length:
            self._sent.append((session.sent_frames, piece.position))
        else:
            intake.give_back(piece.position)
        return True

    def _release(self, intake: PipeReader) -> None:
        while self._sent and self._sent[0][0] <= self._session.acked:
            intake.give_back(self._sent.popleft()[1])

    def _hear_verdict(self) -> None:
        """A pipe also ends when its writer dies. Raises Failure unless QEMU says it is complete."""
        fd = self._options.verdict_fd
        while fd >= 0 and not readable([fd], 0):
            self._session.step(_LOOK_S)
        if not self.size_bytes or (fd >= 0 and not os.read(fd, 1)):
            raise Failure(
                f"{self._name}: the machine's memory is not complete: QEMU's stream ended after "
                f"{self.size_bytes} bytes"
            )
