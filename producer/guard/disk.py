# SPDX-License-Identifier: Apache-2.0
"""A disk that is served to a guest, and may be backed up meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.guard.backup import BackupOver, DiskBackup
from vmapipe.producer.guard.image import Image
from vmapipe.producer.guard.peer import GuardPeer
from vmapipe.producer.nbd.backend import Write, one_by_one
from vmapipe.protocol.guard import MAX_SAVED_CLUSTERS, GuardAttach
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.latency import Felt, LatencyCounts

# A guest notices a second, and none minds: by then the writes that are under
# way have ended, or the disk is so slow that the backup should not begin.
HOLD_S = 5.0

# A trim of more than this is left out while its clusters are not copied: a
# guest's mkfs or fstrim trims gigabytes at once, which would have to be saved
# before it is answered.
_TRIM_BYTES = 64 << 20


class ServedDisk:
    """The `Backend` of an export: reads pass; a write first waits for what has to be saved."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._changed = threading.Condition(threading.Lock())
        self._writes = 0
        self._held = False
        self._job: DiskBackup | None = None
        # What guests feel, while a backup wants to know. Threads may lose each other's count: one
        # in millions.
        self._felt: LatencyCounts | None = None

    # --- for the guest ---

    def try_read(self, target: memoryview, offset: int) -> bool:
        if self._felt is None:
            return self.image.try_read(target, offset)
        started = time.perf_counter_ns()
        is_done = self.image.try_read(target, offset)
        self._count(started, int(is_done))
        return is_done

    def read(self, target: memoryview, offset: int) -> None:
        started = time.perf_counter_ns()
        self.image.read(target, offset)
        self._count(started)

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        if self._felt is None:
            return self._try_writes(writes)
        started = time.perf_counter_ns()
        outcomes = self._try_writes(writes)
        self._count(started, len(outcomes))
        return outcomes

    def _try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        with self._changed:
            # All of them in one go, where there is nothing to be saved.
            pass_all = not self._held and self._saving is None
            if pass_all:
                self._writes += len(writes)
        if not pass_all:
            return one_by_one(self._try_write, writes)
        try:
            return one_by_one(self._write_now, writes)
        finally:
            self._written(len(writes))

    def _write_now(self, data: memoryview, offset: int) -> bool:
        self.image.write(data, offset)
        return True

    def _try_write(self, data: memoryview, offset: int) -> bool:
        if not self._admit_at_once(offset, len(data)):
            return False
        try:
            self.image.write(data, offset)
        finally:
            self._written()
        return True

    def try_zeroes(self, offset: int, length: int) -> bool:
        return False  # a file system may take long to make a hole

    def settle(self, *, idle: bool) -> None:
        job = self._job
        if job is not None and job.untold:
            with self._changed:
                job.tell(at_once=idle)

    def write(self, data: memoryview, offset: int) -> None:
        started = time.perf_counter_ns()
        self._change(offset, len(data), lambda: self.image.write(data, offset))
        self._count(started)

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        self._change(
            offset,
            length,
            lambda: self.image.write_zeroes(offset, length, may_hole=may_hole, fast_only=fast_only),
        )

    def trim(self, offset: int, length: int) -> None:
        if length > _TRIM_BYTES and not self._is_free(offset, length):
            return  # it is only a hint, and saving all of it would take too long
        self._change(offset, length, lambda: self.image.trim(offset, length))

    def flush(self) -> None:
        self.image.flush()

    def cache(self, offset: int, length: int) -> None:
        self.image.cache(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self.image.extents(offset, length)

    # --- for a backup ---

    def attach(self, attach: GuardAttach, peer: GuardPeer, fds: Sequence[int]) -> DiskBackup:
        """A backup wants to begin. Takes over the descriptors. Raises Failure, OSError, ValueError."""
        with self._changed:
            if self._job is not None:
                raise Failure(f"disk {self.image.name!r}: a backup of it is running already")
            self._job = DiskBackup(attach, self.image, peer, self._changed, fds)
            return self._job

    def detach(self, job: DiskBackup) -> None:
        """It has ended, well or not."""
        with self._changed:
            job.end()
            if self._job is job:
                self._job = self._felt = None

    def take_felt(self, bound_s: float) -> Felt:
        """Return what guests have felt since the last call, or begin to count. The lock is held."""
        if self._felt is None or self._felt.bound_s != bound_s:
            self._felt = LatencyCounts(bound_s)
        return self._felt.take()

    def hold(self) -> None:
        """No write begins from now on. Raises Failure."""
        with self._changed:
            if self._held:
                raise Failure(f"disk {self.image.name!r}: its writes are being held already")
            self._held = True

    def wait_until_held(self, deadline: float) -> None:
        """Wait until no write is under way. Raises Failure; `release` is then still to be called."""
        with self._changed:
            while self._writes:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise Failure(
                        f"disk {self.image.name!r}: the guest's writes have not come to an end "
                        f"within {HOLD_S:.0f} s; {self.image.path} may be too busy or hung"
                    )

    def begin(self, job_id: bytes) -> None:
        """This is the instant. Raises Failure."""
        with self._changed:
            job = self._job
            if not self._held or job is None or job.over or job.begun or job.job_id != job_id:
                raise Failure(f"disk {self.image.name!r}: no backup of this job is ready to begin")
            job.begin()

    def release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()

    @property
    def lock(self) -> threading.Condition:
        """The condition that guards the backup's state."""
        return self._changed

    # --- inside ---

    def _count(self, started_ns: int, requests: int = 1) -> None:
        felt = self._felt
        if felt is not None and requests:
            felt.add(time.perf_counter_ns() - started_ns, requests)

    @property
    def _saving(self) -> DiskBackup | None:
        """The job that has begun and is not over."""
        job = self._job
        return job if job is not None and job.begun and not job.over else None

    def _may_write(self, offset: int, length: int) -> bool:
        """Return, the lock being held, whether nothing has to be waited for or saved."""
        if self._held:
            return False
        job = self._saving
        if job is None:
            return True
        first = offset // CLUSTER_BYTES
        return job.core.is_copied(first, (offset + length - 1) // CLUSTER_BYTES - first + 1)

    def _is_free(self, offset: int, length: int) -> bool:
        with self._changed:
            return self._may_write(offset, length)

    def _written(self, count: int = 1) -> None:
        with self._changed:
            self._writes -= count
            if self._held and not self._writes:
                self._changed.notify_all()

    def _change(self, offset: int, length: int, change: Callable[[], None]) -> None:
        """Carry out a write of the guest when all is saved that it changes."""
        self._admit(offset, length)
        try:
            change()
        finally:
            self._written()

    def _admit_at_once(self, offset: int, length: int) -> bool:
        """Do what `_admit` does, if nothing has to be waited for; else return False."""
        first, end = offset // CLUSTER_BYTES, -(-(offset + length) // CLUSTER_BYTES)
        with self._changed:
            if self._may_write(offset, length):
                self._writes += 1
                return True
            job = self._job
            if job is None or self._held:
                return False
            copies = job.plan_at_once(first, end - first)
        if copies is None or not job.save_at_once(copies):
            return False
        with self._changed:
            if not self._may_write(offset, length):
                return False
            self._writes += 1
        return True

    def _admit(self, offset: int, length: int) -> None:
        started = time.monotonic()
        while True:
            with self._changed:
                while self._held:
                    self._changed.wait()  # the holder releases it within seconds
                if self._may_write(offset, length):
                    self._writes += 1
                    return
                job = self._job
            if job is not None:
                try:
                    self._save(job, offset, length, started + job.guest_wait_s)
                except BackupOver:
                    pass

    def _save(self, job: DiskBackup, offset: int, length: int, deadline: float) -> None:
        """Raises BackupOver."""
        first, end = offset // CLUSTER_BYTES, -(-(offset + length) // CLUSTER_BYTES)
        # Piece by piece, so that a huge range does not claim all of its clusters at once.
        for at in range(first, end, MAX_SAVED_CLUSTERS):
            with self._changed:
                if job.over:
                    raise BackupOver
                plan = job.core.before_write(at, min(MAX_SAVED_CLUSTERS, end - at))
            if plan is not None:
                job.save(plan, deadline)
                job.check(deadline)
