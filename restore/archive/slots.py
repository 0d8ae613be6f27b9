# SPDX-License-Identifier: Apache-2.0
"""Memory that the reader fills and the workers write from: an archive's data is copied once less."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading

from vmapipe.clusters.sizes import MAX_EXTENT_DATA_BYTES
from vmapipe.runtime.errors import Cancelled

# For each worker an extent that it writes, one that waits, and one under way;
# and two for the reader. Never more than 60 MiB.
_SLOTS_PER_WORKER = 3
_READER_SLOTS = 2
_MAX_SLOTS = 16


class ExtentSlots:
    """Places for the data of one extent each, in one memory file that workers inherit.

    One thread takes, another gives back.
    """

    def __init__(self, workers: int) -> None:
        count = min(_SLOTS_PER_WORKER * workers + _READER_SLOTS, _MAX_SLOTS)
        size_bytes = count * MAX_EXTENT_DATA_BYTES
        self.fd = os.memfd_create("vmapipe-restore", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
            self._mapping = mmap.mmap(self.fd, size_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._memory = memoryview(self._mapping)
        self._free = [number * MAX_EXTENT_DATA_BYTES for number in range(count)]
        self._closed = False
        self._changed = threading.Condition()

    def take(self) -> int:
        """The position of a free slot; waits for one. Raises Cancelled after `stop`."""
        with self._changed:
            while not self._free and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Cancelled("the archive is no longer read")
            return self._free.pop()

    def view(self, position: int, length: int) -> memoryview:
        return self._memory[position : position + length]

    def give(self, position: int) -> None:
        with self._changed:
            self._free.append(position)
            self._changed.notify()

    def stop(self) -> None:
        """End a wait in `take`, now and later, with Cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        os.close(self.fd)
        # A reading thread that a hung disk keeps may still hold a view.
        with contextlib.suppress(BufferError):
            self._memory.release()
            self._mapping.close()


def map_slots(fd: int) -> memoryview:
    """A worker's view of all slots. Raises OSError."""
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ))
