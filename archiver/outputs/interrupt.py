# SPDX-License-Identifier: Apache-2.0
"""Ends the waits of an output: when it is abandoned, or when the process is to stop."""

from __future__ import annotations

import contextlib
import os
import select
import threading

from vmapipe.archiver.outputs.errors import OutputFailure
from vmapipe.runtime.cancel import Cancel


class Interrupt:
    """Waiting that another thread can end."""

    def __init__(self, cancel: Cancel | None = None) -> None:
        self.abandoned = False
        self._cancel = cancel
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ask(self) -> None:
        """End the wait under way and all later ones."""
        # The lock: a closed descriptor's number may be somebody else's by now.
        with self._lock:
            self.abandoned = True
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    os.eventfd_write(self._fd, 1)

    def check(self) -> None:
        """Raises OutputFailure or Cancelled when the work is to end."""
        if self._cancel is not None:
            self._cancel.check()
        if self.abandoned:
            raise OutputFailure("the archive was abandoned")

    def wait(self, timeout_s: float | None, fd: int = -1, events: int = select.POLLIN) -> bool:
        """Wait until `fd` (if any) has one of `events`; False when the time is over.

        Raises like `check`.
        """
        self.check()
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if self._cancel is not None:
            poll.register(self._cancel.fd, select.POLLIN)
        if fd >= 0:
            poll.register(fd, events)
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        self.check()
        return any(number == fd for number, _ in ready)

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
