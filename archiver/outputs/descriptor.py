# SPDX-License-Identifier: Apache-2.0
"""Writing to a descriptor to the end, and letting go of it from another thread."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator

from vmapipe.archiver.outputs.errors import OutputFailure, write_failure
from vmapipe.archiver.outputs.interrupt import Interrupt
from vmapipe.archiver.outputs.output import Buffers
from vmapipe.runtime.cancel import Cancel

# More buffers in one call are refused (EINVAL); Linux has had this number for ever.
IOV_MAX = 1024
# How long `abandon` waits for the thread that writes. A call that can be
# interrupted ends within milliseconds; one that cannot (a dead disk) may last
# for ever, and a process that is told to stop has 10 s in all. Longer than
# what a command gets to end by itself.
ABANDON_WAIT_S = 3.0


class DescriptorOutput:
    """The common part of all outputs that are descriptors.

    One lock is held during each write and during the commit. Whoever holds it
    while the output is abandoned tidies up when it is through, so that no
    descriptor is closed under a running call (the kernel does not mind, and the
    number may mean another file the next moment).
    """

    is_stream = True

    def __init__(self, fd: int, description: str, cancel: Cancel | None = None) -> None:
        self.description = description
        self.written_bytes = 0
        self._fd = fd
        self._lock = threading.Lock()
        self._over = False
        self._interrupt = Interrupt(cancel)
        self._send: Callable[[list[bytes | memoryview]], int] = self._writev

    def write(self, buffers: Buffers) -> None:
        with self._working():
            self._write_all(buffers)

    def commit(self) -> None:
        with self._working():
            self._complete()
            if self._interrupt.abandoned:
                self._interrupt.check()
            self._close()
            self._over = True

    def abandon(self) -> None:
        self._break_off()
        self._interrupt.ask()
        if not self._lock.acquire(timeout=ABANDON_WAIT_S):
            self._forsake()
            return
        try:
            self._discard_once()
        finally:
            self._lock.release()

    # --- what the kinds differ in ---

    def _check(self) -> None:
        """Before each write: raises Failure when going on makes no sense."""
        self._interrupt.check()

    def _failure(self, error: OSError) -> OutputFailure:
        return write_failure(self.description, self.written_bytes, error)

    def _complete(self) -> None:
        """Do what a commit does, except for closing. May raise OSError or Failure."""

    def _break_off(self) -> None:
        """First of all, before the thread that writes knows of it. Must not raise."""

    def _discard(self) -> None:
        """Take back what can be taken back. The lock is held. May raise OSError."""

    def _forsake(self) -> None:
        """As `_discard`, for a call that does not return: without the lock, and without closing."""

    # --- the rest ---

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._lock:
            if self._over:
                raise OutputFailure(f"{self.description} takes no more: it is complete or given up")
            try:
                yield
            except OSError as error:
                raise self._failure(error) from error
            finally:
                if self._interrupt.abandoned:
                    self._discard_once()

    def _write_all(self, buffers: Buffers) -> None:
        todo = [buffer for buffer in buffers if len(buffer)]
        at = 0
        while at < len(todo):
            self._check()
            batch = todo[at : at + IOV_MAX]
            try:
                count = self._send(batch)
            except BlockingIOError:
                self._wait_writable()
                continue
            self.written_bytes += count
            for buffer in batch:
                if count < len(buffer):
                    break
                count -= len(buffer)
                at += 1
            if count:
                todo[at] = memoryview(todo[at])[count:]

    def _writev(self, buffers: list[bytes | memoryview]) -> int:
        return os.writev(self._fd, buffers)

    def _wait_writable(self) -> None:
        """For descriptors that do not block; the others never get here."""
        self._interrupt.wait(None, self._fd, select.POLLOUT)

    def _discard_once(self) -> None:
        if self._over:
            return
        self._over = True
        with contextlib.suppress(OSError):
            self._discard()
        with contextlib.suppress(OSError):
            self._close()

    def _close(self) -> None:
        """May raise OSError: on network file systems a close reports lost writes."""
        self._interrupt.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
