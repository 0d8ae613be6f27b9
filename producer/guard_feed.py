# SPDX-License-Identifier: Apache-2.0
"""The feed of a disk that a guard serves to a guest: saved clusters first, the rest in background.

What guests' writes have saved comes from the guard in slots of shared memory or a spool file
(SavedClusters). What no guest has written to yet is claimed and read here, one claim at a time
(BackgroundReader). GuardFeed decides which of the two is next.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.guard_client import GuardClient
from vmapipe.producer.runs import Run, largest_frame_bytes, packed, piece_bytes, whole_blocks
from vmapipe.producer.session import Session
from vmapipe.producer.shared_memory import RING_BYTES, Ring
from vmapipe.producer.transmit import REPORT_S, Buffered, Transfer
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.guard import (
    MAX_CLAIM_CLUSTERS,
    Claimed,
    FromGuard,
    GuardAttach,
    GuardBegun,
    GuardFelt,
    GuardWaiting,
    Saved,
    SavedHole,
)
from vmapipe.protocol.transfer import SharedCluster
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit, ignore
from vmapipe.runtime.process import yield_cpu
from vmapipe.runtime.rate_limit import RateLimiter
from vmapipe.runtime.syscalls import read_at

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import FeltEvent

# What a cluster takes of a frame's charge when all of it is data.
_FULL_CHARGE = limits.CHARGE_PER_CLUSTER + CLUSTER_BYTES
# Of a frame, if all of them are.
_MOST_SCATTERED = limits.MAX_PAYLOAD_BYTES // CLUSTER_BYTES


class SavedClusters:
    """The saved clusters that are not acknowledged yet; their slots are given back then.

    Slots below `memory_slots` lie behind the ring in its memory, the others in
    the spool file.
    """

    def __init__(
        self, size_bytes: int, memory_slots: int, spool_fd: int, ring: Ring, guard: GuardClient
    ) -> None:
        self.used_memory = self.used_spool = 0
        #: All that the guard has saved so far.
        self.saved_clusters = 0
        self._size_bytes = size_bytes
        self._memory_slots = memory_slots
        self._spool_fd = spool_fd
        self._ring = ring
        self._guard = guard
        # (cluster, slot), oldest first.
        self._waiting: deque[tuple[int, int] | SavedHole] = deque()
        # Slots that are free and not given back yet.
        self._free: list[int] = []

    def __bool__(self) -> bool:
        """Return whether there is something to send."""
        return bool(self._waiting)

    @property
    def is_many(self) -> bool:
        """True when there is enough for a full frame."""
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
        """Send as many as there are in memory, and as there may be in a frame."""
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
            session.send_scattered(clusters, lambda: self._free.extend(slots))
        return bool(clusters)

    def _send_run(self, session: Session, first: int, slot: int, most_clusters: int) -> bool:
        """Send adjacent memory slots as one run; spooled slots one at a time."""
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

    def give_back(self) -> None:
        """Give the slots back whose frames are acknowledged, all in one message."""
        if self._free:
            free, self._free = self._free, []
            spooled = self._spooled(free)
            self.used_spool -= spooled
            self.used_memory -= len(free) - spooled
            self._guard.release(free)

    def _consecutive(self, first: int, slot: int, most: int) -> int:
        """Return how many of the oldest, this one first, are adjacent on the disk and in memory."""
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
        session.send(run, lambda: self._free.extend(slots))

    def _send_from_spool(self, session: Session, first: int, slot: int, length: int) -> bool:
        position = self._ring.take(CLUSTER_BYTES)
        if position is None:
            return False
        target = self._ring.view[position : position + length]
        read_exactly(self._spool_fd, target, (slot - self._memory_slots) * CLUSTER_BYTES, "spool")
        run = packed(self._ring.view, position, first, length)
        session.send_from_ring(run)
        self._free.append(slot)
        return True


def read_exactly(fd: int, target: memoryview, offset: int, what: str) -> None:
    """Raises Failure."""

    def failed(at: int, error: OSError) -> Failure:
        return Failure(f"{what}: cannot read at offset {at}: {os_error_text(error)}")

    done = read_at(fd, target, offset, failed)
    if done < len(target):
        raise Failure(f"{what}: ended at offset {offset + done}: it was cut from outside")


# A guest that writes to what is being read waits for it: a megabyte is read
# within the time of a few of its own requests, even from a disk that turns.
_PIECE_CLUSTERS = 16
_ASK_AGAIN_S = 0.25


class BackgroundReader:
    """Claims and reads what no guest has written to: never more than can be read at once,
    because a guest may wait for it.
    """

    def __init__(
        self, name: str, ring: Ring, guard: GuardClient, limiter: RateLimiter, session: Session
    ) -> None:
        self._name = name
        self._ring = ring
        self._guard = guard
        self._limiter = limiter
        self._session = session
        #: The largest frame, in clusters.
        self.piece = 1
        self._fitted_to = self._longest_hole = self._least_credit = 0
        #: A claim is under way: what it needs is not to be used for anything else.
        self.asked = False
        #: From the disk, not counting holes.
        self.read_bytes = 0
        self._ask_at = 0.0
        self._next = 0

    def begin(self) -> None:
        """Fit the pieces to the archiver's frames."""
        # The limit may change meanwhile: the ring has room for the largest pieces.
        largest = piece_bytes(self._session.frame_bytes)
        self._ring.fit(min(_PIECE_CLUSTERS * CLUSTER_BYTES, largest))
        self._fit_pieces()

    def _fit_pieces(self) -> None:
        """Fit the pieces to the speed limit, so that it holds evenly."""
        frame_bytes = largest_frame_bytes(self._session.frame_bytes, self._limiter.bytes_per_s)
        self._fitted_to = self._limiter.bytes_per_s
        self.piece = min(_PIECE_CLUSTERS, piece_bytes(frame_bytes) // CLUSTER_BYTES)
        # A hole is one frame, however long, as long as its charge is allowed.
        room = frame_bytes - limits.CHARGE_PER_FRAME
        self._longest_hole = min(MAX_CLAIM_CLUSTERS, room // limits.CHARGE_PER_CLUSTER)
        self._least_credit = limits.charge(self.piece, self.piece * CLUSTER_BYTES)

    def ask(self) -> bool:
        """Claim the next piece, if it could be read at once; return whether that was done."""
        if self.asked or self.pause_s() > 0 or time.monotonic() < self._ask_at:
            return False
        if self._limiter.bytes_per_s != self._fitted_to:
            self._fit_pieces()
        if self._session.credit < self._least_credit:
            return False
        if self._ring.take(self.piece * CLUSTER_BYTES) is None:
            return False
        # The claim may begin behind `_next`, where guests were quicker.
        hole = (self._data_from(self._next * CLUSTER_BYTES) // CLUSTER_BYTES) - self._next
        if self._session.credit < limits.charge(self._longest_hole, 0):
            hole = 0
        self.asked = True
        self._guard.claim(max(self.piece, min(hole, self._longest_hole)))
        return True

    def pause_s(self) -> float:
        """Return how long until the speed limit allows more."""
        return 0.0 if self.asked else self._limiter.wait_s(time.monotonic())

    def take(self, claimed: Claimed) -> None:
        """Read and send what was claimed. Raises Failure."""
        self.asked = False
        first, clusters = claimed
        if not clusters:
            # Guests are copying the last ones, and may yet leave one to us.
            self._ask_at = time.monotonic() + _ASK_AGAIN_S
            return
        at, end = first * CLUSTER_BYTES, (first + clusters) * CLUSTER_BYTES
        data = self._data_from(at)
        hole = clusters if data >= end else (data - at) // CLUSTER_BYTES
        run = Run(first, hole, b"", 0, 0) if hole else self._read(first, min(clusters, self.piece))
        self._guard.copied(run.clusters)
        self._session.send_from_ring(run)
        if not hole:
            self._limiter.took(run.clusters * CLUSTER_BYTES, self._session.spoke)
        self._next = first + run.clusters

    def _read(self, first: int, clusters: int) -> Run:
        at = first * CLUSTER_BYTES
        length = min(clusters * CLUSTER_BYTES, self._guard.size_bytes - at)
        position = self._ring.take(whole_blocks(length))
        if position is None:
            raise RuntimeError("room in the ring has vanished")
        target = self._ring.view[position : position + length]
        read_exactly(self._guard.disk_fd, target, at, f"disk {self._name!r}")
        self.read_bytes += length
        return packed(self._ring.view, position, first, length)

    def _data_from(self, at: int) -> int:
        """Return where the next data is; a number beyond every cluster: there is none."""
        try:
            return os.lseek(self._guard.disk_fd, at, os.SEEK_DATA)
        except OSError:
            # A disk without any more data; or one that does not know holes, whose
            # SEEK_DATA does not fail.
            return 1 << 62


# From a producer being ready to the instant that the coordinator chooses.
_BEGIN_S = 60.0
# What is looked at between frames costs as much as a frame of one cluster. So many
# take a millisecond, in which no guest waits for us: a claim is not under way then.
_FRAMES_IN_A_ROW = 16
# What guests save within this time goes together: each message wakes five threads on
# its way into the archive, on processors that the guests need.
_GATHER_S = 0.002


class Buffering(NamedTuple):
    """The room for old data while the archiver is slow (sizes in bytes), and how long a guest waits.

    `spool_folder` is empty where there is to be no spool file.
    """

    memory_bytes: int
    spool_folder: str
    spool_bytes: int
    guest_wait_s: int

    @property
    def memory_slots(self) -> int:
        return self.memory_bytes // CLUSTER_BYTES

    @property
    def spool_slots(self) -> int:
        return self.spool_bytes // CLUSTER_BYTES if self.spool_folder else 0


def attach(
    name: str, guard: str, job: bytes, buffering: Buffering, ring: Ring, spool_fd: int
) -> GuardClient:
    """Attach to the guard at the socket `guard`; it saves into `ring` and the spool file.

    `spool_fd` -1: there is none. Raises Failure when the guard refuses.
    """
    if ring.fd is None:
        raise Failure(f"disk {name!r}: no shared memory is to be had (ulimit -f?)")
    message = GuardAttach(
        *(limits.VERSION, job, name, RING_BYTES),
        *(buffering.memory_slots, buffering.spool_slots, buffering.guest_wait_s),
    )
    return GuardClient(name, guard, message, [fd for fd in (ring.fd, spool_fd) if fd >= 0])


class GuardFeed:
    """A disk in use, as it was at the instant that the coordinator chooses."""

    def __init__(
        self,
        name: str,
        guard: GuardClient,
        session: Session,
        saved: SavedClusters,
        background: BackgroundReader,
        bound_s: float = 0.0,
    ) -> None:
        """`bound_s`: what guests may feel, of which is told then; 0: nothing is."""
        self.name = name
        self._bound_s = bound_s
        self._ask_felt_at = 0.0
        self._emit: Emit = ignore
        self._guard = guard
        self._session = session
        self._saved = saved
        self._background = background
        self._clusters = -(-guard.size_bytes // CLUSTER_BYTES)
        self._gather_until = 0.0
        self._begun = False
        self._waiting_writes = 0

    def begin(self, emit: Emit) -> None:
        """Wait for the instant."""
        self._emit = emit
        self._session.watch(self._guard.fd)
        self._background.begin()
        emit({"event": "attached", "device": self.name})
        deadline = time.monotonic() + _BEGIN_S
        self._receive()
        while not self._begun:
            self._session.step(1.0)
            self._receive()
            if time.monotonic() > deadline:
                raise Failure(f"disk {self.name!r}: no instant was announced in time")

    @property
    def ended(self) -> bool:
        return self._session.sent_clusters >= self._clusters

    @property
    def pause_s(self) -> float:
        return self._background.pause_s() or REPORT_S

    def advance(self) -> bool:
        self._receive()
        if self.ended:
            return False
        # What guests' writes saved comes first: it takes room that others wait for.
        # Not while a claim is under way: it was asked for with the credit and the
        # room that there were then.
        saved, background = self._saved, self._background
        now = time.monotonic()
        gather_s = self._gather_until - now if saved and not saved.is_many else 0.0
        if saved and gather_s <= 0 and not background.asked:
            did = self._send_saved()
            self._gather_until = now + _GATHER_S
        else:
            did = background.ask()
        if did:
            yield_cpu()
        elif gather_s > 0 and not background.asked:
            time.sleep(gather_s)
            did = True
        return did

    def _send_saved(self) -> bool:
        """Send some frames in a row; False: credit or room is missing for the first."""
        sent = 0
        while self._saved and sent < _FRAMES_IN_A_ROW:
            if not self._saved.send(self._session, self._background.piece):
                break
            sent += 1
        return sent > 0

    @property
    def buffered(self) -> Buffered:
        memory, spool = self._saved.used_memory, self._saved.used_spool
        return Buffered(memory * CLUSTER_BYTES, spool * CLUSTER_BYTES, self._waiting_writes)

    @property
    def transfer(self) -> Transfer:
        sent_bytes = self._session.sent_bytes
        return Transfer(self._background.read_bytes, sent_bytes, self._saved.saved_clusters)

    def check(self) -> None:
        self._saved.give_back()
        if self._bound_s and (now := time.monotonic()) >= self._ask_felt_at:
            self._ask_felt_at = now + REPORT_S
            self._guard.ask_felt(self._bound_s)

    def finish(self) -> None: ...

    def fail(self, reason: str) -> None: ...

    def leave(self) -> None: ...

    def _receive(self) -> None:
        while (message := self._guard.receive()) is not None:
            self._take(message)

    def _take(self, message: FromGuard) -> None:
        match message:
            case GuardBegun():
                self._begun = True
            case Claimed() if self._begun:
                self._background.take(message)
            case Saved() | SavedHole():
                self._saved.add(message)
            case GuardFelt(requests, slow, p99_us):
                event: FeltEvent = {
                    "event": "felt",
                    "device": self.name,
                    "requests": requests,
                    "slow": slow,
                    "p99_s": p99_us / 1e6,
                }
                self._emit(event)
            case GuardWaiting(writes):
                self._waiting_writes = writes
            case _:
                raise RemoteProtocolError("sequence", f"{type(message).__name__} from the guard")


def open_spool(folder: str) -> int:
    """Open a file without a name, of which nothing is ever left. Raises Failure."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise Failure(f"cannot make a spool file in {folder}: {os_error_text(error)}") from error
