# SPDX-License-Identifier: Apache-2.0
"""Tells what a producer has done, and where data of a guest waits: events `transfer`, `buffer`."""

from __future__ import annotations

import time
from typing import NamedTuple

from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.events import Emit

# At most so often.
TELL_S = 0.25


class Waiting(NamedTuple):
    """Bytes in memory and in the spool file, and writes of the guest that wait."""

    memory_bytes: int
    spool_bytes: int
    writes: int


class Transfer(NamedTuple):
    """Of one device so far.

    `read_bytes` by the producer itself, `saved_clusters` before a guest's writes.
    """

    read_bytes: int
    sent_bytes: int
    saved_clusters: int


class Teller:
    """Of one device. What has not changed is not told again."""

    def __init__(self, device: str, emit: Emit) -> None:
        self._device = device
        self._emit = emit
        self._told = Waiting(0, 0, 0)
        self._tell_at = 0.0
        self._told_transfer = Transfer(0, 0, 0)
        self._tell_transfer_at = 0.0

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

    def tell_transfer(self, done: Transfer, *, last: bool = False) -> None:
        """`last`: at once, whenever it was told before."""
        now = time.monotonic()
        if done == self._told_transfer or (now < self._tell_transfer_at and not last):
            return
        self._told_transfer, self._tell_transfer_at = done, now + TELL_S
        self._emit(
            {
                "event": "transfer",
                "device": self._device,
                "read_bytes": done.read_bytes,
                "sent_bytes": done.sent_bytes,
                "saved_bytes": done.saved_clusters * CLUSTER_BYTES,
            }
        )
