# SPDX-License-Identifier: Apache-2.0
"""Latencies of a guest's requests: counted in bins around a bound, and what they say of it. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

# From a 256th of the bound to 256 times it, three bins for each doubling: a latency that is read out of
# its bin is at most a quarter too large.
_STEPS_EACH_WAY = 24
_STEPS_A_DOUBLING = 3
# Two nanoseconds that nobody else asks for, and in which no disk answers: by them the histogram
# that a killed backup has left in QEMU is known as ours.
MARK_NS = (1009, 2003)
PERCENTILE = 0.99


class Felt(NamedTuple):
    """What a guest has felt of its disks for a time: requests that were answered, how many of them
    later than the bound, and the 99th percentile in seconds (only a mean is known: that)."""

    requests: int
    slow: int
    p99_s: float

    @property
    def is_broken(self) -> bool:
        """True when more than one in a hundred took longer than the bound."""
        return self.slow > (1 - PERCENTILE) * self.requests + 1e-9


NOTHING_FELT = Felt(0, 0, 0.0)


def together(parts: Sequence[Felt]) -> Felt:
    """Return several as one; its percentile is the worst of theirs."""
    return Felt(
        sum(part.requests for part in parts),
        sum(part.slow for part in parts),
        max((part.p99_s for part in parts), default=0.0),
    )


def bounds_ns(bound_s: float) -> list[int]:
    """Return the bins' boundaries, ascending; the bound is one of them."""
    steps = range(-_STEPS_EACH_WAY, _STEPS_EACH_WAY + 1)
    found = [round(bound_s * 1e9 * 2 ** (step / _STEPS_A_DOUBLING)) for step in steps]
    return [*MARK_NS, *sorted({each for each in found if each > MARK_NS[-1]})]


def is_ours(boundaries: Sequence[int]) -> bool:
    """Tell whether these are boundaries of `bounds_ns`."""
    return tuple(boundaries[: len(MARK_NS)]) == MARK_NS


def felt_of(boundaries: Sequence[int], counts: Sequence[int], bound_s: float) -> Felt:
    """Read counts: bin i is of latencies below boundary i, and not below the one before it."""
    requests = sum(counts)
    if not requests:
        return NOTHING_FELT
    first_slow = bisect.bisect_left(boundaries, round(bound_s * 1e9)) + 1
    rank, seen = PERCENTILE * requests, 0
    p99_ns = boundaries[-1]
    for boundary, count in zip(boundaries, counts, strict=False):
        seen += count
        if seen >= rank:
            p99_ns = boundary
            break
    return Felt(requests, sum(counts[first_slow:]), p99_ns / 1e9)


class LatencyCounts:
    """Counts of latencies since they were last taken. Not for several threads at once."""

    def __init__(self, bound_s: float) -> None:
        self.bound_s = bound_s
        self._boundaries = bounds_ns(bound_s)
        self._counts = [0] * (len(self._boundaries) + 1)

    def add(self, latency_ns: int, requests: int = 1) -> None:
        self._counts[bisect.bisect_right(self._boundaries, latency_ns)] += requests

    def take(self) -> Felt:
        counts, self._counts = self._counts, [0] * len(self._counts)
        return felt_of(self._boundaries, counts, self.bound_s)


class Means:
    """Of devices of which only totals are known: the mean latency since the last look stands for all."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._before: dict[str, tuple[int, int]] = {}

    def __contains__(self, device: str) -> bool:
        return device in self._before

    def take(self, device: str, requests: int, total_ns: int) -> Felt:
        """Take the numbers so far; the first ones of a device say nothing yet."""
        then = self._before.get(device)
        self._before[device] = requests, total_ns
        if then is None or requests <= then[0]:
            return NOTHING_FELT
        count = requests - then[0]
        mean_s = max(0, total_ns - then[1]) / count / 1e9
        return Felt(count, count if mean_s > self._bound_s else 0, mean_s)


def worst(parts: Sequence[Felt]) -> Felt:
    """Return what several devices' guest has felt: one's bad second is not made good by the requests
    of another."""
    return together([part for part in parts if part.is_broken] or parts)
