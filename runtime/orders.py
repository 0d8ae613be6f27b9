# SPDX-License-Identifier: Apache-2.0
"""What a parent says to a child that works: lines the other way down the same socket pair."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import NamedTuple

from vmapipe.runtime.events import Event


class Orders:
    """Put in by any thread, taken out by the one that works: `fd` is readable when there are some.

    An order is a dict with the key `order` (a word) and fields, as events are.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._orders: deque[Event] = deque()

    def put(self, order: Event) -> None:
        with self._lock:
            self._orders.append(order)
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[Event]:
        """What has come since, in order."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        with self._lock:
            taken = list(self._orders)
            self._orders.clear()
        return taken


def speed_order(bytes_per_s: int) -> Event:
    """Read at most so much from now on, 0: without a limit."""
    return {"order": "speed", "bytes_per_s": bytes_per_s}


def ordered_speed(order: Event) -> int | None:
    """The limit in bytes a second, if this is such an order."""
    if order.get("order") != "speed":
        return None
    return int(order["bytes_per_s"])


class Copied(NamedTuple):
    """QEMU's backup job of a disk has ended well. `copied_bytes`: what it says of itself.

    `rest_is_zero`: it has left out what its image has never been given, which reads as zeroes.
    """

    copied_bytes: int
    rest_is_zero: bool


def copied_order(copied: Copied) -> Event:
    """All of the disk has been sent to the sink."""
    return {"order": "copied", "bytes": copied.copied_bytes, "rest_is_zero": copied.rest_is_zero}


def ordered_copied(order: Event) -> Copied | None:
    """What is told of QEMU's job, if this is such an order."""
    if order.get("order") != "copied":
        return None
    return Copied(int(order["bytes"]), bool(order["rest_is_zero"]))


#: QEMU's job has been given the speed that its sink has asked for last.
JOB_SPEED_SET: Event = {"order": "job-speed-set"}


def is_job_speed(order: Event) -> bool:
    return order == JOB_SPEED_SET
