# SPDX-License-Identifier: Apache-2.0
"""What has come from QEMU and waits to be sent: runs of clusters, in the order of coming. Pure."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from vmapipe.protocol.limits import MAX_RUN_CLUSTERS


class Arrived(NamedTuple):
    """A run of clusters that waits to be sent. `position` -1: they are all zero."""

    first: int
    clusters: int
    position: int
    length: int


def add_zeroes(queue: deque[Arrived], first: int, count: int) -> None:
    """At the end; neighbours become one run."""
    # The sender may be at work with the first one: only others grow.
    if len(queue) > 1 and queue[-1].position < 0:
        last = queue[-1]
        together = last.clusters + count
        if last.first + last.clusters == first and together <= MAX_RUN_CLUSTERS:
            queue[-1] = Arrived(last.first, together, -1, 0)
            return
    queue.append(Arrived(first, count, -1, 0))
