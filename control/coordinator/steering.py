# SPDX-License-Identifier: Apache-2.0
"""The speed limit of a running backup: the user's, or less while its guest would feel it.

What the guest feels is measured where its requests are: by QEMU, by libvirt, or by the guards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.latency import Felt, together, worst

if TYPE_CHECKING:
    from vmapipe.control.coordinator.latency_control import LatencyControl
    from vmapipe.runtime.event_types import FeltByGuest, GuestLatencyEvent

# What is told, and judged at once by those who are asked seldom.
_TELL_S = 1.0
#: Of those who are asked often at little cost; the others are asked once in a window.
QUICK_S = 0.25
# At the floor, and still above the bound for so long: then it is not for the backup to mend.
_HELPLESS_S = 10.0


class Shares:
    """A speed limit of several disks: equal parts for all that are not done; 0 is no limit. Pure.

    `in_turn`: the disks are read one after the other, and each has all of it.
    """

    def __init__(self, bytes_per_s: int, disks: Sequence[str], *, in_turn: bool = False) -> None:
        self.bytes_per_s = bytes_per_s
        self._active = dict.fromkeys(disks)
        self._in_turn = in_turn

    @property
    def share(self) -> int:
        """The share of each disk that is not done, rounded up: 1 byte a second of two disks is not 0."""
        return -(-self.bytes_per_s // (1 if self._in_turn else max(1, len(self._active))))

    @property
    def active(self) -> list[str]:
        return list(self._active)

    def done(self, disk: str) -> bool:
        """Take a disk out; tell whether the share of the others has changed."""
        before = self.share
        self._active.pop(disk, None)
        return bool(self._active) and self.share != before


class LatencyWish(NamedTuple):
    """`--guest-latency` and `--latency-floor`."""

    bound_s: float
    floor_bytes_s: int


class LatencySource(Protocol):
    """Who knows what the guest feels."""

    #: How often it may be asked, in seconds.
    every_s: float
    #: True when the guest had nothing to do as the backup began.
    guest_is_idle: bool

    def take(self) -> Felt:
        """Return what was felt since the last call. Raises Failure."""
        ...


class Measurable(Protocol):
    """A machine whose guest's requests can be measured."""

    def measure(self, bound_s: float, notices: list[str]) -> LatencySource | None:
        """Begin to measure; None: nothing can be, and `notices` says why. Raises Failure."""
        ...


class ToldLatency:
    """What the producers of guarded disks tell, each of its own disk."""

    every_s = QUICK_S
    #: Nothing is known before: a guest that works is not to be surprised.
    guest_is_idle = False

    def __init__(self) -> None:
        self._parts: list[Felt] = []

    def measure(self, bound_s: float, notices: list[str]) -> LatencySource:
        return self

    def tell(self, felt: Felt) -> None:
        self._parts.append(felt)

    def take(self) -> Felt:
        parts, self._parts = self._parts, []
        return worst(parts)


class Steering:
    """The limit of one backup, shared by its disks. `poll` it; send `share` when that has changed."""

    def __init__(
        self,
        speed_bytes_s: int,
        disks: Sequence[str],
        wish: LatencyWish | None,
        *,
        in_turn: bool = False,
    ) -> None:
        self.limit_bytes_s = speed_bytes_s
        self._shares = Shares(speed_bytes_s, disks, in_turn=in_turn)
        self._wish = wish
        self._control: LatencyControl | None = None
        if wish is not None:
            # Imported here: other backups start sooner without.
            from vmapipe.control.coordinator.latency_control import LatencyControl

            self._control = LatencyControl(wish.bound_s, wish.floor_bytes_s, speed_bytes_s)
        self._source: LatencySource | None = None
        self.told = ToldLatency()
        self._read: dict[str, int] = {}
        self._asked_at = self._told_at = 0.0
        self._asked_bytes = self._told_bytes = 0
        self._second: list[Felt] = []
        self._seconds = self._above = 0
        self._worst_s = 0.0
        self._helpless_since = 0.0
        self._has_said_so = False
        # What who measures has for the user.
        self._notices: list[str] = []

    @property
    def share(self) -> int:
        """The limit of each disk that is not done, bytes a second; 0: none."""
        return self._shares.share

    @property
    def read_bytes(self) -> int:
        """All that was read so far."""
        return sum(self._read.values())

    @property
    def options(self) -> list[str]:
        """The options of producers that measure what the guest feels."""
        return [f"--guest-latency={self._wish.bound_s}s"] if self._wish else []

    def begin(self, machine: Measurable, emit: Emit) -> None:
        """The disks are in use from now on. Raises Failure."""
        wish, control = self._wish, self._control
        if wish is None or control is None:
            return
        source = machine.measure(wish.bound_s, self._notices)
        self._tell_notices(emit)
        if source is None:
            return
        self._source = source
        self._asked_at = self._told_at = self._helpless_since = time.monotonic()
        control.begin(guest_is_idle=source.guest_is_idle)
        self._shares.bytes_per_s = control.rate_bytes_s

    @property
    def wait_s(self) -> float:
        """How long nothing has to be asked."""
        if self._source is None:
            return 1.0
        return min(1.0, max(0.0, self._asked_at + self._source.every_s - time.monotonic()))

    def limit(self, bytes_per_s: int) -> None:
        """Take another limit of the user's."""
        self.limit_bytes_s = self._shares.bytes_per_s = bytes_per_s
        if self._control is not None:
            self._control.limit(bytes_per_s)
            if self._source is not None:
                self._shares.bytes_per_s = self._control.rate_bytes_s

    def take(self, event: Event) -> bool:
        """Take what a child has told; tell whether `share` has changed."""
        match event["event"]:
            case "transfer":
                self._read[event["device"]] = event["read_bytes"]
            case "felt":
                self.told.tell(Felt(event["requests"], event["slow"], event["p99_s"]))
            case "progress" if "devices" in event:
                # Disks that are done leave their share to the others.
                is_done = [
                    self._shares.done(device["name"])
                    for device in event["devices"]
                    if device["done_bytes"] == device["bytes"]
                ]
                return any(is_done)
        return False

    def poll(self, emit: Emit) -> bool:
        """Ask what the guest feels, if it is time; tell whether `share` has changed. Raises Failure."""
        source, control, now = self._source, self._control, time.monotonic()
        if source is None or control is None or now < self._asked_at + source.every_s:
            return False
        felt, total = source.take(), self.read_bytes
        self._tell_notices(emit)
        rate = control.take(felt, total - self._asked_bytes, now - self._asked_at)
        self._asked_at, self._asked_bytes = now, total
        self._second.append(felt)
        if now - self._told_at >= _TELL_S:
            self._tell(emit, now, total, rate)
        changed = rate != self._shares.bytes_per_s
        self._shares.bytes_per_s = rate
        return changed

    def _tell_notices(self, emit: Emit) -> None:
        """Some come later: of devices that were plugged in meanwhile."""
        while self._notices:
            emit({"event": "notice", "text": self._notices.pop(0)})

    def _tell(self, emit: Emit, now: float, total: int, rate: int) -> None:
        """Report the last second."""
        control = self._control
        felt = together(self._second)
        passed_s = now - self._told_at
        read_bytes_s = round(max(0, total - self._told_bytes) / passed_s)
        self._second, self._told_at, self._told_bytes = [], now, total
        if control is None:
            return
        self._seconds += 1
        self._above += felt.is_broken
        self._worst_s = max(self._worst_s, felt.p99_s)
        event: GuestLatencyEvent = {
            "event": "guest-latency",
            "bound_s": control.bound_s,
            "requests": felt.requests,
            "p99_s": round(felt.p99_s, 6),
            "limit_bytes_s": rate,
            "read_bytes_s": read_bytes_s,
        }
        emit(event)
        if self._has_said_so:
            return
        if not (control.is_at_floor and felt.is_broken):
            self._helpless_since = now
        elif now - self._helpless_since >= _HELPLESS_S:
            self._has_said_so = True
            text = (
                f"the guest waits {1000 * felt.p99_s:.0f} ms although the backup reads no more than "
                "its floor: its own work, or the copies before its writes, are more than the disk "
                "can do (--latency-floor, a larger --guest-latency, or another hour)"
            )
            emit({"event": "notice", "text": text})

    def result(self) -> FeltByGuest | None:
        """Return what the guest has felt in all; None: it was not measured."""
        if self._control is None or not self._seconds:
            return None
        return {
            "bound_s": self._control.bound_s,
            "worst_s": round(self._worst_s, 6),
            "seconds": self._seconds,
            "seconds_above": self._above,
        }
