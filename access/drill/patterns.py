# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of a user's plan, held against what a stranger's guest says, in bounded time."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A search in some KiB takes well under a millisecond, unless an expression repeats what repeats.
_LIMIT_S = 0.5


class PatternTooSlow(Exception):
    """The expression has not come to an end in this text."""


def bounded_search(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Search in the main thread. Raises PatternTooSlow.

    Python's engine looks for signals while it works, so a timer of this process's CPU time ends it.
    """
    with _timer():
        return pattern.search(text)


@contextmanager
def _timer() -> Iterator[None]:
    def expire(signum: int, frame: FrameType | None) -> None:
        raise PatternTooSlow

    # Whoever is woken up by signals has nothing to do with this one.
    wakeup = signal.set_wakeup_fd(-1)
    before = signal.signal(signal.SIGVTALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _LIMIT_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
