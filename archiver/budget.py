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
# What a client that was let in costs the acceptor: two sockets, and every second one a
# pipe; those that send little need none.
_PER_GUEST = 3
# Who was let in and says nothing yet.
_MOST_SILENT = 32
# Who was refused, and has not gone.
_MOST_VISITORS = 64


class Budget(NamedTuple):
    """`waiting`, `judged`: see acceptor.py; `pipes`: for those that send much. `guests`: all that were
    shown in: `silent` ones, `visitors` that belong to no job, and those of `jobs`. `rest`: descriptors of
    the process behind for jobs, with their connections."""

    waiting: int
    judged: int
    guests: int
    pipes: int
    silent: int
    visitors: int
    jobs: int
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
    waiting = min(_MOST_WAITING, limit // 8)
    guests = (limit - RESERVE - 2 * waiting) // _PER_GUEST
    judged = min(_MOST_JUDGED, max(2, guests // 8))
    silent = min(_MOST_SILENT, max(1, guests // 8))
    visitors = min(_MOST_VISITORS, max(2, guests // 8))
    others = judged + silent + visitors
    return Budget(
        waiting,
        judged,
        guests,
        guests // 2,
        silent,
        visitors,
        max(2, guests - others),
        spare - others,
    )
