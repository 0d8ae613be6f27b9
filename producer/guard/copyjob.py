# SPDX-License-Identifier: Apache-2.0
"""One backup of one disk, on the guard's side: where old data goes before a guest's write.

The rule that everything here serves: a guest's write may have to wait for a
while, it never fails because of a backup. Whatever goes wrong ends the backup.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Sequence

from vmapipe.producer.guard.cbw import BeforeWrite, Copy, CopyBeforeWrite
from vmapipe.producer.guard.image import Image
from vmapipe.producer.guard.peer import Peer
from vmapipe.protocol.guarding import (
    MAX_SAVED_CLUSTERS,
    Attach,
    Begun,
    Claimed,
    Failed,
    Saved,
    SavedHole,
    Waiting,
)
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.errors import Failure, os_error_text

# Messages about holes take no slot, so this bounds them.
_MAX_BACKLOG = 1024


SlottedCopy = tuple[Copy, list[int]]


class JobOver(Exception):
    """The backup has ended meanwhile: nothing needs to be saved any more."""


class CopyJob:
    """All state is guarded by `changed`, the condition of the disk.

    Takes over the descriptors, unless it raises: OSError, ValueError, Failure.
    """

    def __init__(
        self,
        attach: Attach,
        image: Image,
        peer: Peer,
        changed: threading.Condition,
        fds: Sequence[int],
    ) -> None:
        self.job_id = attach.job
        self.begun = False
        self.over = False
        self.core = CopyBeforeWrite(-(-image.size_bytes // CLUSTER_BYTES))
        self._image = image
        self._peer = peer
        self._changed = changed
        self.guest_wait_s = attach.guest_wait_s
        self._memory = _map(fds[0], attach.memory_at + attach.memory_slots * CLUSTER_BYTES)
        self._spool_fd = fds[1] if len(fds) > 1 else None
        os.close(fds[0])
        for fd in fds[2:]:
            os.close(fd)
        self._users = 0
        self._memory_at = attach.memory_at
        self._memory_slots = attach.memory_slots
        # Last in, first out: what was used last is in the processor's cache,
        # and memory that is never needed is never touched.
        self._free_memory = list(range(attach.memory_slots))[::-1]
        first = attach.memory_slots
        spool_slots = attach.spool_slots if self._spool_fd is not None else 0
        self._free_spool = list(range(first, first + spool_slots))[::-1]
        self._spool_broken = False
        self._in_use: set[int] = set()
        self._waiting = 0
        self._claim: Copy | None = None

    # --- called with the lock held ---

    def begin(self) -> None:
        self.begun = True
        self._peer.send(Begun())

    def claim(self, most: int) -> None:
        """Raises Failure for a peer that claims twice."""
        if self._claim is not None or not self.begun:
            raise Failure("the backup process claims clusters out of turn")
        self._claim = self.core.next_background(most)
        self._peer.send(
            Claimed(self._claim.first, self._claim.clusters) if self._claim else Claimed(0, 0)
        )

    def copied(self, clusters: int) -> None:
        """Raises Failure."""
        if self._claim is None or clusters > self._claim.clusters:
            raise Failure("the backup process copied what it had not claimed")
        self.core.shorten(self._claim, clusters)
        self.core.copied(self._claim)
        self._claim = None
        self._changed.notify_all()

    def release(self, slots: Sequence[int]) -> None:
        """Raises Failure."""
        for slot in slots:
            if slot not in self._in_use:
                raise Failure(f"the backup process releases slot {slot}, which it does not hold")
            self._in_use.remove(slot)
            if slot < self._memory_slots:
                self._free_memory.append(slot)
            elif not self._spool_broken:
                self._free_spool.append(slot)
        self._changed.notify_all()

    def plan_at_once(self, first: int, clusters: int) -> list[SlottedCopy] | None:
        """Begin the copies that a write needs, if none of it has to wait for anything.

        `save_at_once` comes next, without the lock.
        """
        if clusters > MAX_SAVED_CLUSTERS or len(self._free_memory) < clusters:
            return None
        if self._peer.backlog or self.core.is_being_copied(first, clusters):
            return None
        plan = self.core.before_write(first, clusters)
        self._users += 1
        copies = plan.copies if plan else []
        return [(copy, self._pop_slots(copy.clusters)) for copy in copies]

    def end(self) -> None:
        """The guests' writes need not care any more."""
        self.over = True
        self._changed.notify_all()
        self._close_spool()

    def _close_spool(self) -> None:
        """As soon as nobody writes to it any more."""
        if self.over and not self._users and self._spool_fd is not None:
            os.close(self._spool_fd)
            self._spool_fd = None

    # --- called without it, by the thread of a guest's write ---

    def save(self, plan: BeforeWrite, deadline: float) -> None:
        """Carry out what `plan` says. Raises JobOver.

        `deadline`: when the guest has waited long enough (time.monotonic()).
        """
        with self._changed:
            if self.over:
                raise JobOver
            self._users += 1
        try:
            self._save(plan, deadline)
        except OSError as error:
            first = plan.copies[0].first if plan.copies else plan.waits[0].first
            self.fail(
                f"disk {self._image.name!r}: cannot read {self._image.path} at offset "
                f"{first * CLUSTER_BYTES}: {os_error_text(error)}"
            )
            raise JobOver from error
        finally:
            with self._changed:
                self._users -= 1
                self._close_spool()

    def save_at_once(self, copies: Sequence[SlottedCopy]) -> bool:
        """Carry out `plan_at_once` from the page cache; False: undone, because it cannot."""
        try:
            done = all(self._fill_at_once(copy.first, slots) for copy, slots in copies)
        except OSError:
            done = False  # who tries again and waits will say what is wrong
        with self._changed:
            self._users -= 1
            for copy, slots in copies:
                if done:
                    self._peer.send(Saved(copy.first, tuple(slots)))
                    self.core.copied(copy)
                else:
                    self.core.abandon(copy)
                    self.release(slots)
            self._changed.notify_all()
            self._close_spool()
        return done

    def _fill_at_once(self, first: int, slots: Sequence[int]) -> bool:
        at = first * CLUSTER_BYTES
        for slot in slots:
            view = self._slot(slot, min(CLUSTER_BYTES, self._image.size_bytes - at))
            if not self._image.try_read(view, at):
                return False
            at += CLUSTER_BYTES
        return True

    def fail(self, reason: str) -> None:
        with self._changed:
            if not self.over:
                self._peer.send(Failed(reason))
            self.end()

    def _save(self, plan: BeforeWrite, deadline: float) -> None:
        for copy in plan.copies:
            for first in range(copy.first, copy.first + copy.clusters, MAX_SAVED_CLUSTERS):
                end = min(copy.first + copy.clusters, first + MAX_SAVED_CLUSTERS)
                self._save_run(first, end - first, deadline)
            with self._changed:
                self.core.copied(copy)
                self._changed.notify_all()
        with self._changed:
            for other in plan.waits:
                while not other.finished:
                    self._wait(deadline, "another copy of the same clusters")

    def _save_run(self, first: int, clusters: int, deadline: float) -> None:
        at = first * CLUSTER_BYTES
        length = min(clusters * CLUSTER_BYTES, self._image.size_bytes - at)
        if self._image.is_hole(at, length):
            with self._changed:
                while self._peer.backlog > _MAX_BACKLOG:
                    self._wait(deadline, "the backup process to read its messages")
            self._peer.send(SavedHole(first, clusters))
            return
        slots = self._take_slots(clusters, deadline)
        for index, slot in enumerate(slots):
            start = index * CLUSTER_BYTES
            slots[index] = self._fill(
                slot, at + start, min(CLUSTER_BYTES, length - start), deadline
            )
        self._peer.send(Saved(first, tuple(slots)))

    def _take_slots(self, count: int, deadline: float) -> list[int]:
        """All at once, so that none waits for more while it holds some."""
        with self._changed:
            while len(self._free_memory) + len(self._free_spool) < count:
                self._waiting += 1
                try:
                    if self._waiting == 1:
                        self._peer.send(Waiting(1))
                    self._wait(deadline, "room for the old data: the archiver is too slow")
                finally:
                    self._waiting -= 1
                    if not self._waiting:
                        self._peer.send(Waiting(0))
            return self._pop_slots(count)

    def _pop_slots(self, count: int) -> list[int]:
        """With the lock held; there are so many."""
        free = self._free_memory
        taken = [free.pop() for _ in range(min(count, len(free)))]
        taken += [self._free_spool.pop() for _ in range(count - len(taken))]
        self._in_use.update(taken)
        return taken

    def _slot(self, slot: int, length: int) -> memoryview:
        """So many bytes of a slot in memory."""
        start = self._memory_at + slot * CLUSTER_BYTES
        return self._memory[start : start + length]

    def _wait(self, deadline: float, what: str) -> None:
        """With the lock held. Raises JobOver."""
        if not self.over and not self._changed.wait(max(0.0, deadline - time.monotonic())):
            # Not `fail`: the lock is held.
            self._peer.send(
                Failed(
                    f"disk {self._image.name!r}: a write of the guest has waited "
                    f"{self.guest_wait_s} s for {what}; the guest goes on, the backup does not "
                    "(allow more with --guest-wait, or more --buffer or --spool)"
                )
            )
            self.end()
        if self.over:
            raise JobOver

    def _fill(self, slot: int, offset: int, length: int, deadline: float) -> int:
        """Old data into a slot, which may become another one if the spool is broken."""
        if slot >= self._memory_slots:
            data = memoryview(bytearray(CLUSTER_BYTES))
            self._image.read(data[:length], offset)
            if self._spool(slot, data):
                return slot
            with self._changed:
                self._spool_broken = True
                self._free_spool.clear()
                self._in_use.remove(slot)
            slot = self._take_slots(1, deadline)[0]
        self._image.read(self._slot(slot, length), offset)
        return slot

    def _spool(self, slot: int, data: memoryview) -> bool:
        at = (slot - self._memory_slots) * CLUSTER_BYTES
        if self._spool_fd is None:
            return False
        with contextlib.suppress(OSError):
            while data:
                done = os.pwrite(self._spool_fd, data, at)
                data, at = data[done:], at + done
            return True
        return False


def _map(fd: int, size: int) -> memoryview:
    """Raises OSError, ValueError, and Failure for memory that could vanish under us."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise Failure("the backup process offers memory that could be cut")
    return memoryview(mmap.mmap(fd, size))
