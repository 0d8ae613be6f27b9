# SPDX-License-Identifier: Apache-2.0
"""Threads for what a connection must not wait for, and how much of it there may be."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

Work = Callable[[], None]

# What each connection may have under way whatever the others do: so it goes on, if more
# slowly, beside a hundred that take all else and do not read their answers.
OWN_REQUESTS = 4
OWN_BYTES = (1 << 20) + (64 << 10)
# What all of them share. QEMU has 16 requests of a megabyte under way at most, nbdcopy 64
# of a quarter; four of the largest requests fit, two of them at each end of a copy.
SHARED_REQUESTS = 256
SHARED_BYTES = 128 << 20


class Workers:
    """Threads, as many as there is work at one time; they stay, and end with the process.

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
        except (RuntimeError, MemoryError):
            # A limit on threads: requests behind this one wait, and none is lost.
            work()

    def _run(self, work: Work) -> None:
        while True:
            work()
            self._idle.release()
            work = self._queue.get()


class Share(NamedTuple):
    """A request's part of a budget, to be given back. `is_own`: of what is the connection's alone."""

    size_bytes: int
    is_own: bool


class Pool:
    """The memory that all connections share; the first to ask is served first."""

    def __init__(self, requests: int = SHARED_REQUESTS, size_bytes: int = SHARED_BYTES) -> None:
        self.changed = threading.Condition()
        self._requests = requests
        self._bytes = size_bytes
        # A budget may be here once: its connection's thread waits.
        self._waiting: deque[Budget] = deque()

    def is_wanted(self, beside: Budget | None = None) -> bool:
        """Return whether another connection than `beside` waits for what is taken."""
        with self.changed:
            return any(budget is not beside for budget in self._waiting)

    def fits(self, size_bytes: int, waiter: Budget | None = None) -> bool:
        """Return, `changed` held, whether it fits. `waiter`: a waiting one; without it none may wait."""
        is_turn = self._waiting[0] is waiter if self._waiting else True
        return is_turn and self._requests > 0 and size_bytes <= self._bytes

    def take(self, size_bytes: int) -> None:
        """Take, `changed` held, what fits."""
        self._requests -= 1
        self._bytes -= size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Give back, `changed` held."""
        self._requests += 1
        self._bytes += size_bytes

    def enter(self, budget: Budget) -> None:
        """Wait for it, with `changed` held."""
        self._waiting.append(budget)

    def leave(self, budget: Budget) -> None:
        """Wait no more, `changed` held."""
        self._waiting.remove(budget)
        self.changed.notify_all()


class Budget:
    """Bounds how many requests of one connection, and how many bytes of theirs, are under way.

    Some are its own; more come from the pool, while others do not need it.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._own_requests = OWN_REQUESTS
        self._own_bytes = OWN_BYTES
        self._under_way = 0
        self._shared = 0

    @property
    def is_in_the_way(self) -> bool:
        """Return whether it holds a part of the pool for which another connection waits."""
        return self._shared > 0 and self._pool.is_wanted(beside=self)

    def fits(self, size_bytes: int) -> bool:
        """Return whether `take` would not wait."""
        with self._pool.changed:
            return self._is_own(size_bytes) or self._pool.fits(size_bytes)

    def take(self, size_bytes: int) -> Share:
        """Waits until it fits. Never more than a request may have (MAX_PAYLOAD_BYTES)."""
        with self._pool.changed:
            if not self._is_own(size_bytes) and not self._pool.fits(size_bytes):
                self._pool.enter(self)
                try:
                    while not self._is_own(size_bytes) and not self._pool.fits(size_bytes, self):
                        self._pool.changed.wait()
                finally:
                    self._pool.leave(self)
            share = Share(size_bytes, self._is_own(size_bytes))
            self._under_way += 1
            if share.is_own:
                self._own_requests -= 1
                self._own_bytes -= size_bytes
            else:
                self._shared += 1
                self._pool.take(size_bytes)
            return share

    def give_back(self, share: Share) -> None:
        with self._pool.changed:
            self._under_way -= 1
            if share.is_own:
                self._own_requests += 1
                self._own_bytes += share.size_bytes
            else:
                self._shared -= 1
                self._pool.give_back(share.size_bytes)
            self._pool.changed.notify_all()

    def wait_idle(self) -> None:
        """Wait until nothing is under way."""
        with self._pool.changed:
            while self._under_way:
                self._pool.changed.wait()

    def _is_own(self, size_bytes: int) -> bool:
        return self._own_requests > 0 and size_bytes <= self._own_bytes
