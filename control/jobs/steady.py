# SPDX-License-Identifier: Apache-2.0
"""Seconds since 1970 that only ever go on: the differences are true, whatever is done to the clock."""

from __future__ import annotations

import time

_STARTED_S, _STARTED_MONOTONIC_S = time.time(), time.monotonic()


def now_s() -> float:
    """The clock's time at this process' start, and what has passed since."""
    return _STARTED_S + (time.monotonic() - _STARTED_MONOTONIC_S)
