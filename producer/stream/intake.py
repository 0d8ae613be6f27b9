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

from vmapipe.producer.sink.room import Room
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.errors import os_error_text

_DROP_BYTES = 1 << 20


class Piece(NamedTuple):
    """Bytes of the stream at `position` of the memory; the last one may end inside a cluster."""

    position: int
    length: int


#: All of the stream has been taken.
END = Piece(-1, 0)


class Intake:
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
        self._room = Room(room.start, len(room))
        self._queue: deque[Piece] = deque()
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

    def next(self) -> Piece | None:
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
                        self._queue.append(Piece(position, length))
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
