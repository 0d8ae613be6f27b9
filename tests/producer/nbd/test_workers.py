# SPDX-License-Identifier: Apache-2.0
"""Threads for what a connection must not wait for."""

from __future__ import annotations

import threading

import pytest

from tests.machine import LIMIT_S
from vmapipe.producer.nbd.workers import Workers


def test_work_that_waits_holds_up_no_other_work() -> None:
    workers = Workers("test")
    go_on, done = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        assert go_on.wait(LIMIT_S)
        done.release()

    for _ in range(3):
        workers.submit(wait)
    workers.submit(go_on.set)
    for _ in range(3):
        assert done.acquire(timeout=LIMIT_S)


def test_where_no_thread_can_be_had_the_work_is_done_by_whoever_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    where: list[threading.Thread] = []
    Workers("test").submit(lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]
