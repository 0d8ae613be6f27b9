# SPDX-License-Identifier: Apache-2.0
"""Turns an archive's extents into pieces of work, and keeps count of who has which. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from vmapipe.protocol.frames import Part
from vmapipe.protocol.restore_work import (
    MAX_RANGE_EXTENTS,
    ExtentWork,
    RangeWork,
    SyncWork,
    encode,
)
from vmapipe.restore.reading import Piece
from vmapipe.vma.extent import Extent
from vmapipe.vma.layout import CLUSTER_BYTES

# A piece of work out of a file: large enough that handing it out costs
# nothing, small enough that several workers end at about the same time.
_RANGE_BYTES = 8 << 20
# What workers may hold of an archive that comes in messages, all together;
# below the second figure a worker could not hold two extents.
CREDIT_BYTES = 32 << 20
_MIN_WORKER_CREDIT_BYTES = 8 << 20
# Out of a file: one piece being written, the next one waiting.
_RANGES_AHEAD = 2


@dataclass(slots=True)
class Totals:
    """What the extents so far hold, in bytes; clusters in full, also a device's last one.

    `clusters` of all devices; `zero_cluster_bytes`: of clusters that are all
    zero; `zero_block_bytes`: of zero blocks inside the others; `data_bytes`:
    what is stored. `archive_bytes`: of the plain archive, header included.
    """

    archive_bytes: int = 0
    extents: int = 0
    clusters: int = 0
    data_bytes: int = 0
    zero_cluster_bytes: int = 0
    zero_block_bytes: int = 0

    @property
    def cluster_bytes(self) -> int:
        return self.clusters * CLUSTER_BYTES

    def add(self, extent: Extent) -> None:
        self.archive_bytes = extent.offset + extent.total_bytes
        self.extents += 1
        clusters = sum(run.count for run in extent.runs)
        zero_bytes = CLUSTER_BYTES * sum(run.masks.count(0) for run in extent.runs)
        self.clusters += clusters
        self.data_bytes += extent.data_bytes
        self.zero_cluster_bytes += zero_bytes
        self.zero_block_bytes += clusters * CLUSTER_BYTES - zero_bytes - extent.data_bytes


@dataclass(slots=True)
class Work:
    """One message to a worker. `parts` is empty where there is nothing to do.

    `cost_bytes`: of memory that it takes while under way; `cluster_bytes`: of
    the devices it covers, for progress; `data_bytes`: per limited device.
    """

    seq: int
    parts: list[Part]
    cost_bytes: int
    cluster_bytes: int
    data_bytes: dict[int, int]


@dataclass
class WorkMaker:
    """Makes work out of pieces. `totals` counts all pieces, wanted or not.

    `wanted`: the devices that are restored; `zeroed`: those of them where
    zeroes are written; `limited`: those with a limit of their own.
    """

    wanted: Collection[int]
    zeroed: Collection[int]
    limited: Collection[int] = ()
    totals: Totals = field(default_factory=Totals)
    _seq: int = 0

    def works(self, pieces: Iterator[Piece]) -> Iterator[Work]:
        batch: list[Piece] = []
        batch_bytes = 0
        for piece in pieces:
            self.totals.add(piece.extent)
            if not self._has_work(piece):
                yield self._work([], [piece])
            elif piece.data is not None:
                yield self._work(self._message_of(piece), [piece], piece.extent.total_bytes)
            else:
                batch.append(piece)
                batch_bytes += piece.extent.total_bytes
                if batch_bytes >= _RANGE_BYTES or len(batch) == MAX_RANGE_EXTENTS:
                    yield self._work(self._range_of(batch), batch)
                    batch = []
                    batch_bytes = 0
        if batch:
            yield self._work(self._range_of(batch), batch)

    def syncs(self, dev_ids: Iterable[int]) -> Iterator[Work]:
        """Bring these targets to the disk."""
        for dev_id in dev_ids:
            self._seq += 1
            yield Work(self._seq, encode(SyncWork(self._seq, dev_id)), 0, 0, {})

    def _has_work(self, piece: Piece) -> bool:
        if piece.digest:
            return True
        return any(
            run.dev_id in self.zeroed or (run.dev_id in self.wanted and not run.is_zero)
            for run in piece.extent.runs
        )

    def _message_of(self, piece: Piece) -> list[Part]:
        return encode(
            ExtentWork(
                self._seq + 1,
                piece.extent.offset,
                piece.digest,
                memoryview(piece.raw_header),
                memoryview(piece.data or b""),
            )
        )

    def _range_of(self, batch: list[Piece]) -> list[Part]:
        return encode(
            RangeWork(
                self._seq + 1,
                tuple(piece.extent.offset for piece in batch),
                tuple(piece.extent.total_bytes for piece in batch),
                tuple(piece.digest for piece in batch if piece.digest),
            )
        )

    def _work(self, parts: list[Part], batch: list[Piece], cost_bytes: int = 0) -> Work:
        self._seq += 1
        runs = [run for piece in batch for run in piece.extent.runs]
        data_bytes: dict[int, int] = {}
        for run in runs if self.limited else ():
            if run.dev_id in self.limited:
                data_bytes[run.dev_id] = data_bytes.get(run.dev_id, 0) + run.data_bytes
        cluster_bytes = CLUSTER_BYTES * sum(run.count for run in runs)
        return Work(self._seq, parts, cost_bytes, cluster_bytes, data_bytes)


class Roster:
    """Which worker has which work; decides who gets the next piece."""

    def __init__(self, worker_count: int) -> None:
        self._credit = max(_MIN_WORKER_CREDIT_BYTES, CREDIT_BYTES // max(1, worker_count))
        self._held: dict[str, dict[int, Work]] = {}

    def joined(self, worker: str) -> None:
        self._held[worker] = {}

    @property
    def workers(self) -> list[str]:
        return list(self._held)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not any(self._held.values())

    def free_worker(self, cost_bytes: int) -> str | None:
        """Who takes a piece of this cost now: the one with least to do, or nobody."""
        worker = min(self._held, key=lambda w: len(self._held[w]), default=None)
        if worker is None:
            return None
        held = self._held[worker].values()
        taken = sum(work.cost_bytes for work in held)
        fits = taken + cost_bytes <= self._credit if cost_bytes else len(held) < _RANGES_AHEAD
        return worker if fits or not held else None

    def gave(self, worker: str, work: Work) -> None:
        self._held[worker][work.seq] = work

    def done(self, worker: str, seq: int) -> Work | None:
        """The work that is done; None when this worker does not have it."""
        return self._held.get(worker, {}).pop(seq, None)
