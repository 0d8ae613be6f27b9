# SPDX-License-Identifier: Apache-2.0
"""The feed of a disk at rest: reads it in order and cuts it into runs that fit a frame."""

from __future__ import annotations

import functools
import time

from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_CLUSTERS
from vmapipe.producer.outbox import Outbox
from vmapipe.producer.runs import MOST_CLUSTERS, Run, largest_frame_bytes, packed, piece_bytes
from vmapipe.producer.session import Session
from vmapipe.producer.shared_memory import Ring
from vmapipe.producer.source import Source
from vmapipe.producer.transmit import NOT_BUFFERED, REPORT_S, Transfer
from vmapipe.protocol import limits
from vmapipe.runtime.events import Emit
from vmapipe.runtime.rate_limit import RateLimiter

# A hole is passed in steps of 64 GiB: what is cut in one step stays a short list.
_HOLE_STEP_BYTES = 1 << 36


class RunCutter:
    """Cuts a disk into runs, in order, each with a charge of at most `frame_bytes`.

    Data is read into `memory`. Zero clusters, holes or read ones, go with the data beside
    them as far as the archive's extent goes; the rest is a run without data. Clusters from
    `_zero_from` to the open run (or to `_next`) are zero.
    """

    def __init__(self, source: Source, memory: memoryview, frame_bytes: int) -> None:
        self._source = source
        self._memory = memory
        self._frame_bytes = frame_bytes
        spare = frame_bytes - limits.CHARGE_PER_FRAME
        self._longest_zero = min(limits.MAX_RUN_CLUSTERS, spare // limits.CHARGE_PER_CLUSTER)
        self._next = self._zero_from = 0
        # The open run.
        self._masks = bytearray()
        #: Its clusters; 0: there is none, and the next `read` begins one at a free position.
        self.open_clusters = 0
        self._position = self._filled = self._largest = self._step_bytes = self._most = 0
        #: From the disk, not counting holes.
        self.read_bytes = 0
        self._segments = source.segments()
        self._at = 0
        #: True: the whole disk has been cut.
        self.ended = False
        #: True: `pass_hole` comes next, and not `read`.
        self.at_hole = False
        self._next_segment()

    def _next_segment(self) -> None:
        segment = self._segment = next(self._segments, None)
        self.ended = segment is None
        self.at_hole = segment is not None and not segment.is_data
        self._at = segment.start if segment is not None else self._at

    def pass_hole(self) -> list[Run]:
        """Take the next part of a hole as zeroes; return the runs that are complete."""
        if self._segment is None:
            return []
        stop = min(self._segment.end, self._at + _HOLE_STEP_BYTES)
        runs = self._zeroes(-(-stop // CLUSTER_BYTES))
        return runs + self._passed(stop)

    def read(self, step_bytes: int, position: int) -> list[Run]:
        """Read at most `step_bytes`; return the runs that are complete. Raises DiskSourceError.

        A run that begins here lies at `position` and has at most `step_bytes` of data.
        """
        if self._segment is None:
            return []
        self._step_bytes = step_bytes
        length = min(self._segment.end - self._at, self._room(position))
        at = self._position + self._filled
        self._source.read_into(self._memory[at : at + length], self._at)
        self.read_bytes += length
        runs = self._add(packed(self._memory, at, self._next, length))
        if self._at + length < self._segment.end:
            self._at += length
            return runs
        return runs + self._passed(self._at + length)

    def _passed(self, at: int) -> list[Run]:
        """Go on at offset `at`, perhaps with the next segment; return the last runs at the disk's end."""
        self._at = at
        if self._segment is not None and at >= self._segment.end:
            self._next_segment()
            if self.ended:
                return self._cut() + self._zero_runs(self._next)
        return []

    def _room(self, position: int) -> int:
        """Return how many bytes may be read next, to the end of the open run."""
        if not self.open_clusters:
            self._largest = self._step_bytes
            spare = self._frame_bytes - limits.CHARGE_PER_FRAME - self._largest
            self._most = min(MOST_CLUSTERS, spare // limits.CHARGE_PER_CLUSTER)
            self._position, self._filled = position, 0
        clusters = min(
            min(self._step_bytes, self._largest - self._filled) // CLUSTER_BYTES,
            self._most - self.open_clusters,
            EXTENT_CLUSTERS - self._next % EXTENT_CLUSTERS,
        )
        return clusters * CLUSTER_BYTES

    def _add(self, run: Run) -> list[Run]:
        """Add what was read to the open run."""
        if not run.masks:
            return self._zeroes(self._next + run.clusters)
        runs = []
        if not self.open_clusters:
            before = min(
                self._next - self._zero_from,
                self._next % EXTENT_CLUSTERS,
                self._most - run.clusters,
            )
            if self._next - before > self._zero_from:
                runs = self._zero_runs(self._next - before)
            self._masks += bytes(2 * before)
            self.open_clusters = before
        self._masks += run.masks
        self.open_clusters += run.clusters
        self._filled += run.length
        self._next += run.clusters
        return runs + self._cut_if_full()

    def _zeroes(self, stop: int) -> list[Run]:
        """Take the clusters up to `stop` as zero."""
        runs = []
        while self.open_clusters and self._next < stop:
            count = min(
                stop - self._next,
                self._most - self.open_clusters,
                EXTENT_CLUSTERS - self._next % EXTENT_CLUSTERS,
            )
            self._masks += bytes(2 * count)
            self.open_clusters += count
            self._next += count
            # What is zero as far as the next extent's end needs no masks.
            runs += self._cut_if_full(ahead=stop - self._next)
        self._next = stop
        if not self.open_clusters:
            # Less than an extent may yet go with the data behind it.
            complete = (stop - self._zero_from - EXTENT_CLUSTERS) // self._longest_zero
            runs += self._zero_runs(self._zero_from + max(0, complete) * self._longest_zero)
        return runs

    def _cut_if_full(self, ahead: int = 0) -> list[Run]:
        left = self._largest - self._filled
        full = left < CLUSTER_BYTES or self.open_clusters >= self._most
        # Under a lower speed limit than it was begun with, it would take long to fill.
        full = full or self._filled >= self._step_bytes
        if not self._next % EXTENT_CLUSTERS:
            # A frame that ends with an extent is written, and its memory free, at once.
            full = full or left < EXTENT_CLUSTERS // 2 * CLUSTER_BYTES or ahead >= EXTENT_CLUSTERS
        return self._cut() if full else []

    def _cut(self) -> list[Run]:
        if not self.open_clusters:
            return []
        first = self._next - self.open_clusters
        run = Run(first, self.open_clusters, bytes(self._masks), self._position, self._filled)
        self._masks.clear()
        self.open_clusters = 0
        self._zero_from = self._next
        return [run]

    def _zero_runs(self, stop: int) -> list[Run]:
        firsts = range(self._zero_from, stop, self._longest_zero)
        self._zero_from = stop
        return [Run(first, min(self._longest_zero, stop - first), b"", 0, 0) for first in firsts]


class DiskFeed:
    """A disk that does not change while it is read, at the speed that `limiter` allows."""

    buffered = NOT_BUFFERED

    def __init__(self, source: Source, ring: Ring, session: Session, limiter: RateLimiter) -> None:
        self.name = source.name
        self.ended = False
        self.pause_s = REPORT_S
        self._source = source
        self._ring = ring
        self._session = session
        self._limiter = limiter
        # How much is read for one frame: as large as the speed limit is now, and not before.
        self._piece_bytes = 0
        self._sized_for: int | None = None
        self._cutter: RunCutter | None = None
        self._outbox = Outbox(session, ring.view)
        self._read_bytes = 0

    def begin(self, emit: Emit) -> None:
        self._cutter = RunCutter(self._source, self._ring.view, self._session.frame_bytes)

    def advance(self) -> bool:
        if self._cutter is None:
            raise RuntimeError("not begun")
        self.pause_s = REPORT_S
        cutter, outbox = self._cutter, self._outbox
        if outbox.waiting and not outbox.advance():
            return False
        did = True
        if not outbox.waiting and not cutter.ended:
            # Before the wait for the archiver, which writes meanwhile what it has got.
            did = self._cut(cutter) and (not outbox.waiting or outbox.advance())
        self.ended = cutter.ended and not outbox.waiting
        return did

    def _cut(self, cutter: RunCutter) -> bool:
        """Read, or pass, the next piece; False: the speed limit, or a full ring, forbids it now."""
        if cutter.at_hole:
            runs = cutter.pass_hole()
        else:
            now = time.monotonic()
            pause_s = self._limiter.wait_s(now)
            if pause_s > 0:
                self.pause_s = pause_s
                return False
            if self._sized_for != self._limiter.bytes_per_s:
                self._sized_for = self._limiter.bytes_per_s
                frame_bytes = largest_frame_bytes(self._session.frame_bytes, self._sized_for)
                self._piece_bytes = piece_bytes(frame_bytes)
                self._ring.fit(self._piece_bytes)
            position = 0 if cutter.open_clusters else self._ring.take(self._piece_bytes)
            if position is None:
                return False
            runs = cutter.read(self._piece_bytes, position)
            # Holes are not counted: nothing is read there.
            self._limiter.took(cutter.read_bytes - self._read_bytes, now)
            self._read_bytes = cutter.read_bytes
        for run in runs:
            on_ack = None
            if run.length:
                # Its piece of the ring is held until it is free.
                self._ring.hold(run.position, run.length)
                on_ack = functools.partial(self._ring.free, run.position)
            self._outbox.put(run, on_ack)
        return True

    @property
    def transfer(self) -> Transfer:
        return Transfer(self._read_bytes, self._session.sent_bytes, 0)

    def check(self) -> None: ...

    def finish(self) -> None:
        self._source.check_unchanged()

    def fail(self, reason: str) -> None: ...

    def leave(self) -> None: ...
