# SPDX-License-Identifier: Apache-2.0
"""The limit of QEMU's job: lifted for holes, and never so that too much data comes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.producer.sink.jobspeed import JobSpeed

MIB = 1 << 20
LIMIT = 8 * MIB
# What comes at once, after time without data, and before QEMU hears of its limit.
BURST = LIMIT // 2
LATE = 4 * MIB


class Qemu:
    """A job that reads a disk of data (True) and holes (False), a megabyte each, as it may.

    It keeps its own limit, which counts both; the one that is wanted reaches it `LATE`
    bytes later.
    """

    def __init__(self, disk: list[bool], limit: int = LIMIT) -> None:
        self.speed = JobSpeed(limit, 0.0)
        self.now = 0.0
        self.came: list[float] = []
        has = limit
        since = 0
        for is_data in disk:
            # Unlimited, it copies a gigabyte of data a second, and ten of holes.
            self.now += MIB / has if has else (0.001 if is_data else 0.0001)
            if is_data:
                self.came.append(self.now)
                self.speed.took(MIB, self.now)
            wanted = self.speed.look(self.now)
            since = 0 if wanted == has else since + MIB
            if since > LATE:
                has, since = wanted, 0


DISKS = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=20).map(
    lambda runs: [is_data for is_data, count in runs for _ in range(count)]
)


@given(DISKS)
def test_over_no_time_comes_more_data_than_is_allowed_and_a_burst(disk: list[bool]) -> None:
    came = Qemu(disk).came
    for first, start in enumerate(came):
        for last, end in enumerate(came[first:], start=first):
            size = (last + 1 - first) * MIB
            assert size <= LIMIT * (end - start) + 2 * BURST + 2 * LATE + 2 * MIB


@settings(max_examples=20)  # the disks are long
@given(st.integers(0, 30), st.integers(1, 10))
def test_holes_cost_next_to_nothing_however_much_data_lies_between(data: int, times: int) -> None:
    """Each stretch of 500 GiB would take more than 17 hours under the limit."""
    disk = ([False] * 2000 + [True] * data) * times
    qemu = Qemu(disk)
    holes_s = 0.0001 * disk.count(False)
    # Before the limit is lifted at first, half a second; and after data, until it is made up for.
    assert qemu.now <= 0.001 + (data * times * MIB + BURST + LATE) / LIMIT + holes_s + 0.6 * times


def test_data_alone_never_lifts_the_limit() -> None:
    qemu = Qemu([True] * 500)
    assert qemu.speed.wanted == LIMIT
    assert qemu.now >= 499 * MIB / LIMIT


def test_without_a_limit_none_is_wanted() -> None:
    speed = JobSpeed(0, 0.0)
    assert not speed.took(1 << 40, 0.001)
    assert speed.look(5.0) == 0


def test_another_limit_is_in_force_at_once_and_what_was_before_is_forgotten() -> None:
    speed = JobSpeed(LIMIT, 0.0)
    assert speed.look(1.0) == 0
    assert speed.took(100 * MIB, 1.0)
    speed.change(2 * LIMIT, 1.0)
    assert speed.look(1.0) == 2 * LIMIT
    assert speed.look(1.51) == 0
    speed.change(0, 2.0)
    assert speed.look(2.0) == 0


def test_what_a_busy_guest_has_copied_counts_for_some_seconds_only() -> None:
    """It is not limited, and nobody can tell it from what the limit is for."""
    speed = JobSpeed(LIMIT, 0.0)
    for second in range(3600):
        speed.took(10 * LIMIT, float(second))
    assert speed.look(3600.0) == LIMIT
    assert speed.look(3600.0 + 64 * MIB / LIMIT + 1) == 0
