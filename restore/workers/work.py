# SPDX-License-Identifier: Apache-2.0
"""Pieces of work for the workers: made out of extents, counted, limited in rate, and fed in order.

`WorkBuilder`, `Marks`, `WorkerTable` and `RateLimits` are pure; the feeds get the next piece
of work without ever making the coordinator wait for it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.restore import (
    MAX_RANGE_EXTENTS,
    ExtentWork,
    RangeWork,
    SyncWork,
    encode,
)
from vmapipe.protocol.schema import Part
from vmapipe.restore.archive.reader import ArchiveTotals, FoundExtent
from vmapipe.runtime.rate_limit import RateLimiter
from vmapipe.vma.extent import Extent

# A piece of work out of a file: small enough that several workers end at about the
# same time. Each is four wake-ups on cores that are busy: with 8 MiB, 4 GiB onto a
# tmpfs file took 1.06 s in place of 0.96.
_RANGE_BYTES = 32 << 20
# Where a limit holds, it holds more evenly so.
_LIMITED_RANGE_BYTES = 8 << 20
#: Stands for all devices together where bytes are counted by dev_id.
ALL_DEVICES = 0
# Out of a file: one piece being written, the next one waiting.
_RANGES_AHEAD = 2
# Extents whose data came along are bounded by their memory (`slots`); those
# that are all zero by this, and make some hundred KiB of messages.
_EXTENTS_AHEAD = 64
# Read ahead of the workers. The memory of data is bounded by its slots; this
# is for archives that hold nothing but zeroes.
_AHEAD_WORKS = 256
# A thread that was told to stop ends at its next read; a hung disk may keep it.
_JOIN_S = 5.0


class Work(NamedTuple):
    """A message to a worker. `parts` is empty where there is nothing to do.

    `ahead`: how many like it one worker may have; `cluster_bytes`: of the
    devices it covers, for progress; `data_bytes`: per limited device; `slot`:
    what is free when it is done, or -1; `end`: where in the archive it ends; `extents`: those
    of it, of which the worker may call some damaged.
    """

    seq: int
    parts: list[Part]
    ahead: int
    cluster_bytes: int
    data_bytes: dict[int, int]
    slot: int = -1
    end: int = 0
    extents: tuple[Extent, ...] = ()


class WorkBuilder:
    """Makes work out of pieces. `totals` counts all pieces, wanted or not.

    `wanted`: the devices that are restored; `zeroed`: those of them where
    zeroes are written; `limited`: those with a limit of their own, and ALL_DEVICES;
    `from_stream`: the data comes along, extent by extent, in slots; `written_before`: what
    lies before this offset of the archive may be on the targets already.
    """

    def __init__(
        self,
        wanted: Collection[int],
        zeroed: Collection[int],
        limited: Collection[int] = (),
        *,
        from_stream: bool = False,
        written_before: int = 0,
    ) -> None:
        self.totals = ArchiveTotals()
        self._wanted = wanted
        self._zeroed = zeroed
        self._limited = limited
        self._from_stream = from_stream
        self._written_before = written_before
        self._seq = 0

    def works(self, pieces: Iterator[FoundExtent]) -> Iterator[Work]:
        batch: list[FoundExtent] = []
        batch_bytes = 0
        most_bytes = _LIMITED_RANGE_BYTES if self._limited else _RANGE_BYTES
        for piece in pieces:
            self.totals.add(piece.extent)
            if not self._has_work(piece):
                yield self._work([], [piece], slot=piece.slot)
            elif piece.left_out and not self._from_stream:
                # Alone: what is left out is counted in one extent.
                yield self._work(self._range_of([piece]), [piece])
            elif self._from_stream:
                parts = self._message_of(piece)
                yield self._work(parts, [piece], _EXTENTS_AHEAD, piece.slot)
            else:
                if batch and bool(piece.digest) != bool(batch[0].digest):
                    # The manifest has ended too early: digests for all of a message, or for none.
                    yield self._work(self._range_of(batch), batch)
                    batch, batch_bytes = [], 0
                batch.append(piece)
                size_bytes = piece.extent.total_bytes
                batch_bytes += size_bytes
                last = piece.extent.offset + size_bytes == self._written_before
                if last or batch_bytes >= most_bytes or len(batch) == MAX_RANGE_EXTENTS:
                    yield self._work(self._range_of(batch), batch)
                    batch = []
                    batch_bytes = 0
        if batch:
            yield self._work(self._range_of(batch), batch)

    def syncs(self, dev_ids: Iterable[int]) -> Iterator[Work]:
        """Bring these targets to the disk."""
        for dev_id in dev_ids:
            self._seq += 1
            yield Work(self._seq, encode(SyncWork(self._seq, dev_id)), _RANGES_AHEAD, 0, {})

    def _has_work(self, piece: FoundExtent) -> bool:
        if piece.digest:
            return True
        return any(
            run.dev_id in self._zeroed or (run.dev_id in self._wanted and not run.is_zero)
            for run in piece.extent.runs
        )

    def _message_of(self, piece: FoundExtent) -> list[Part]:
        return encode(
            ExtentWork(
                self._seq + 1,
                piece.extent.offset,
                piece.digest,
                piece.raw_header,
                max(piece.slot, 0),
                piece.extent.offset < self._written_before,
                tuple(sorted(piece.left_out)),
            )
        )

    def _range_of(self, batch: list[FoundExtent]) -> list[Part]:
        return encode(
            RangeWork(
                self._seq + 1,
                tuple([piece.extent.offset for piece in batch]),
                tuple([piece.extent.total_bytes for piece in batch]),
                tuple([piece.digest for piece in batch]) if batch[0].digest else (),
                batch[0].extent.offset < self._written_before,
                tuple(sorted(batch[0].left_out)),
            )
        )

    def _work(
        self,
        parts: list[Part],
        batch: list[FoundExtent],
        ahead: int = _RANGES_AHEAD,
        slot: int = -1,
    ) -> Work:
        self._seq += 1
        runs = [run for piece in batch for run in piece.extent.runs]
        data_bytes: dict[int, int] = {}
        for run in runs if self._limited else ():
            if run.dev_id in self._limited:
                data_bytes[run.dev_id] = data_bytes.get(run.dev_id, 0) + run.data_bytes
            if ALL_DEVICES in self._limited and run.dev_id in self._wanted:
                data_bytes[ALL_DEVICES] = data_bytes.get(ALL_DEVICES, 0) + run.data_bytes
        cluster_bytes = CLUSTER_BYTES * sum([len(run.masks) for run in runs])
        end = batch[-1].extent.offset + batch[-1].extent.total_bytes
        extents = tuple([piece.extent for piece in batch]) if parts else ()
        return Work(self._seq, parts, ahead, cluster_bytes, data_bytes, slot, end, extents)


class Marks:
    """`mark`: the offset in the archive before which all work is done, in whatever order it was."""

    def __init__(self) -> None:
        self.mark = 0
        self._next_seq = 1
        self._ends: dict[int, int] = {}

    def done(self, work: Work) -> None:
        self._ends[work.seq] = work.end
        while self._next_seq in self._ends:
            self.mark = max(self.mark, self._ends.pop(self._next_seq))
            self._next_seq += 1


class WorkerTable:
    """Record of which worker has which work; decides which one gets the next piece."""

    def __init__(self) -> None:
        self._held: dict[str, dict[int, Work]] = {}

    def joined(self, worker: str) -> None:
        self._held[worker] = {}

    @property
    def workers(self) -> list[str]:
        return list(self._held)

    @property
    def idle(self) -> bool:
        """True when no work is under way."""
        return not any(self._held.values())

    def free_worker(self, work: Work) -> str | None:
        """Return the worker that takes this work now, the one with least to do; None: all are busy."""
        worker = min(self._held, key=lambda w: len(self._held[w]), default=None)
        if worker is None or len(self._held[worker]) >= work.ahead:
            return None
        return worker

    def gave(self, worker: str, work: Work) -> None:
        self._held[worker][work.seq] = work

    def done(self, worker: str, seq: int) -> Work | None:
        """The work that is done; None when this worker does not have it."""
        return self._held.get(worker, {}).pop(seq, None)


class InlineFeed:
    """For a file: the next headers are there in microseconds."""

    fd = -1

    def __init__(self, works: Iterator[Work]) -> None:
        self.ended = False
        self._works = works

    def poll(self) -> Work | None:
        """The next work; None at the end. Raises what reading raises."""
        work = next(self._works, None)
        self.ended = work is None
        return work

    def close(self) -> None:
        pass


class ThreadFeed:
    """For a pipe: a thread reads, `fd` becomes readable when there is something to poll."""

    def __init__(self, works: Iterator[Work], *stops: Callable[[], None]) -> None:
        """`stops` make the thread end whatever it waits for."""
        self.ended = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._works = works
        self._stops = stops
        self._queue: deque[Work] = deque()
        self._exhausted = False
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="archive-reader", daemon=True)
        self._thread.start()

    def poll(self) -> Work | None:
        """The next work, if there is one yet; `ended` tells. Raises what reading raised."""
        with self._changed:
            if self._queue:
                work = self._queue.popleft()
                self._changed.notify()
                return work
            if self._error is not None:
                raise self._error
            self.ended = self._exhausted
            if not self.ended:
                # Nothing is there: only now may the descriptor fall silent.
                try:
                    os.eventfd_read(self.fd)
                except BlockingIOError:
                    pass
            return None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        for stop in self._stops:
            stop()
        self._thread.join(_JOIN_S)
        os.close(self.fd)

    def _read(self) -> None:
        try:
            for work in self._works:
                if not self._put(work):
                    return
        except BaseException as error:  # noqa: BLE001  raised again by `poll`
            self._error = error
        with self._changed:
            self._exhausted = True
            if not self._closed:
                os.eventfd_write(self.fd, 1)

    def _put(self, work: Work) -> bool:
        """Queue the work; return False after `close`."""
        with self._changed:
            while not self._closed and len(self._queue) >= _AHEAD_WORKS:
                self._changed.wait()
            if self._closed:
                return False
            self._queue.append(work)
            os.eventfd_write(self.fd, 1)
            return True


Feed = InlineFeed | ThreadFeed


class RateLimits:
    """The speed limits of the devices that have one: work waits until all of its devices allow it."""

    def __init__(self, bytes_per_s: Mapping[int, int], now: float) -> None:
        """`bytes_per_s` by dev_id."""
        self._limiters = {dev_id: RateLimiter(limit, now) for dev_id, limit in bytes_per_s.items()}

    def wait_s(self, data_bytes: Mapping[int, int], now: float) -> float:
        """Return how long a piece with these bytes, by dev_id, has to wait."""
        return max((self._limiters[dev_id].wait_s(now) for dev_id in data_bytes), default=0.0)

    def took(self, data_bytes: Mapping[int, int], now: float) -> None:
        for dev_id, size in data_bytes.items():
            self._limiters[dev_id].took(size, now)
