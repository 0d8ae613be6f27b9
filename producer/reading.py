# SPDX-License-Identifier: Apache-2.0
"""Reads a piece of a file: what the page cache has at once, the rest in two halves at the same time."""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue

# Below it, waking the helper costs more than it saves.
_WORTH_BYTES = 1 << 20
_ALIGNED = 4096


class ShortRead(Exception):
    """The file ended at `offset`."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the file ended at offset {offset}")
        self.offset = offset


class ReadFailed(Exception):
    """The file cannot be read at `offset`."""

    def __init__(self, offset: int, error: OSError) -> None:
        super().__init__(f"cannot read at offset {offset}")
        self.offset = offset
        self.error = error


class PairReader:
    """Fills buffers from a descriptor, which it does not own.

    A disk likes to have two requests, so that a helper reads the second half of
    what has to come from there. What is in the page cache is copied by this thread
    alone: two cores copy hardly faster than one, and wait for each other.
    With one core there is no helper.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: Whether the file's system can tell what would have to be waited for.
        self._tells = True
        self._todo: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._done: SimpleQueue[Exception | None] = SimpleQueue()
        self._helper: threading.Thread | None = None
        self._alone = len(os.sched_getaffinity(0)) < 2

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Raises ReadFailed, ShortRead: the first in the file's order."""
        if not self._alone and self._tells:
            cached = self._read_cached(buffer, offset)
            buffer, offset = buffer[cached:], offset + cached
        if self._alone or len(buffer) < _WORTH_BYTES:
            _fill(self._fd, buffer, offset)
        else:
            self._read_halves(buffer, offset)

    def _read_cached(self, buffer: memoryview, offset: int) -> int:
        """As many bytes as come without waiting for the disk."""
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            # Not every file system can; one that cannot read at all says so below.
            self._tells = False
            return 0

    def _read_halves(self, buffer: memoryview, offset: int) -> None:
        if self._helper is None:
            # A daemon: a read that hangs must not keep the process from ending.
            self._helper = threading.Thread(target=self._help, name="reader", daemon=True)
            self._helper.start()
        half = len(buffer) // 2 // _ALIGNED * _ALIGNED
        self._todo.put((buffer[half:], offset + half))
        try:
            _fill(self._fd, buffer[:half], offset)
        finally:
            # The buffer is the caller's again only when nobody writes to it.
            error = self._done.get()
        if error is not None:
            raise error

    def _help(self) -> None:
        while (task := self._todo.get()) is not None:
            try:
                _fill(self._fd, *task)
            except Exception as error:  # noqa: BLE001  raised by whoever waits for it
                self._done.put(error)
            else:
                self._done.put(None)

    def close(self) -> None:
        """Before the descriptor is closed."""
        if self._helper is not None:
            self._todo.put(None)
            self._helper.join()


def _fill(fd: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise ReadFailed(offset + done, error) from error
        if not got:
            raise ShortRead(offset + done)
        done += got
