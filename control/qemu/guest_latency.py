# SPDX-License-Identifier: Apache-2.0
"""What a guest feels of its disks: QEMU's own latency histograms, set for a backup and removed after it.

QEMU counts the requests of devices (not of exports): reads and writes here. A flush takes as long as
what the guest wrote before it, and is left out. Who has set a histogram of their own keeps it, and in a
QEMU with I/O threads none is set: all but the newest free a histogram without the lock under which such a
thread counts in it. Then QEMU's totals, which are only read, tell the mean instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from vmapipe.control.qmp.connection import Answer, Command, Qmp, QmpRefused, ask_if_known
from vmapipe.runtime.latency import NOTHING_FELT, Felt, Means, bounds_ns, felt_of, is_ours, worst
from vmapipe.runtime.text import name_text, one_line

_SET = "block-latency-histogram-set"
_KINDS = ("rd", "wr", "flush", "unmap", "zone_append")
_FELT_KINDS = ("rd", "wr")
# QEMU tells since when a device has had no request. A guest without work still writes a
# journal or a log now and then; one that works is not still for so long.
_IDLE_NS = 200_000_000
# What comes of numbers that are none, or are missing: a backup does not depend on them.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_MAX_WORDS_CHARS = 100


def _devices(qmp: Qmp) -> dict[str, Mapping[str, Any]]:
    """Return the statistics of the guest's devices by what QEMU calls them in commands."""
    found = {}
    for entry in ask_if_known(qmp, "query-blockstats") or ():
        name = str(entry.get("qdev") or entry.get("device") or "")
        if name and isinstance(entry.get("stats"), dict):
            found[name] = entry["stats"]
    return found


def _histograms(stats: Mapping[str, Any]) -> list[Sequence[int]]:
    """Return the boundaries of the histograms that a device has."""
    known = [stats.get(f"{kind}_latency_histogram") for kind in _KINDS]
    return [each["boundaries"] for each in known if isinstance(each, dict)]


def _has_ours(stats: Mapping[str, Any]) -> bool:
    found = _histograms(stats)
    return bool(found) and all(is_ours(each) for each in found)


def remove_histograms(qmp: Qmp) -> tuple[str, ...]:
    """Remove those that backups of ours have set, or left; return their devices' names."""
    removed = []
    for name, stats in _devices(qmp).items():
        if _has_ours(stats):
            with contextlib.suppress(QmpRefused):  # the device is gone meanwhile
                qmp.execute(Command(_SET, {"id": name}))
                removed.append(name)
    return tuple(removed)


class GuestLatency:
    """The latencies of one machine's devices, since the last look. Raises QmpGone."""

    def __init__(self, qmp: Qmp, bound_s: float, every_s: float, notices: list[str]) -> None:
        """`notices`: takes texts for the user."""
        self.every_s = every_s
        self._notices = notices
        self._is_over = False
        self._qmp = qmp
        self._bound_s = bound_s
        self._boundaries = bounds_ns(bound_s)
        # By device.
        self._counts: dict[str, Sequence[int]] = {}
        self._means = Means(bound_s)
        #: True when no request has come for a moment, on any device.
        self.guest_is_idle = True

    def begin(self) -> bool:
        """Set the histograms; False: no device has any. One that is ours is of a backup that was killed."""
        try:
            devices = _devices(self._qmp)
            for name, stats in devices.items():
                # There is none before the first request.
                self.guest_is_idle &= int(stats.get("idle_time_ns", _IDLE_NS)) >= _IDLE_NS
                self._add(name, stats)
        except _NONSENSE as error:
            self._give_up(error)
            return True
        return bool(devices)

    def _give_up(self, error: Exception) -> None:
        self._is_over = True
        what = one_line(f"{type(error).__name__}: {error}", _MAX_WORDS_CHARS)
        self._notices.append(
            f"--guest-latency has no effect any more: what QEMU tells of its requests is nonsense ({what})"
        )

    def end(self) -> None:
        """The histograms are removed: nothing is asked any more, and none is set."""
        self._is_over = True

    def _add(self, name: str, stats: Mapping[str, Any]) -> None:
        if _histograms(stats) and not _has_ours(stats):
            self._only_mean(name, stats, "has a latency histogram of somebody else's")
        elif ask_if_known(self._qmp, "query-iothreads") != []:
            # Which of them serves which queue is not looked at: it may change with a plugged device.
            self._only_mean(name, stats, "gets no latency histogram: this QEMU has I/O threads")
        else:
            arguments: dict[str, Any] = {"id": name}
            for kind in ("read", "write"):
                arguments[f"boundaries-{kind}"] = self._boundaries
            try:
                self._qmp.execute(Command(_SET, arguments))
            except QmpRefused as refused:
                self._only_mean(name, stats, f"gets no latency histogram: {refused}")
            else:
                self._counts[name] = [0] * (len(self._boundaries) + 1)

    def _only_mean(self, name: str, stats: Mapping[str, Any], why: str) -> None:
        self._counts.pop(name, None)
        self._means.take(name, *_totals(stats))
        self._notices.append(
            f"the guest's device {name_text(name)} {why}: --guest-latency holds for the mean of its "
            "requests, not for 99 of 100"
        )

    def take(self) -> Felt:
        """Return what the guest has felt since the last call: of the device that feels the worst, all
        requests counted.
        """
        if self._is_over:
            return NOTHING_FELT
        try:
            return self._felt()
        except _NONSENSE as error:
            self._give_up(error)
            return NOTHING_FELT

    def _felt(self) -> Felt:
        parts = []
        for name, stats in _devices(self._qmp).items():
            if name in self._counts:
                parts.append(self._felt_by(name, stats))
            elif name in self._means:
                parts.append(self._means.take(name, *_totals(stats)))
            else:
                self._add(name, stats)  # plugged in meanwhile
        return worst(parts)

    def _felt_by(self, name: str, stats: Mapping[str, Any]) -> Felt:
        counts = [0] * (len(self._boundaries) + 1)
        for kind in _FELT_KINDS:
            histogram: Answer = stats.get(f"{kind}_latency_histogram") or {}
            bins = histogram.get("bins", ())
            if list(histogram.get("boundaries", ())) != self._boundaries or len(bins) != len(
                counts
            ):
                # Somebody has set another one, or the device is a new one of that name.
                self._add(name, stats)
                return NOTHING_FELT
            counts = [a + int(b) for a, b in zip(counts, bins, strict=True)]
        before, self._counts[name] = self._counts[name], counts
        new = [max(0, now - then) for now, then in zip(counts, before, strict=True)]
        return felt_of(self._boundaries, new, self._bound_s)


def _totals(stats: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many reads and writes there were, and how long they took together (ns)."""
    requests = sum(int(stats.get(f"{kind}_operations", 0)) for kind in _FELT_KINDS)
    return requests, sum(int(stats.get(f"{kind}_total_time_ns", 0)) for kind in _FELT_KINDS)
