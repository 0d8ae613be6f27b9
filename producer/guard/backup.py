# SPDX-License-Identifier: Apache-2.0
"""One backup of one guarded disk: saves old data into slots before a guest's write.

A slot holds one cluster, in shared memory or in a spool file. The rule that everything here
serves: a guest's write may have to wait for a while, it never fails because of a backup.
Whatever goes wrong ends the backup.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Sequence

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.guard.copy_before_write import BeforeWrite, Copy, CopyBeforeWrite
from vmapipe.producer.guard.image import Image
from vmapipe.producer.guard.peer import GuardPeer
from vmapipe.protocol.guard import (
    MAX_SAVED_CLUSTERS,
    MAX_TOLD_CLUSTERS,
    Claimed,
    GuardAttach,
    GuardBegun,
    GuardFailed,
    GuardWaiting,
    Saved,
    SavedHole,
)
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.syscalls import write_at


class SaveSlots:
    """The slots of one backup. Callers hold the lock, except to read and write a slot.

    Takes over the descriptors, unless it raises: OSError, ValueError, Failure.
    """

    def __init__(self, attach: GuardAttach, fds: Sequence[int]) -> None:
        if not fds:
            raise Failure("the backup process offers no memory")
        self._at = attach.memory_at
        self._in_memory = attach.memory_slots
        self._memory = _map(fds[0], self._at + self._in_memory * CLUSTER_BYTES)
        self._spool_fd = fds[1] if len(fds) > 1 else -1
        os.close(fds[0])
        for fd in fds[2:]:
            os.close(fd)
        # Last in, first out: what was used last is in the processor's cache,
        # and memory that is never needed is never touched.
        self._free_memory = list(range(self._in_memory))[::-1]
        last = self._in_memory + (attach.spool_slots if self._spool_fd >= 0 else 0)
        self._free_spool = list(range(self._in_memory, last))[::-1]
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free_memory) + len(self._free_spool)

    @property
    def free_in_memory(self) -> int:
        return len(self._free_memory)

    def take(self, count: int) -> list[int]:
        """Take `count` slots, which must be free; those in memory come first."""
        from_memory = min(count, len(self._free_memory))
        slots = [self._free_memory.pop() for _ in range(from_memory)]
        slots += [self._free_spool.pop() for _ in range(count - from_memory)]
        self._taken.update(slots)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Raises Failure for one that is not taken."""
        for slot in slots:
            if slot not in self._taken:
                raise Failure(f"the backup process releases slot {slot}, which it does not hold")
            self._taken.remove(slot)
            if slot < self._in_memory:
                self._free_memory.append(slot)
            elif self._spool_fd >= 0:
                self._free_spool.append(slot)

    def is_spooled(self, slot: int) -> bool:
        return slot >= self._in_memory

    def view(self, slot: int, length: int) -> memoryview:
        """The first `length` bytes of a slot in memory."""
        start = self._at + slot * CLUSTER_BYTES
        return self._memory[start : start + length]

    def spool(self, slot: int, data: memoryview) -> bool:
        """Write a slot of the spool file; False when it cannot hold it."""
        at = (slot - self._in_memory) * CLUSTER_BYTES
        try:
            write_at(self._spool_fd, data, at)
        except OSError:
            return False
        return True

    def give_up_spool(self) -> None:
        """It is full, or broken: nothing more goes to it until some of it was read and is free."""
        self._free_spool.clear()

    def close(self) -> None:
        """Close the spool file: nothing writes to the slots any more."""
        if self._spool_fd >= 0:
            os.close(self._spool_fd)
            self._spool_fd = -1
            self._free_spool.clear()


def _map(fd: int, size: int) -> memoryview:
    """Raises OSError, ValueError, and Failure for memory that could vanish under us."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise Failure("the backup process offers memory that could be cut")
    return memoryview(mmap.mmap(fd, size))


# What is saved within this time, or as many clusters, may be told together: a message
# costs as much as saving a cluster, and the other side cannot do anything with few of them.
_TELL_S = 0.001
_TELL_CLUSTERS = 16
# Messages about holes take no slot, so this bounds them.
_MAX_BACKLOG = 1024


SlottedCopy = tuple[Copy, list[int]]


class BackupOver(Exception):
    """The backup has ended meanwhile: nothing needs to be saved any more."""


class DiskBackup:
    """A backup of one disk. All state is guarded by `changed`, the condition of the disk.

    Takes over the descriptors, unless it raises: OSError, ValueError, Failure.
    """

    def __init__(
        self,
        attach: GuardAttach,
        image: Image,
        peer: GuardPeer,
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
        self._slots = SaveSlots(attach, fds)
        # Threads that may be reading into slots.
        self._users = 0
        self._waiting = 0
        self._claim: Copy | None = None
        #: (cluster, slot) of what was saved at once, until it is told.
        self.untold: list[tuple[int, int]] = []
        self._tell_at = 0.0

    # --- called with the lock held ---

    def begin(self) -> None:
        self.begun = True
        self._peer.send(GuardBegun())

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
        self._slots.give_back(slots)
        self._changed.notify_all()

    def plan_at_once(self, first: int, clusters: int) -> list[SlottedCopy] | None:
        """Begin the copies that a write needs, if none of it has to wait for anything.

        `save_at_once` comes next, without the lock.
        """
        if clusters > MAX_SAVED_CLUSTERS or self._slots.free_in_memory < clusters:
            return None
        if self._peer.backlog or self.core.is_being_copied(first, clusters):
            return None
        plan = self.core.before_write(first, clusters)
        self._users += 1
        copies = plan.copies if plan else []
        return [(copy, self._slots.take(copy.clusters)) for copy in copies]

    def tell(self, *, at_once: bool) -> None:
        """Send what was saved at once, now or soon: other writes may wait for the slots."""
        now = time.monotonic()
        if not at_once and len(self.untold) < _TELL_CLUSTERS and now < self._tell_at:
            return
        self._tell_at = now + _TELL_S
        untold, self.untold = self.untold, []
        for at in range(0, len(untold), MAX_TOLD_CLUSTERS):
            self._peer.send(Saved(*zip(*untold[at : at + MAX_TOLD_CLUSTERS], strict=True)))

    def end(self) -> None:
        """Let guests' writes go on without saving anything."""
        self.over = True
        self._changed.notify_all()
        self._close_slots()

    def _leave(self) -> None:
        """One user less; the last one of a job that is over closes the slots."""
        self._users -= 1
        self._close_slots()

    def _close_slots(self) -> None:
        if self.over and not self._users:
            self._slots.close()

    # --- called without it, by the thread of a guest's write ---

    def save(self, plan: BeforeWrite, deadline: float) -> None:
        """Carry out what `plan` says. Raises BackupOver.

        `deadline`: when the guest has waited long enough (time.monotonic()).
        """
        with self._changed:
            if self.over:
                raise BackupOver
            self._users += 1
        try:
            self._save(plan, deadline)
        except OSError as error:
            first = plan.copies[0].first if plan.copies else plan.waits[0].first
            self.fail(
                f"disk {self._image.name!r}: cannot read {self._image.path} at offset "
                f"{first * CLUSTER_BYTES}: {os_error_text(error)}"
            )
            raise BackupOver from error
        finally:
            with self._changed:
                self._leave()

    def check(self, deadline: float) -> None:
        """A request that takes too long although it never waits for long. Raises BackupOver."""
        with self._changed:
            if time.monotonic() > deadline:
                self._wait(0.0, "all of its old data to be saved")

    def save_at_once(self, copies: Sequence[SlottedCopy]) -> bool:
        """Carry out `plan_at_once` from the page cache; False: undone, because it cannot."""
        try:
            done = all(self._fill_at_once(copy.first, slots) for copy, slots in copies)
        except OSError:
            done = False  # who tries again and waits will say what is wrong
        with self._changed:
            for copy, slots in copies:
                if done:
                    self.untold += enumerate(slots, copy.first)
                    self.core.copied(copy)
                else:
                    self.core.abandon(copy)
                    self._slots.give_back(slots)
            self._changed.notify_all()
            self._leave()
        return done

    def _fill_at_once(self, first: int, slots: Sequence[int]) -> bool:
        at = first * CLUSTER_BYTES
        for slot in slots:
            view = self._slots.view(slot, min(CLUSTER_BYTES, self._image.size_bytes - at))
            if not self._image.try_read(view, at):
                return False
            at += CLUSTER_BYTES
        return True

    def fail(self, reason: str) -> None:
        with self._changed:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        """End the backup with a reason. The lock is held."""
        if not self.over:
            self._peer.send(GuardFailed(reason))
            self.end()
            if not self._peer.backlog:
                # Even if it never reads that: the disk is free for the next backup.
                self._peer.close()

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
            if not self._peer.wait_for_room(_MAX_BACKLOG, deadline - time.monotonic()):
                with self._changed:
                    self._wait(0.0, "the backup process to read its messages")
            self._peer.send(SavedHole(first, clusters))
            return
        slots = self._take_slots(clusters, deadline)
        for index, slot in enumerate(slots):
            start = index * CLUSTER_BYTES
            slots[index] = self._fill(
                slot, at + start, min(CLUSTER_BYTES, length - start), deadline
            )
        self._peer.send(Saved(tuple(range(first, first + clusters)), tuple(slots)))

    def _take_slots(self, count: int, deadline: float) -> list[int]:
        """Take all `count` slots at once, so that no write waits for more while it holds some."""
        with self._changed:
            while self._slots.free < count:
                self.tell(at_once=True)  # those slots will be the next to be free
                self._waiting += 1
                self._peer.send(GuardWaiting(self._waiting))
                try:
                    self._wait(deadline, "room for the old data: the archiver is too slow")
                finally:
                    self._waiting -= 1
                    self._peer.send(GuardWaiting(self._waiting))
            return self._slots.take(count)

    def _wait(self, deadline: float, what: str) -> None:
        """Wait for a change, the lock being held. Raises BackupOver."""
        if not self.over and not self._changed.wait(max(0.0, deadline - time.monotonic())):
            self._fail(
                f"disk {self._image.name!r}: a write of the guest has waited "
                f"{self.guest_wait_s} s for {what}; the guest goes on, the backup does not "
                "(allow more with --guest-wait, or more --buffer or --spool)"
            )
        if self.over:
            raise BackupOver

    def _fill(self, slot: int, offset: int, length: int, deadline: float) -> int:
        """Old data into a slot, which may become another one if the spool is broken."""
        if self._slots.is_spooled(slot):
            data = memoryview(bytearray(CLUSTER_BYTES))
            self._image.read(data[:length], offset)
            if self._slots.spool(slot, data):
                return slot
            with self._changed:
                self._slots.give_back([slot])
                self._slots.give_up_spool()
            slot = self._take_slots(1, deadline)[0]
            return self._fill(slot, offset, length, deadline)
        self._image.read(self._slots.view(slot, length), offset)
        return slot
