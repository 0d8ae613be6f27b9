# SPDX-License-Identifier: Apache-2.0
"""Waiting for descriptors, whatever their numbers are.

`select.select()` cannot take a descriptor above 1023: a process with that many
connections would end at its next wait. Nothing in this program calls it (`make
lint` sees to that); these two functions are what it was used for.
"""

from __future__ import annotations

import errno
import math
import os
import select
from collections.abc import Collection

# poll() takes milliseconds as an int; a longer wait begins anew where it matters.
_MAX_WAIT_S = 24 * 3600.0


def readable(fds: Collection[int], timeout_s: float | None = None) -> list[int]:
    """Those of `fds` that can be read or have ended, as soon as one can; empty after `timeout_s`.

    None waits without an end. A signal does not shorten the wait: watch a
    Cancel's descriptor with the others for that. Raises OSError for a descriptor
    that is not open.
    """
    return _ready(fds, select.POLLIN, timeout_s)


def writable(fd: int, timeout_s: float | None = None) -> bool:
    """Whether a write would not wait, or fail at once; see `readable`."""
    return bool(_ready((fd,), select.POLLOUT, timeout_s))


def _ready(fds: Collection[int], event: int, timeout_s: float | None) -> list[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, event)
    if timeout_s is None or math.isinf(timeout_s):
        found = poller.poll()
    else:
        found = poller.poll(min(max(timeout_s, 0.0), _MAX_WAIT_S) * 1000)
    if any(events & select.POLLNVAL for _, events in found):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return [fd for fd, _ in found]
