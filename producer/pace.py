# SPDX-License-Identifier: Apache-2.0
"""A rate limit, without a clock of its own, that may be changed while it is kept."""

from __future__ import annotations

from vmapipe.protocol import limits
from vmapipe.runtime.events import Event, speed_in

# How much may be caught up after a pause, as time: short, so that the limit
# holds over any second, and long enough for a megabyte at 8 MiB/s.
_BURST_S = 0.125
# The longest single wait: a change of the limit is felt within this.
_LONGEST_WAIT_S = 0.25


class Pace:
    """Tells how long to wait so that `bytes_per_s` is kept; 0 means no limit."""

    def __init__(self, bytes_per_s: int, now: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._due = now
        self._wanted = bytes_per_s

    def hear(self, order: Event) -> None:
        """What the parent says; from any thread, and followed at the next question."""
        wanted = speed_in(order)
        if wanted is not None:
            self._wanted = wanted

    def frame_bytes(self, allowed: int) -> int:
        """The largest frame: with a limit several a second, so that it holds evenly."""
        if self.bytes_per_s:
            allowed = min(allowed, self.bytes_per_s // 8)
        return max(limits.MIN_FRAME_CHARGE, allowed)

    def wait_s(self, now: float) -> float:
        """0: go on; else ask again after so long."""
        self._follow(now)
        return min(max(0.0, self._due - now), _LONGEST_WAIT_S) if self.bytes_per_s else 0.0

    def took(self, size_bytes: int, now: float) -> None:
        if self.bytes_per_s:
            self._due = max(self._due, now - _BURST_S) + size_bytes / self.bytes_per_s

    def _follow(self, now: float) -> None:
        wanted, before = self._wanted, self.bytes_per_s
        if wanted != before:
            # What was taken at the old rate, an eighth of a second's, is paid for at the
            # quicker of the two: at a much lower one nothing would be read for long.
            owed_s = max(0.0, self._due - now)
            self._due = now + owed_s * min(1.0, before / wanted) if wanted else now
            self.bytes_per_s = wanted
