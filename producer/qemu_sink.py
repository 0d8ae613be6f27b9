# SPDX-License-Identifier: Apache-2.0
"""The target of QEMU's own backup job: an export that only takes, and always acknowledges.

Two rules. A request never fails and never waits for long, because a guest's
write may stand behind it: when something is wrong, the backup ends and the sink
takes, acknowledges and drops. And a cluster counts once, however often it comes.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from vmapipe.clusters.cluster_set import ClusterSet
from vmapipe.clusters.sizes import CLUSTER_BYTES, cluster_count
from vmapipe.producer.chunks import (
    ZEROES,
    Chunk,
    PartialClusters,
    TooManyPartialClusters,
    ZeroRuns,
    is_whole,
    pieces,
)
from vmapipe.producer.nbd.backend import IncomingWrite, Write, WriteOnlyBackend, one_by_one
from vmapipe.producer.runs import whole_blocks
from vmapipe.producer.shared_memory import RingAllocator
from vmapipe.protocol.limits import MAX_RUN_CLUSTERS
from vmapipe.runtime.rate_limit import JobRateLimiter


class FairWait:
    """A queue of writes that wait: the first to come is served first.

    Callers hold the lock of `changed`, and notify it when something may be reached.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._tickets: deque[object] = deque()

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._tickets)

    def wait(self, reached: Callable[[], bool], over: Callable[[], bool], deadline: float) -> bool:
        """False: it is over. Raises TimeoutError at `deadline` (time.monotonic())."""
        ticket = object()
        self._tickets.append(ticket)
        try:
            while not over():
                if self._tickets[0] is ticket and reached():
                    return True
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
            return False
        finally:
            self._tickets.remove(ticket)
            # It may be the next one's turn.
            self._changed.notify_all()


# QEMU sends up to a megabyte at once: so much lies together and makes one frame.
MAX_PIECE_CLUSTERS = 16
# Zeroes take no room in the memory, so their number is bounded here: neighbours
# are one, so this many are far apart.
_MAX_WAITING = 4096
# Zeroes are sent together, so often at most: no guest waits for them, and a frame for
# each megabyte of empty space would cost more than all else.
_ZEROES_S = 0.1
# Of what QEMU has left out, so many runs are looked up and sent at a time.
_REST_RUNS = 256
# Until QEMU's job has the limit that is needed again, its larger requests wait for so long
# at most: it would go on reading as fast as it can. Copies before a guest's writes are
# mostly single clusters, and never wait here.
_HOLD_S = 0.1
_HOLD_CLUSTERS = 2
# The longest range whose clusters are looked at with the lock held.
_RANGE_CLUSTERS = 1 << 14


class QemuSink(WriteOnlyBackend):
    """The `Backend` on one side, a queue of `Arrived` on the other.

    What has arrived lies in `memory`, in the range `room`.
    """

    def __init__(
        self,
        name: str,
        size_bytes: int,
        memory: memoryview,
        room: range,
        guest_wait_s: float,
        speed_bytes_s: int = 0,
    ) -> None:
        #: Why the backup has failed; empty: it has not. Everything is dropped then.
        self.failure = ""
        #: Clusters of data that have come, each counted once.
        self.taken_bytes = 0
        #: Becomes readable when something has arrived after `next` had nothing.
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._name = name
        self._size_bytes = size_bytes
        self._memory = memory
        self._guest_wait_s = guest_wait_s
        self._changed = threading.Condition(threading.Lock())
        self._arrivals = ClusterSet(cluster_count(size_bytes))
        self._parts = PartialClusters(size_bytes)
        self._room = RingAllocator(room.start, len(room))
        #: The longest run with data.
        self.piece_clusters = MAX_PIECE_CLUSTERS
        self._queue: deque[Chunk] = deque()
        # Not in the queue yet, and when they may go there again.
        self._zeroes = ZeroRuns()
        self._zeroes_at = 0.0
        # Behind it is what has not come and will not come; -1: that may still come.
        self._rest_from = -1
        self._rest_kind = ZEROES
        # Positions of runs in the queue whose data is still being copied.
        self._filling: set[int] = set()
        self._sleeping = self._woken = False
        self._turns = FairWait(self._changed)
        self._job_speed = JobRateLimiter(speed_bytes_s, time.monotonic())
        self._hold_until = 0.0

    # --- for the sender ---

    @property
    def missing(self) -> int:
        """Clusters that have not come yet."""
        return self._arrivals.size - self._arrivals.count

    @property
    def arrived(self) -> int:
        """Clusters that have come."""
        return self._arrivals.count

    def rest_is(self, kind: int) -> None:
        """Take what has not come yet as this kind, ZEROES or UNCHANGED: it will not come."""
        with self._changed:
            if not self.failure:
                self._rest_from, self._rest_kind = 0, kind

    def limit(self, bytes_per_s: int) -> None:
        """Another speed limit, which QEMU's job has been given."""
        with self._changed:
            self._job_speed.change(bytes_per_s, time.monotonic())
            self._hold_until = 0.0
            self._changed.notify_all()

    def job_is_limited(self) -> None:
        """QEMU's job has the speed that `job_speed` has asked for."""
        with self._changed:
            self._hold_until = 0.0
            self._changed.notify_all()

    @property
    def job_speed(self) -> int:
        """The speed limit that QEMU's job is to have now, in bytes a second; 0: none."""
        with self._changed:
            return self._job_speed.wanted_at(time.monotonic())

    @property
    def waiting_writes(self) -> int:
        """Writes that wait for room."""
        return len(self._turns)

    @property
    def clusters(self) -> int:
        return self._arrivals.size

    @property
    def used_bytes(self) -> int:
        return self._room.used

    def next(self) -> Chunk | None:
        """Return what to send next, which stays first until `sent`; None: nothing, until `fd` is readable."""
        with self._changed:
            if self._woken:
                os.eventfd_read(self.fd)
                self._woken = False
            if not self._queue and len(self._zeroes):
                self._queue_zeroes(time.monotonic())
            if not self._queue and self._rest_from >= 0:
                self._queue_rest()
            first = self._queue[0] if self._queue else None
            if first is not None and first.position in self._filling:
                first = None
            self._sleeping = first is None
            return first

    def sent(self, clusters: int) -> None:
        """Mark so many of the first chunk's clusters as sent; less than all only of those
        without data.
        """
        with self._changed:
            if self.failure:
                return
            first, count, kind, _ = self._queue.popleft()
            if clusters < count:
                self._queue.appendleft(Chunk(first + clusters, count - clusters, kind, 0))
            if self._turns:
                self._changed.notify_all()

    def give_back(self, positions: list[int]) -> None:
        """The memory of these runs is free again."""
        with self._changed:
            for position in positions:
                self._room.give_back(position)
            if self._turns:
                self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Acknowledge and drop everything from now on; no request waits any more."""
        with self._changed:
            self._fail(reason)

    def close(self) -> None:
        os.close(self.fd)

    # --- the Backend ---

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        return one_by_one(self.try_write, writes)

    def try_write(self, data: memoryview, offset: int) -> bool:
        """Take it, or return False where that may take long."""
        place = self.place(offset, len(data))
        if place is not None:
            place.room[:] = data
            self.placed(place, offset)
            return True
        first, count = offset // CLUSTER_BYTES, -(-len(data) // CLUSTER_BYTES)
        with self._changed:
            if self.failure:
                return True
            # All of it has come before.
            is_known = self._arrivals.count_in(first, count) == count
            return is_known and is_whole(offset, len(data), self._size_bytes)

    def place(self, offset: int, length: int) -> IncomingWrite | None:
        """Give room for whole clusters of which none has come. They count when they are there."""
        first, count = offset // CLUSTER_BYTES, -(-length // CLUSTER_BYTES)
        with self._changed:
            if (
                self.failure
                or not is_whole(offset, length, self._size_bytes)
                or count > self.piece_clusters
                or self._turns
                or (self._hold_until and count >= _HOLD_CLUSTERS)
                or self._arrivals.count_in(first, count)
            ):
                return None
            position = self._room.take(whole_blocks(length))
            if position is None:
                return None
            self._enter(Chunk(first, count, position, length))
        return IncomingWrite(position, self._memory[position : position + length])

    def placed(self, write: IncomingWrite, offset: int) -> None:
        length = len(write.room)
        first, count = offset // CLUSTER_BYTES, -(-length // CLUSTER_BYTES)
        with self._changed:
            if not self.failure and not self._arrivals.count_in(first, count):
                self._arrivals.add(first, count)
                self._parts.forget(first, count)
                self._filled(write.position, length)
                return
        # Some of it came another way meanwhile.
        data = memoryview(bytes(write.room))
        self.unplaced(write)
        self.write(data, offset)

    def unplaced(self, write: IncomingWrite) -> None:
        with self._changed:
            self._filling.discard(write.position)
            left = [chunk for chunk in self._queue if chunk.position != write.position]
            self._queue = deque(left)
            self._room.give_back(write.position)
            # What is behind it, or waits for room, can go on.
            self._sleeping = True
            self._wake()
            self._changed.notify_all()

    def try_zeroes(self, offset: int, length: int) -> bool:
        """Do the same for zeroes: the hot path of a thin disk, which has thousands of them."""
        first, count = offset // CLUSTER_BYTES, -(-length // CLUSTER_BYTES)
        with self._changed:
            if self.failure:
                return True
            if (
                not is_whole(offset, length, self._size_bytes)
                or count > _RANGE_CLUSTERS
                or self._turns
                or self._is_crowded
            ):
                return False
            here = self._arrivals.count_in(first, count)
            if here:
                return here == count
            self._arrive_as_zeroes(first, count)
        return True

    def write(self, data: memoryview, offset: int) -> None:
        deadline = time.monotonic() + self._guest_wait_s
        if len(data) >= _HOLD_CLUSTERS * CLUSTER_BYTES:
            self._hold()
        for at, length in pieces(offset, len(data), self._size_bytes, self.piece_clusters):
            piece = data[at - offset : at - offset + length]
            if is_whole(at, length, self._size_bytes):
                self._take_in(piece, at, deadline)
            else:
                self._take_part(piece, at, deadline)

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        deadline = time.monotonic() + self._guest_wait_s
        for at, size in pieces(offset, length, self._size_bytes, _RANGE_CLUSTERS):
            if is_whole(at, size, self._size_bytes):
                self._take_zeroes(at // CLUSTER_BYTES, -(-size // CLUSTER_BYTES), deadline)
            else:
                self._take_part(bytes(size), at, deadline)

    def flush(self) -> None:
        """Data is safe when the archive is stored, and the coordinator knows when that is."""

    # --- inside ---

    def _hold(self) -> None:
        with self._changed:
            while not self.failure and (left_s := self._hold_until - time.monotonic()) > 0:
                self._changed.wait(left_s)
            self._hold_until = 0.0

    def _take_in(self, data: memoryview | bytes, offset: int, deadline: float) -> None:
        """Take whole clusters. Waits for room; returns at once when the backup is over."""
        first = offset // CLUSTER_BYTES
        while data:
            with self._changed:
                runs = self._arrivals.missing(first, first + cluster_count(len(data)))
                run = None if self.failure else next(runs, None)
                if run is None:
                    return
                start = (run[0] - first) * CLUSTER_BYTES
                piece = data[start : start + run[1] * CLUSTER_BYTES]
                # Claimed before the wait: the same cluster may come again meanwhile.
                self._arrivals.add(*run)
                self._parts.forget(*run)
                position = self._wait_for_room(whole_blocks(len(piece)), deadline)
                if position is None:
                    return
                self._enter(Chunk(run[0], run[1], position, len(piece)))
            self._fill(position, piece)
            data, first = data[start + len(piece) :], run[0] + run[1]

    def _take_part(self, data: memoryview | bytes, offset: int, deadline: float) -> None:
        with self._changed:
            cluster = offset // CLUSTER_BYTES
            if self.failure or self._arrivals.has(cluster):
                return
            try:
                whole = self._parts.add(offset, data)
            except TooManyPartialClusters:
                self._fail(
                    f"disk {self._name!r}: QEMU sends its clusters in pieces, and too many at "
                    "once; please report its version"
                )
                return
        if whole is not None:
            self._take_in(whole, cluster * CLUSTER_BYTES, deadline)

    def _take_zeroes(self, first: int, count: int, deadline: float) -> None:
        with self._changed:
            if not self._wait(lambda: not self._is_crowded, deadline):
                return
            for run in list(self._arrivals.missing(first, first + count)):
                self._arrive_as_zeroes(*run)

    @property
    def _is_crowded(self) -> bool:
        return len(self._queue) + len(self._zeroes) >= _MAX_WAITING

    def _arrive_as_zeroes(self, first: int, count: int) -> None:
        """Enter clusters that have not come before as zeroes. The lock is held."""
        self._arrivals.add(first, count)
        self._parts.forget(first, count)
        self._zeroes.add(first, count)
        # Else the sender takes them when it looks next, with those that come meanwhile.
        if not self.missing or self._is_crowded:
            self._zeroes_at = 0.0
            self._wake()

    def _queue_zeroes(self, now: float) -> None:
        """Queue the zeroes there are, when it is time. The lock is held."""
        if now >= self._zeroes_at or not self.missing:
            self._queue += self._zeroes.take()
            self._zeroes_at = now + _ZEROES_S

    def _enter(self, arriving: Chunk) -> None:
        """Queue a chunk, the lock being held, in the order of its room, whichever is filled first.

        The room is a ring, given back from its oldest piece on. Were that one sent
        last, nothing would be given back while the archiver's open extent holds it.
        """
        self._filling.add(arriving.position)
        self._queue.append(arriving)

    def _fill(self, position: int, data: memoryview | bytes) -> None:
        self._memory[position : position + len(data)] = data
        with self._changed:
            self._filled(position, len(data))

    def _filled(self, position: int, length: int) -> None:
        """The data of a chunk in the queue is there. The lock is held."""
        self._filling.discard(position)
        self.taken_bytes += length
        if self._job_speed.took(length, time.monotonic()):
            self._hold_until = time.monotonic() + _HOLD_S
            self._sleeping = True  # even if it waits for something else: QEMU reads on meanwhile
        if not self.failure:
            self._wake()

    def _queue_rest(self) -> None:
        """Queue some of what has not come, as the kind that it is. The lock is held."""
        arrivals, end = self._arrivals, self._arrivals.size
        while self.missing and len(self._queue) < _REST_RUNS:
            first = arrivals.next_missing(self._rest_from, end)
            longest = min(end, first + MAX_RUN_CLUSTERS)
            self._rest_from = arrivals.next_present(first, longest)
            arrivals.add(first, self._rest_from - first)
            self._queue.append(Chunk(first, self._rest_from - first, self._rest_kind, 0))

    def _wake(self) -> None:
        if self._sleeping:
            self._sleeping = False
            self._woken = True
            os.eventfd_write(self.fd, 1)

    def _wait_for_room(self, length: int, deadline: float) -> int | None:
        """Return room for `length` bytes; None: the backup is over. The lock is held."""
        taken: list[int] = []

        def take() -> bool:
            position = self._room.take(length)
            if position is not None:
                taken.append(position)
            return position is not None

        return taken[0] if self._wait(take, deadline) else None

    def _wait(self, reached: Callable[[], bool], deadline: float) -> bool:
        """Wait, in the order of coming; False: the backup is over. The lock is held."""
        if self.failure:
            return False
        if not self._turns and reached():
            return True
        self._wake()  # so that it is told that a write waits
        try:
            return self._turns.wait(reached, lambda: bool(self.failure), deadline)
        except TimeoutError:
            self._fail(
                f"disk {self._name!r}: a write has waited {self._guest_wait_s:.0f} s for "
                "the archiver to take older data; the guest goes on, the backup does not "
                "(allow more with --guest-wait, or more --buffer)"
            )
            return False

    def _fail(self, reason: str) -> None:
        if not self.failure:
            self.failure = reason
            self._queue.clear()
            self._zeroes.take()
        self._changed.notify_all()
        self._sleeping = True  # even if it waits for something else: credit
        self._wake()
