# SPDX-License-Identifier: Apache-2.0
"""Threads that compute digests. concurrent.futures would do; its import takes a tenth of a verify's start."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Pending:
    """A digest that a thread computes, or will."""

    __slots__ = ("_done", "_error", "_job", "_result")

    def __init__(self, job: Callable[[], bytes]) -> None:
        self._job = job
        self._result = b""
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()  # released when it is there

    def run(self) -> None:
        try:
            self._result = self._job()
        except BaseException as error:  # noqa: BLE001  whoever waits for it gets it
            self._error = error
        self._done.release()

    def result(self) -> bytes:
        """Wait for it, once. Raises what the job raised."""
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._result


class Hashers:
    """`threads` of them, started with the first job."""

    def __init__(self, threads: int) -> None:
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._closed = False

    def submit(self, job: Callable[[], bytes]) -> Pending:
        """Jobs are begun in order."""
        while len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name=f"digest-{len(self._threads)}")
            self._threads.append(thread)
            thread.start()
        pending = Pending(job)
        self._jobs.put(pending)
        return pending

    def close(self) -> None:
        """Begins no more; returns when what was begun has ended."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (pending := self._jobs.get()) is not None:
            if not self._closed:
                pending.run()
            # Else it, and its data, would live on until the next one comes.
            del pending
