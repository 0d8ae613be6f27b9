# SPDX-License-Identifier: Apache-2.0
"""How an output ends: complete or given up, once, whichever thread says so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from vmapipe.archiver.outputs.errors import OutputFailure
from vmapipe.archiver.outputs.interrupt import Interrupt
from vmapipe.runtime.cancel import Cancel

# How long `abandon` waits for the thread that writes. A call that can be
# interrupted ends within milliseconds; one that cannot (a dead disk) may last
# for ever, and a process that is told to stop has 10 s in all. Longer than
# what a command gets to end by itself.
ABANDON_WAIT_S = 3.0


class EndsOnce:
    """The common part of all outputs that a thread writes to and another one may abandon.

    One lock is held during each write and during the commit. Whoever holds it
    while the output is abandoned tidies up when it is through, so that nothing
    is closed under a running call (for a descriptor the kernel does not mind,
    and the number may mean another file the next moment).
    """

    def __init__(self, description: str, cancel: Cancel | None) -> None:
        self.description = description
        self.written_bytes = 0
        self._lock = threading.Lock()
        self._over = False
        self._interrupt = Interrupt(cancel)

    def abandon(self) -> None:
        self._break_off()
        self._interrupt.ask()
        if not self._lock.acquire(timeout=ABANDON_WAIT_S):
            self._forsake()
            return
        try:
            self._give_up_once()
        finally:
            self._lock.release()

    # --- what the kinds differ in ---

    def _break_off(self) -> None:
        """First of all, before the thread that writes knows of it. Must not raise."""

    def _give_up(self) -> None:
        """Take back what can be, and let go of everything. The lock is held. Must not raise."""

    def _forsake(self) -> None:
        """As `_give_up`, for a call that does not return: without the lock, and without closing."""

    # --- the rest ---

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """Around each write and the commit. Raises OutputFailure when there is nothing to write."""
        with self._lock:
            if self._over:
                raise OutputFailure(f"{self.description} takes no more: it is complete or given up")
            try:
                yield
            finally:
                if self._interrupt.abandoned:
                    self._give_up_once()

    def _give_up_once(self) -> None:
        if not self._over:
            self._over = True
            self._give_up()
