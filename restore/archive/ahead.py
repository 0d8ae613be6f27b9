# SPDX-License-Identifier: Apache-2.0
"""Pieces of an archive in order, some of them got ahead in threads; a stop ends the wait."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from vmapipe.restore.archive.inputs import Wait
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.threads import DaemonPool

# A read from a disk ends in time; one from a disk or a store that hangs is left behind.
_END_WAIT_S = 2.0


def interruptible(job: Callable[[], bytes], halts: Sequence[Cancel]) -> bytes:
    """The job's result; it is done in another thread, so that a stop ends the wait for it."""
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    ahead = Ahead(iter([job]), 1, 1, wake_fd, Wait(wake_fd, halts))
    try:
        return ahead.next() or b""
    finally:
        ahead.close()
        os.close(wake_fd)


class Ahead:
    """Does `jobs` in `threads` threads and gives their results in order.

    The first is done alone: many readers want no more than an archive's header.
    From the second on, the number of those ahead doubles up to `limit`.
    `wait` ends when `wake_fd`, an eventfd of the owner's, was written to, or raises.
    """

    def __init__(
        self,
        jobs: Iterator[Callable[[], bytes]],
        threads: int,
        limit: int,
        wake_fd: int,
        wait: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._limit = limit
        self._most = 1
        self._wake_fd = wake_fd
        self._wait = wait
        self._ahead: deque[Future[bytes]] = deque()
        # Whoever closes the descriptor may not be written to after that.
        self._waking = threading.Lock()
        self._closed = False
        self._pool = DaemonPool(threads, "ahead")

    def next(self) -> bytes | None:
        """The next result, or its error; None at the end. Raises what `wait` raises."""
        self._look_ahead()
        if not self._ahead:
            return None
        future = self._ahead[0]
        while not future.done():
            self._wait()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        self._ahead.popleft()
        if self._most > 1:
            self._look_ahead()
        self._most = min(2 * self._most, self._limit)
        return future.result()

    def close(self) -> bool:
        """Whether all threads have ended; if not, what they use must stay open."""
        with self._waking:
            self._closed = True
        self._ahead.clear()
        return self._pool.close(_END_WAIT_S)

    def _look_ahead(self) -> None:
        while len(self._ahead) < self._most:
            job = next(self._jobs, None)
            if job is None:
                return
            future = self._pool.submit(job)
            self._ahead.append(future)
            future.add_done_callback(self._wake)

    def _wake(self, _: Future[bytes]) -> None:
        with self._waking:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)
