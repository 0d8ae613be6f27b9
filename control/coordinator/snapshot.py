# SPDX-License-Identifier: Apache-2.0
"""A snapshot that somebody else makes of a running machine's disks for one backup, and takes back."""

from __future__ import annotations

from typing import Protocol

from vmapipe.control.coordinator.steering import LatencySource
from vmapipe.control.qemu.vmstate import Instant
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Emit


class Snapshot(Protocol):
    """Disks that are of one instant from `begin` on and until `end`; all but `end` raise Failure."""

    #: Texts for the user; the caller that prints them removes them.
    notices: list[str]

    @property
    def fd(self) -> int:
        """Readable when `poll` has something to see."""
        ...

    def begin(self, emit: Emit, cancel: Cancel) -> Instant | None:
        """Make it: afterwards producers can read. None: there is no instant, nothing runs."""
        ...

    def measure(self, bound_s: float, notices: list[str]) -> LatencySource | None:
        """Measure what the guest feels from now on; None: nothing can be, and `notices` says why."""
        ...

    def poll(self) -> None:
        """Raise Failure when it is lost."""
        ...

    def end(self, *, stored: bool = False) -> str:
        """Remove it; return a text when something remains. Never raises, may be called again.

        `stored`: its archive is.
        """
        ...
