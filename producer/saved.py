# SPDX-License-Identifier: Apache-2.0
"""Old data that guests' writes have saved: from the guard's slots into frames."""

from __future__ import annotations

import os
from collections import deque

from vmapipe.producer.guarded import Guarded
from vmapipe.producer.ring import RING_BYTES, Ring
from vmapipe.producer.runs import Run, packed, whole_blocks
from vmapipe.producer.session import Session
from vmapipe.protocol import limits
from vmapipe.protocol.guarding import Saved, SavedHole
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.errors import Failure, os_error_text


class SavedData:
    """What was saved and is not acknowledged yet; slots are given back when they are.

    Slots below `memory_slots` lie behind the ring in its memory, the others in
    the spool file.
    """

    def __init__(
        self, size_bytes: int, memory_slots: int, spool_fd: int, ring: Ring, guard: Guarded
    ) -> None:
        self.used_memory = self.used_spool = 0
        #: All that have ever come.
        self.saved_clusters = 0
        self._size_bytes = size_bytes
        self._memory_slots = memory_slots
        self._spool_fd = spool_fd
        self._ring = ring
        self._guard = guard
        # Oldest first.
        self._waiting: deque[Saved | SavedHole] = deque()
        # (frame, its slots)
        self._sent: deque[tuple[int, tuple[int, ...]]] = deque()

    def __bool__(self) -> bool:
        """Whether there is something to send."""
        return bool(self._waiting)

    def add(self, message: Saved | SavedHole) -> None:
        self._waiting.append(message)
        if isinstance(message, Saved):
            spooled = sum(slot >= self._memory_slots for slot in message.slots)
            self.used_spool += spooled
            self.used_memory += len(message.slots) - spooled
            self.saved_clusters += len(message.slots)

    def send(self, session: Session, most_clusters: int) -> bool:
        """Send one frame of at most so many clusters; False when credit or room is missing."""
        message = self._waiting[0]
        if isinstance(message, SavedHole):
            if session.credit < limits.charge(message.clusters, 0):
                return False
            session.send(Run(message.first, message.clusters, b"", 0, 0))
            self._waiting.popleft()
            return True
        first, slots = message
        count = self._consecutive(slots[:most_clusters])
        length = min(count * CLUSTER_BYTES, self._size_bytes - first * CLUSTER_BYTES)
        if session.credit < limits.charge(count, whole_blocks(length)):
            return False
        if slots[0] < self._memory_slots:
            self._send_from_memory(session, first, slots[:count], length)
        elif not self._send_from_spool(session, first, slots[0], length):
            return False
        if count == len(slots):
            self._waiting.popleft()
        else:
            self._waiting[0] = Saved(first + count, slots[count:])
        return True

    def release(self, acked: int) -> None:
        """Frames up to `acked` are out of our hands."""
        free: list[int] = []
        while self._sent and self._sent[0][0] <= acked:
            free += self._sent.popleft()[1]
        if free:
            self._give_back(tuple(free))

    def _consecutive(self, slots: tuple[int, ...]) -> int:
        """How many of them lie one behind the other in memory; those of the spool come singly."""
        count = 1
        while (
            count < len(slots)
            and slots[count] == slots[0] + count
            and slots[count] < self._memory_slots
        ):
            count += 1
        return count

    def _send_from_memory(
        self, session: Session, first: int, slots: tuple[int, ...], length: int
    ) -> None:
        position = RING_BYTES + slots[0] * CLUSTER_BYTES
        run = packed(self._ring.view, position, first, length)
        session.send(run)
        if run.length:
            self._sent.append((session.sent_frames, slots))
        else:
            self._give_back(slots)

    def _send_from_spool(self, session: Session, first: int, slot: int, length: int) -> bool:
        position = self._ring.take(CLUSTER_BYTES)
        if position is None:
            return False
        target = self._ring.view[position : position + length]
        read_exactly(self._spool_fd, target, (slot - self._memory_slots) * CLUSTER_BYTES, "spool")
        run = packed(self._ring.view, position, first, length)
        session.send(run)
        if run.length:
            self._ring.hold(session.sent_frames, position, run.length)
        self._give_back((slot,))
        return True

    def _give_back(self, slots: tuple[int, ...]) -> None:
        spooled = sum(slot >= self._memory_slots for slot in slots)
        self.used_spool -= spooled
        self.used_memory -= len(slots) - spooled
        self._guard.release(slots)


def read_exactly(fd: int, target: memoryview, offset: int, what: str) -> None:
    """Raises Failure."""
    while target:
        try:
            got = os.preadv(fd, [target], offset)
        except OSError as error:
            raise Failure(
                f"{what}: cannot read at offset {offset}: {os_error_text(error)}"
            ) from error
        if not got:
            raise Failure(f"{what}: ended at offset {offset}: it was cut from outside")
        target, offset = target[got:], offset + got
