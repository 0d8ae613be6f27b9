# SPDX-License-Identifier: Apache-2.0
"""Gets the next piece of work without ever making the coordinator wait for it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

from vmapipe.restore.crew.handout import Work

# Read ahead of the workers. The memory of data is bounded by its slots; this
# is for archives that hold nothing but zeroes.
_AHEAD_WORKS = 256
# A thread that was told to stop ends at its next read; a hung disk may keep it.
_JOIN_S = 5.0


class InlineFeed:
    """For a file: the next headers are there in microseconds."""

    fd = -1

    def __init__(self, works: Iterator[Work]) -> None:
        self.ended = False
        self._works = works

    def poll(self) -> Work | None:
        """The next work; None at the end. Raises what reading raises."""
        work = next(self._works, None)
        self.ended = work is None
        return work

    def close(self) -> None:
        pass


class ThreadFeed:
    """For a pipe: a thread reads, `fd` becomes readable when there is something to poll."""

    def __init__(self, works: Iterator[Work], *stops: Callable[[], None]) -> None:
        """`stops` make the thread end whatever it waits for."""
        self.ended = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._works = works
        self._stops = stops
        self._queue: deque[Work] = deque()
        self._exhausted = False
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="archive-reader", daemon=True)
        self._thread.start()

    def poll(self) -> Work | None:
        """The next work, if there is one yet; `ended` tells. Raises what reading raised."""
        with self._changed:
            if self._queue:
                work = self._queue.popleft()
                self._changed.notify()
                return work
            if self._error is not None:
                raise self._error
            self.ended = self._exhausted
            if not self.ended:
                # Nothing is there: only now may the descriptor fall silent.
                try:
                    os.eventfd_read(self.fd)
                except BlockingIOError:
                    pass
            return None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        for stop in self._stops:
            stop()
        self._thread.join(_JOIN_S)
        os.close(self.fd)

    def _read(self) -> None:
        try:
            for work in self._works:
                if not self._put(work):
                    return
        except BaseException as error:  # noqa: BLE001  handed to whoever polls
            self._error = error
        with self._changed:
            self._exhausted = True
            if not self._closed:
                os.eventfd_write(self.fd, 1)

    def _put(self, work: Work) -> bool:
        """False when nobody wants any more."""
        with self._changed:
            while not self._closed and len(self._queue) >= _AHEAD_WORKS:
                self._changed.wait()
            if self._closed:
                return False
            self._queue.append(work)
            os.eventfd_write(self.fd, 1)
            return True


Feed = InlineFeed | ThreadFeed
