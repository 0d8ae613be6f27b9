# SPDX-License-Identifier: Apache-2.0
"""What the descriptors of a process that listens are for: strangers get the smallest part. Pure."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.runtime.errors import Failure

# What is needed for a moment, whatever else there is: to start a child (ten), to read
# the list of keys, an archive's folder, the host's memory.
RESERVE = 16
# With less a job of one disk would not fit.
_LEAST = 24
# Handshakes that are under way. Each is milliseconds of work and may hold 1 KiB; the
# producers of the largest job come together, and wait for each other.
_MOST_JUDGED = 64
# Connections whose first words are awaited: in the acceptor's process, where they cost
# a descriptor and some 2 KiB each.
_MOST_WAITING = 1024
# What a client that was let in and sends much costs the acceptor: two sockets, a pipe.
_PER_GUEST = 4


class Budget(NamedTuple):
    """`judged`, `waiting`, `guests`: see acceptor.py. `rest`: for whoever has proved who it is,
    in the process behind it: connections, and what jobs need."""

    judged: int
    waiting: int
    guests: int
    rest: int


def budget_of(limit: int, in_use: int) -> Budget:
    """`limit`: how many descriptors each of the two processes may have. Raises Failure."""
    spare = limit - in_use - RESERVE
    if spare < _LEAST:
        raise Failure(
            f"only {limit} files may be open here, and an archiver that listens on TCP needs "
            f"{in_use + RESERVE + _LEAST} or more: raise the limit (`ulimit -n`, LimitNOFILE= of a "
            "unit)"
        )
    judged = min(_MOST_JUDGED, spare // 8)
    waiting = min(_MOST_WAITING, limit // 8)
    guests = max(2, (limit - RESERVE - 2 * waiting) // _PER_GUEST)
    return Budget(judged, waiting, guests, spare - judged)
