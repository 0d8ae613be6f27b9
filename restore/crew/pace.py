# SPDX-License-Identifier: Apache-2.0
"""The limits of `throttling.bps`, without a clock of their own."""

from __future__ import annotations

from collections.abc import Mapping

# What may be caught up after a pause: short, so that a limit holds over any second.
_BURST_S = 0.125


class Pace:
    """Tells when the next piece may be handed out so that every device's limit is kept."""

    def __init__(self, bytes_per_s: Mapping[int, int], now: float) -> None:
        """`bytes_per_s` by dev_id, only those that have a limit."""
        self._limits = dict(bytes_per_s)
        self._due = dict.fromkeys(bytes_per_s, now)

    def wait_s(self, data_bytes: Mapping[int, int], now: float) -> float:
        """How long a piece with these bytes, by dev_id, has to wait."""
        return max((self._due[dev_id] - now for dev_id in data_bytes), default=0.0)

    def took(self, data_bytes: Mapping[int, int], now: float) -> None:
        for dev_id, size in data_bytes.items():
            start = max(self._due[dev_id], now - _BURST_S)
            self._due[dev_id] = start + size / self._limits[dev_id]
