# SPDX-License-Identifier: Apache-2.0
"""The speed limit that QEMU's backup job is to have, so that only data counts. Pure, without a clock.

A job's own limit counts all that it copies: holes and zeroes as much as data. So it is
lifted as long as less data comes than is allowed, and put in force when what was
allowed is used up.
"""

from __future__ import annotations

# So much may come at once after a time with less: as time, so that the limit is kept over
# any few seconds, and at least one of QEMU's requests.
_BURST_S = 0.5
_LEAST_BURST_BYTES = 1 << 20
# What came too much is made up for: what QEMU reads before it hears of its limit. Not
# more, or the copies before a guest's writes, which no limit holds up and which cannot
# be told from other data, would count for a long time after them.
_MOST_DEBT_S = 4.0
_LEAST_MOST_DEBT_BYTES = 64 << 20


class JobSpeed:
    """`wanted` is what QEMU's job is to have: the limit, or 0 for none."""

    def __init__(self, limit_bytes_s: int, now: float) -> None:
        self._limit = limit_bytes_s
        #: As the job begins.
        self.wanted = limit_bytes_s
        # What may come before the limit is needed again; below 0, what has come too much.
        self._allowed = 0.0
        self._counted_at = now

    def change(self, limit_bytes_s: int, now: float) -> None:
        """Another limit, which QEMU is given by whoever has chosen it."""
        self._limit = self.wanted = limit_bytes_s
        self._allowed = 0.0
        self._counted_at = now

    def took(self, size_bytes: int, now: float) -> bool:
        """So much data has come; whether `wanted` is another one now."""
        before = self.wanted
        if self._limit:
            self._count(now)
            floor = -max(_LEAST_MOST_DEBT_BYTES, _MOST_DEBT_S * self._limit)
            self._allowed = max(floor, self._allowed - size_bytes)
            if self._allowed <= 0:
                self.wanted = self._limit
        return self.wanted != before

    def look(self, now: float) -> int:
        """`wanted`, after the time that has passed."""
        if self._limit:
            self._count(now)
            if self._allowed >= self._burst:
                self.wanted = 0
        return self.wanted

    @property
    def _burst(self) -> float:
        return max(_LEAST_BURST_BYTES, _BURST_S * self._limit)

    def _count(self, now: float) -> None:
        passed_s = max(0.0, now - self._counted_at)
        self._allowed = min(self._burst, self._allowed + passed_s * self._limit)
        self._counted_at = now
