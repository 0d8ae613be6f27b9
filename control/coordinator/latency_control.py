# SPDX-License-Identifier: Apache-2.0
"""The control of a backup's rate by what the guest feels: measurements in, a rate out. Pure.

docs/decisions/0035-guest-latency.md says why it is made like this.
"""

from __future__ import annotations

from vmapipe.runtime.latency import Felt, together

# Of a guest that works: then it doubles with each measurement, as long as that does no harm.
START_BYTES_S = 32 << 20
# More than this nothing reads: then there is no limit.
UNLIMITED_BYTES_S = 8 << 30
# What the guest felt within so long is judged together: among a hundred requests one may be slow.
WINDOW_S = 1.0
# Below this part of the bound there is room for more; between it and the bound all stays as it is.
_ROOM = 0.6
# How much less at once: in proportion to what the bound is exceeded by, within these.
_LEAST_CUT, _MOST_CUT = 0.5, 0.25
_DOUBLE, _STEP = 2.0, 1.25
# Below the rate that was too much, until that is tried again.
_KEPT_BELOW = 0.9
# A rate that was too much is tried again after this; each time in vain after twice as long.
_FIRST_RETRY_S, _LAST_RETRY_S = 8.0, 64.0
# A limit of which less is used than this part is none: a greater one changes nothing.
_USED = 0.6


class LatencyControl:
    """Decides how fast a backup may read so that one in a hundred requests exceeds the bound at most.

    Rates are bytes a second of all disks together; 0: no limit.
    """

    def __init__(self, bound_s: float, floor_bytes_s: int, limit_bytes_s: int = 0) -> None:
        """`floor_bytes_s`: never less, unless `limit_bytes_s`, the user's own limit, is below it."""
        self.bound_s = bound_s
        self._floor = max(1, floor_bytes_s)
        self._limit = limit_bytes_s
        # As the guest allows it; 0: any.
        self._rate = 0.0
        self._starts = True
        # The least rate that is known to be too much, and the last that was not; 0: none is.
        self._too_much = self._good = 0.0
        self._retry_s, self._retry_at = _FIRST_RETRY_S, 0.0
        self._clock_s = 0.0
        self._window: list[Felt] = []
        self._window_s = self._moved = 0.0

    @property
    def rate_bytes_s(self) -> int:
        """What the backup may read now, within the user's limit."""
        if not self._rate:
            return self._limit
        rate = max(self._floor, int(self._rate))
        return min(rate, self._limit) if self._limit else rate

    @property
    def is_at_floor(self) -> bool:
        return bool(self._rate) and self._rate <= self._floor

    def limit(self, bytes_per_s: int) -> None:
        """Take another limit of the user's; 0: none."""
        self._limit = bytes_per_s

    def begin(self, *, guest_is_idle: bool) -> None:
        """The backup begins: slowly if the guest works."""
        self._rate = 0.0 if guest_is_idle else float(max(self._floor, START_BYTES_S))

    def take(self, felt: Felt, moved_bytes: int, passed_s: float) -> int:
        """Take what the guest has felt and what was read since the last call; return the new rate."""
        self._clock_s += passed_s
        self._window.append(felt)
        self._window_s += passed_s
        self._moved += moved_bytes
        seen = together(self._window)
        if seen.is_broken:
            self._slow_down(seen)
        elif self._starts or self._window_s >= WINDOW_S:
            self._speed_up(seen)
        return self.rate_bytes_s

    def _slow_down(self, seen: Felt) -> None:
        measured = self._moved / max(self._window_s, 1e-3)
        used = float(self._rate or max(measured, self._floor))
        if measured < _USED * used:
            # The limit is none, and a little less of it neither.
            used = max(measured, float(self._floor))
        if self._limit:
            used = min(used, float(max(self._limit, 1)))
        if used <= self._floor:
            # Less is not allowed, and what was seen says nothing of more.
            self._good = 0.0
            self._set(self._floor)
            return
        if self._too_much and used >= self._too_much * _KEPT_BELOW and not self._starts:
            self._retry_s = min(_LAST_RETRY_S, 2 * self._retry_s)
        self._too_much = used
        self._retry_at = self._clock_s + self._retry_s
        self._starts = False
        cut = min(_LEAST_CUT, max(_MOST_CUT, self.bound_s / max(seen.p99_s, 1e-9)))
        # Back to where all was well; if it is not any more, the next look cuts.
        good, self._good = (self._good if self._good < used else 0.0), 0.0
        self._set(max(self._floor, good or used * cut))

    def _speed_up(self, seen: Felt) -> None:
        is_idle = not seen.requests and self._window_s >= WINDOW_S
        has_room = seen.p99_s <= _ROOM * self.bound_s
        if seen.requests and self._window_s >= WINDOW_S:
            self._good = self._rate
        is_used = self._moved >= _USED * self._rate * self._window_s
        if self._rate and has_room and (is_used or is_idle):
            self._set(self._more(is_idle=is_idle))
        elif self._window_s >= WINDOW_S:
            self._starts = self._starts and has_room
            self._set(self._rate)

    def _more(self, *, is_idle: bool) -> float:
        if is_idle:
            # Whom it was too much for is gone.
            self._too_much = 0.0
            self._retry_s = _FIRST_RETRY_S
        elif self._too_much and self._rate >= self._too_much:
            # It is not too much any more, as this window has shown.
            self._too_much = 0.0
        if not self._too_much:
            rate = self._rate * (_DOUBLE if self._starts or is_idle else _STEP)
            return 0.0 if rate >= UNLIMITED_BYTES_S else rate
        wanted = self._rate * _STEP
        if wanted <= self._too_much * _KEPT_BELOW:
            return wanted
        if self._clock_s >= self._retry_at:
            return max(self._rate, self._too_much)
        return max(self._rate, self._too_much * _KEPT_BELOW)

    def _set(self, rate: float) -> None:
        """Use this rate; what was seen before says nothing of it."""
        self._rate = rate
        self._window, self._window_s, self._moved = [], 0.0, 0.0
