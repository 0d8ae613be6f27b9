# SPDX-License-Identifier: Apache-2.0
"""Writes that wait for something: the first one that came is the first one served."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class Turns:
    """All is called with the lock of `changed` held; notify it when something may be reached."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._tickets: deque[object] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._tickets)

    def wait(self, reached: Callable[[], bool], over: Callable[[], bool], deadline: float) -> bool:
        """False: it is over. Raises TimeoutError at `deadline` (time.monotonic())."""
        ticket = object()
        self._tickets.append(ticket)
        try:
            while not over():
                if self._tickets[0] is ticket and reached():
                    return True
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
            return False
        finally:
            self._tickets.remove(ticket)
            # It may be the next one's turn.
            self._changed.notify_all()
