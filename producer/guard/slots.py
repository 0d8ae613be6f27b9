# SPDX-License-Identifier: Apache-2.0
"""Where old data waits for the backup process: one cluster a slot, in memory or in a spool file."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

from vmapipe.protocol.guarding import Attach
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.errors import Failure


class Slots:
    """The slots of one backup. Whoever uses them holds a lock, but for reading and writing them.

    Takes over the descriptors, unless it raises: OSError, ValueError, Failure.
    """

    def __init__(self, attach: Attach, fds: Sequence[int]) -> None:
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
        """So many must be free; memory comes first."""
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
            while data:
                done = os.pwrite(self._spool_fd, data, at)
                data, at = data[done:], at + done
        except OSError:
            return False
        return True

    def give_up_spool(self) -> None:
        """It is full, or broken: nothing more goes to it until some of it was read and is free."""
        self._free_spool.clear()

    def close(self) -> None:
        """When nobody writes to them any more."""
        if self._spool_fd >= 0:
            os.close(self._spool_fd)
            self._spool_fd = -1
            self._free_spool.clear()


def _map(fd: int, size: int) -> memoryview:
    """Raises OSError, ValueError, and Failure for memory that could vanish under us."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise Failure("the backup process offers memory that could be cut")
    return memoryview(mmap.mmap(fd, size))
