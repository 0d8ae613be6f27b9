# SPDX-License-Identifier: Apache-2.0
"""Writing to a descriptor to the end."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator

from vmapipe.archiver.outputs.ending import EndsOnce
from vmapipe.archiver.outputs.errors import OutputFailure, write_failure
from vmapipe.archiver.outputs.output import Buffers
from vmapipe.runtime.cancel import Cancel

# More buffers in one call are refused (EINVAL); Linux has had this number for ever.
IOV_MAX = 1024


class DescriptorOutput(EndsOnce):
    """The common part of all outputs that are descriptors."""

    is_stream = True

    def __init__(self, fd: int, description: str, cancel: Cancel | None = None) -> None:
        super().__init__(description, cancel)
        self._fd = fd
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

    # --- what the kinds differ in ---

    def _check(self) -> None:
        """Before each write: raises Failure when going on makes no sense."""
        self._interrupt.check()

    def _failure(self, error: OSError) -> OutputFailure:
        return write_failure(self.description, self.written_bytes, error)

    def _complete(self) -> None:
        """Do what a commit does, except for closing. May raise OSError or Failure."""

    def _discard(self) -> None:
        """Take back what can be taken back. The lock is held. May raise OSError."""

    # --- the rest ---

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._holding():
            try:
                yield
            except OSError as error:
                raise self._failure(error) from error

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

    def _give_up(self) -> None:
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
