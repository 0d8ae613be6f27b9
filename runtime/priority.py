# SPDX-License-Identifier: Apache-2.0
"""How a backup stands back where a guest needs the same processors."""

from __future__ import annotations

import contextlib
import os

from vmapipe.runtime.syscalls import set_time_slice

# A third of a guest's share where there is not enough for both. Not less: a guest
# may wait for what a backup has begun. With four busy loops on two processors, a
# guest that writes as fast as it can had 3500 writes a second without this, 2000
# with 5, 1000 with 10; without the loops 5 and 10 helped alike.
_NICE = 5
# The shortest that Linux takes. Whoever wakes up waits for the rest of the slice
# of the one who runs: with the usual 1 to 3 ms that was the p99 of a guest's writes.
_SLICE_NS = 100_000


def stand_back() -> None:
    """Let others on this host go first; for this thread and those that it will start."""
    # Someone who is as low already, or a container that forbids it, is no error.
    with contextlib.suppress(OSError):
        nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, 0))
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        # Batch: does not interrupt whoever runs when it wakes up.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        set_time_slice(os.SCHED_BATCH, nice, _SLICE_NS)


def give_way() -> None:
    """Let whoever waits for this processor run now. For between two pieces of work.

    He would wait for the scheduler's next tick, up to 4 ms, however little we had
    to do and however nice we are: the p99 of a guest's writes was that.
    """
    os.sched_yield()
