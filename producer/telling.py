# SPDX-License-Identifier: Apache-2.0
"""Tells where data of a guest waits for the archiver: the event `buffer`."""

from __future__ import annotations

import time
from typing import NamedTuple

from vmapipe.runtime.events import Emit

# At most so often.
TELL_S = 0.25


class Waiting(NamedTuple):
    """Bytes in memory and in the spool file, and writes of the guest that wait."""

    memory_bytes: int
    spool_bytes: int
    writes: int


class Teller:
    """Of one device. What has not changed is not told again."""

    def __init__(self, device: str, emit: Emit) -> None:
        self._device = device
        self._emit = emit
        self._told = Waiting(0, 0, 0)
        self._tell_at = 0.0

    def tell(self, state: Waiting) -> None:
        now = time.monotonic()
        if state == self._told or now < self._tell_at:
            return
        self._told, self._tell_at = state, now + TELL_S
        self._emit(
            {
                "event": "buffer",
                "device": self._device,
                "memory_bytes": state.memory_bytes,
                "spool_bytes": state.spool_bytes,
                "waiting_writes": state.writes,
            }
        )
