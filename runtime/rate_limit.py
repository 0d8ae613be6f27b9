# SPDX-License-Identifier: Apache-2.0
"""Speed limits: of what this program reads or writes, and of QEMU's backup jobs. Pure: time is given."""

from __future__ import annotations

# How much may be caught up after a pause, as time: short, so that the limit
# holds over any second, and long enough for a megabyte at 8 MiB/s.
_BURST_S = 0.125


class RateLimiter:
    """Computes how long to wait so that a limit in bytes a second is kept; 0: no limit.

    The limit may be changed by any thread; it is followed from the next question on.
    """

    def __init__(self, bytes_per_s: int, now: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._due = now
        self._wanted = bytes_per_s

    def change(self, bytes_per_s: int) -> None:
        self._wanted = bytes_per_s

    def wait_s(self, now: float) -> float:
        """Return how long to wait before the next piece; 0: go on."""
        if self._wanted != self.bytes_per_s:
            self._follow(now)
        return max(0.0, self._due - now) if self.bytes_per_s else 0.0

    def took(self, size_bytes: int, now: float) -> None:
        """Count a piece that was read or written."""
        if self.bytes_per_s:
            self._due = max(self._due, now - _BURST_S) + size_bytes / self.bytes_per_s

    def _follow(self, now: float) -> None:
        wanted, before = self._wanted, self.bytes_per_s
        # What was taken at the old rate, an eighth of a second's, is paid for at the
        # quicker of the two: at a much lower one nothing would be read for long.
        owed_s = max(0.0, self._due - now)
        self._due = now + owed_s * min(1.0, before / wanted) if wanted else now
        self.bytes_per_s = wanted


# So much may come at once after a time with less: as time, so that the limit is kept over
# any few seconds, and at least one of QEMU's requests.
_JOB_BURST_S = 0.5
_LEAST_BURST_BYTES = 1 << 20
# An excess is made up for: what QEMU reads before it hears of its limit. Not
# more, or the copies before a guest's writes, which no limit holds up and which cannot
# be told from other data, would count for a long time after them.
_MOST_DEBT_S = 4.0
_LEAST_MOST_DEBT_BYTES = 64 << 20


class JobRateLimiter:
    """Decides when QEMU's backup job needs its speed limit, so that only data counts.

    A job's own limit counts all that it copies: holes and zeroes as much as data. So it is
    lifted as long as less data comes than is allowed, and put in force when what was
    allowed is used up. `wanted` is what the job is to have: the limit, or 0 for none.
    """

    def __init__(self, limit_bytes_s: int, now: float) -> None:
        self._limit = limit_bytes_s
        #: As the job begins.
        self.wanted = limit_bytes_s
        # Bytes that may come before the limit is needed again; negative: the excess.
        self._allowed = 0.0
        self._counted_at = now

    def change(self, limit_bytes_s: int, now: float) -> None:
        """Use another limit, which QEMU has been given already."""
        self._limit = self.wanted = limit_bytes_s
        self._allowed = 0.0
        self._counted_at = now

    def took(self, size_bytes: int, now: float) -> bool:
        """Count data that has come; return whether `wanted` has changed."""
        before = self.wanted
        if self._limit:
            self._count(now)
            floor = -max(_LEAST_MOST_DEBT_BYTES, _MOST_DEBT_S * self._limit)
            self._allowed = max(floor, self._allowed - size_bytes)
            if self._allowed <= 0:
                self.wanted = self._limit
        return self.wanted != before

    def wanted_at(self, now: float) -> int:
        """Return `wanted`, after the time that has passed."""
        if self._limit:
            self._count(now)
            if self._allowed >= self._burst:
                self.wanted = 0
        return self.wanted

    @property
    def _burst(self) -> float:
        return max(_LEAST_BURST_BYTES, _JOB_BURST_S * self._limit)

    def _count(self, now: float) -> None:
        passed_s = max(0.0, now - self._counted_at)
        self._allowed = min(self._burst, self._allowed + passed_s * self._limit)
        self._counted_at = now
