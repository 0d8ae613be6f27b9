# SPDX-License-Identifier: Apache-2.0
"""Threads for what a connection must not wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Work = Callable[[], None]


class Workers:
    """As many threads as there is work at one time; they stay for the next, and end with us.

    There is no limit here: whoever submits bounds what is under way (`Budget`),
    so that work which waits for something never holds up other work.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def submit(self, work: Work) -> None:
        """`work` must not raise. Where no thread can be had any more, it is done at once, here."""
        if self._idle.acquire(blocking=False):
            self._queue.put(work)
            return
        try:
            threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True).start()
        except RuntimeError:
            # A limit on threads: requests behind this one wait, and none is lost.
            work()

    def _run(self, work: Work) -> None:
        while True:
            work()
            self._idle.release()
            work = self._queue.get()


class Budget:
    """Bounds how many requests, and how many bytes of theirs, are under way at once."""

    def __init__(self, requests: int, size_bytes: int) -> None:
        self._requests = requests
        self._bytes = size_bytes
        self._taken = self._taken_bytes = 0
        self._changed = threading.Condition()

    def fits(self, size_bytes: int) -> bool:
        # One may always run, however large.
        return not self._taken or (
            self._taken < self._requests and self._taken_bytes + size_bytes <= self._bytes
        )

    def take(self, size_bytes: int) -> None:
        """Waits until it fits."""
        with self._changed:
            while not self.fits(size_bytes):
                self._changed.wait()
            self._taken += 1
            self._taken_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        with self._changed:
            self._taken -= 1
            self._taken_bytes -= size_bytes
            self._changed.notify_all()

    def wait_idle(self) -> None:
        """Until nothing is under way."""
        with self._changed:
            while self._taken:
                self._changed.wait()
