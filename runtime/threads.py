# SPDX-License-Identifier: Apache-2.0
"""Threads for work that may never end: neither a caller nor the process waits for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

Result = TypeVar("Result")


class DaemonPool:
    """A pool like ThreadPoolExecutor whose threads do not delay the end of the process."""

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Do it as soon as a thread is free."""
        # Late: it brings `logging` along, and few commands have threads.
        from concurrent.futures import Future

        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return future

    def close(self, wait_s: float = 0.0) -> bool:
        """Begin nothing more; whether all threads have ended within `wait_s`."""
        self._closed = True
        deadline = time.monotonic() + wait_s
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if self._closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001  raised in the waiting thread
                future.set_exception(error)
            # Else it would live on until the next one comes.
            del item, future, job
