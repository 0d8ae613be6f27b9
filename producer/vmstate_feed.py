# SPDX-License-Identifier: Apache-2.0
"""The feed of a machine's memory: QEMU's migration stream, read from a pipe to its end.

While QEMU saves a running guest's memory, the guest waits whenever QEMU cannot
write. So the stream is read as fast as it comes while there is room; a wait
for room has an end, after which the backup is over and everything is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import deque
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.runs import packed, piece_bytes
from vmapipe.producer.session import Session
from vmapipe.producer.shared_memory import RING_BYTES, Ring, RingAllocator
from vmapipe.producer.transmit import NOTHING_TRANSFERRED, REPORT_S, Buffered
from vmapipe.protocol import limits
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.syscalls import readable

_DROP_BYTES = 1 << 20


class PipeChunk(NamedTuple):
    """Bytes of the stream at `position` of the memory; the last chunk may end inside a cluster."""

    position: int
    length: int


#: All of the stream has been taken.
END = PipeChunk(-1, 0)


class PipeReader:
    """A thread that reads `fd` from `start` on; its chunks wait for `next`.

    They lie in `memory`, in the range `room`.
    """

    def __init__(self, fd: int, memory: memoryview, room: range, guest_wait_s: float) -> None:
        #: Why the backup has failed; empty: it has not. Everything is dropped then.
        self.failure = ""
        #: Becomes readable when there is a piece, or the end, after `next` had nothing.
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stream_fd = fd
        self._memory = memory
        self._piece_bytes = 0
        self._guest_wait_s = guest_wait_s
        self._changed = threading.Condition(threading.Lock())
        self._room = RingAllocator(room.start, len(room))
        self._queue: deque[PipeChunk] = deque()
        self._ended = self._sleeping = self._waiting = False

    def start(self, piece_bytes: int) -> None:
        """Read pieces of so many bytes, a multiple of CLUSTER_BYTES."""
        if piece_bytes % CLUSTER_BYTES:
            raise ValueError("a piece is whole clusters")
        self._piece_bytes = piece_bytes
        threading.Thread(target=self._run, name="intake", daemon=True).start()

    @property
    def used_bytes(self) -> int:
        return self._room.used

    @property
    def is_waiting(self) -> bool:
        """True while the stream stands still for lack of room."""
        return self._waiting

    def next(self) -> PipeChunk | None:
        """Return the first chunk, until it is `taken`; END; None: nothing now, and `fd` becomes readable."""
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
        """Read and drop everything from now on."""
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
        """Return a free position; None: the backup is over."""
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
        """Fill a whole piece, or less at the stream's end; return its length."""
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
    """`fd`: the pipe. `verdict_fd`: the process that started QEMU's saving writes a byte there when
    QEMU says that all of it is in the pipe; -1: the pipe's end is the stream's. Sizes in bytes.
    """

    fd: int
    verdict_fd: int
    memory_bytes: int
    guest_wait_s: int


class VmstateFeed:
    """A machine's memory as a stream of unknown length: whole clusters, in order.

    After a failure the stream is read on and dropped for as long as this process lives.
    """

    pause_s = REPORT_S
    #: QEMU reports the progress of the stream.
    transfer = NOTHING_TRANSFERRED

    def __init__(self, name: str, options: StreamOptions, ring: Ring, session: Session) -> None:
        self.name = name
        #: Bytes of the stream that were sent.
        self.size_bytes = 0
        self.ended = False
        self._options = options
        self._ring = ring
        self._session = session
        room = range(RING_BYTES, RING_BYTES + options.memory_bytes)
        self._reader = PipeReader(options.fd, ring.view, room, options.guest_wait_s)

    def begin(self, emit: Emit) -> None:
        share = self._options.memory_bytes // _PIECES // CLUSTER_BYTES * CLUSTER_BYTES
        self._session.watch(self._reader.fd)
        self._reader.start(min(piece_bytes(self._session.frame_bytes), share))
        emit({"event": "attached", "device": self.name})

    def advance(self) -> bool:
        chunk = self._reader.next()
        self.ended = chunk is END
        return chunk is not None and not self.ended and self._send(chunk)

    def _send(self, chunk: PipeChunk) -> bool:
        """Send one frame; False: the credit does not suffice."""
        session, reader = self._session, self._reader
        clusters = -(-chunk.length // CLUSTER_BYTES)
        whole = clusters * CLUSTER_BYTES
        if session.credit < limits.charge(clusters, whole):
            return False
        view = self._ring.view
        view[chunk.position + chunk.length : chunk.position + whole] = bytes(whole - chunk.length)
        run = packed(view, chunk.position, session.sent_clusters, whole)
        reader.taken()
        self.size_bytes += chunk.length
        session.send(run, functools.partial(reader.give_back, chunk.position))
        return True

    @property
    def buffered(self) -> Buffered:
        return Buffered(self._reader.used_bytes, 0, int(self._reader.is_waiting))

    def check(self) -> None:
        if self._reader.failure:
            raise Failure(self._reader.failure)

    def finish(self) -> None:
        """A pipe also ends when its writer dies. Raises Failure unless QEMU says it is complete."""
        fd = self._options.verdict_fd
        while fd >= 0 and not readable([fd], 0):
            self._session.step(_LOOK_S)
        if not self.size_bytes or (fd >= 0 and not os.read(fd, 1)):
            raise Failure(
                f"{self.name}: the machine's memory is not complete: QEMU's stream ended after "
                f"{self.size_bytes} bytes"
            )

    def fail(self, reason: str) -> None:
        self._reader.fail(reason)

    def leave(self) -> None: ...
