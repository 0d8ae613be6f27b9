# SPDX-License-Identifier: Apache-2.0
"""A rate limit, without a clock of its own."""

from __future__ import annotations

from vmapipe.protocol import limits

# How much may be caught up after a pause, as time: short, so that the limit
# holds over any second, and long enough for a megabyte at 8 MiB/s.
_BURST_S = 0.125


class Pace:
    """Tells how long to wait so that `bytes_per_s` is kept; 0 means no limit."""

    def __init__(self, bytes_per_s: int, now: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._due = now

    def frame_bytes(self, allowed: int) -> int:
        """The largest frame: with a limit several a second, so that it holds evenly."""
        if self.bytes_per_s:
            allowed = min(allowed, self.bytes_per_s // 8)
        return max(limits.MIN_FRAME_CHARGE, allowed)

    def wait_s(self, now: float) -> float:
        return max(0.0, self._due - now) if self.bytes_per_s else 0.0

    def took(self, size_bytes: int, now: float) -> None:
        if self.bytes_per_s:
            self._due = max(self._due, now - _BURST_S) + size_bytes / self.bytes_per_s
