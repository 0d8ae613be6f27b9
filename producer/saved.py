# SPDX-License-Identifier: Apache-2.0
"""Old data that guests' writes have saved: from the guard's slots into frames."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

from vmapipe.producer.guarded import Guarded
from vmapipe.producer.ring import RING_BYTES, Ring
from vmapipe.producer.runs import Run, packed, whole_blocks
from vmapipe.producer.session import Session
from vmapipe.protocol import limits
from vmapipe.protocol.guarding import Saved, SavedHole
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.protocol.messages import SharedCluster
from vmapipe.runtime.errors import Failure, os_error_text

# What a cluster takes of a frame's charge when all of it is data.
_FULL_CHARGE = limits.CHARGE_PER_CLUSTER + CLUSTER_BYTES
# Of a frame, if all of them are.
_MOST_SCATTERED = limits.MAX_PAYLOAD_BYTES // CLUSTER_BYTES


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
        # (cluster, slot), oldest first.
        self._waiting: deque[tuple[int, int] | SavedHole] = deque()
        # (frame, its slots)
        self._sent: deque[tuple[int, Sequence[int]]] = deque()

    def __bool__(self) -> bool:
        """Whether there is something to send."""
        return bool(self._waiting)

    @property
    def is_many(self) -> bool:
        """A frame full."""
        return len(self._waiting) >= _MOST_SCATTERED

    def add(self, message: Saved | SavedHole) -> None:
        if isinstance(message, SavedHole):
            self._waiting.append(message)
            return
        self._waiting.extend(zip(message.clusters, message.slots, strict=True))
        spooled = self._spooled(message.slots)
        self.used_spool += spooled
        self.used_memory += len(message.slots) - spooled
        self.saved_clusters += len(message.slots)

    def send(self, session: Session, most_clusters: int) -> bool:
        """Send one frame; False when credit or room is missing.

        A run has at most so many clusters.
        """
        oldest = self._waiting[0]
        if isinstance(oldest, SavedHole):
            return self._send_hole(session, oldest)
        if oldest[1] < self._memory_slots and session.scatters:
            return self._send_scattered(session)
        return self._send_run(session, *oldest, most_clusters)

    def _send_hole(self, session: Session, hole: SavedHole) -> bool:
        if session.credit < limits.charge(hole.clusters, 0):
            return False
        session.send(Run(hole.first, hole.clusters, b"", 0, 0))
        self._waiting.popleft()
        return True

    def _send_scattered(self, session: Session) -> bool:
        """As many as there are in memory, and as there may be in a frame."""
        room = min(session.credit, session.frame_bytes) - limits.CHARGE_PER_FRAME
        most = min(room // _FULL_CHARGE, _MOST_SCATTERED)
        clusters: list[SharedCluster] = []
        slots: list[int] = []
        while self._waiting and len(clusters) < most:
            oldest = self._waiting[0]
            if isinstance(oldest, SavedHole) or oldest[1] >= self._memory_slots:
                break
            cluster, slot = self._waiting.popleft()
            position = RING_BYTES + slot * CLUSTER_BYTES
            run = packed(self._ring.view, position, cluster, self._length(cluster, 1))
            clusters.append(SharedCluster(cluster, position, int.from_bytes(run.masks, "big")))
            slots.append(slot)
        if clusters:
            session.send_scattered(clusters)
            self._sent.append((session.sent_frames, slots))
        return bool(clusters)

    def _send_run(self, session: Session, first: int, slot: int, most_clusters: int) -> bool:
        """Of slots that lie one behind the other in memory; those of the spool come singly."""
        spooled = slot >= self._memory_slots
        count = 1 if spooled else self._consecutive(first, slot, most_clusters)
        length = self._length(first, count)
        if session.credit < limits.charge(count, whole_blocks(length)):
            return False
        if not spooled:
            self._send_from_memory(session, first, range(slot, slot + count), length)
        elif not self._send_from_spool(session, first, slot, length):
            return False
        for _ in range(count):
            self._waiting.popleft()
        return True

    def _length(self, first: int, count: int) -> int:
        return min(count * CLUSTER_BYTES, self._size_bytes - first * CLUSTER_BYTES)

    def _spooled(self, slots: Sequence[int]) -> int:
        return sum([slot >= self._memory_slots for slot in slots])

    def release(self, acked: int) -> None:
        """Frames up to `acked` are out of our hands."""
        free: list[int] = []
        while self._sent and self._sent[0][0] <= acked:
            free += self._sent.popleft()[1]
        if free:
            self._give_back(free)

    def _consecutive(self, first: int, slot: int, most: int) -> int:
        """How many of the oldest, this one first, follow each other on the disk and in memory."""
        count = 1
        while (
            count < min(most, len(self._waiting))
            and slot + count < self._memory_slots
            and self._waiting[count] == (first + count, slot + count)
        ):
            count += 1
        return count

    def _send_from_memory(
        self, session: Session, first: int, slots: Sequence[int], length: int
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

    def _give_back(self, slots: Sequence[int]) -> None:
        spooled = self._spooled(slots)
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
