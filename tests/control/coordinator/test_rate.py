# SPDX-License-Identifier: Apache-2.0
"""The speed limit of whole backups, by the clock on the wall."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.machine import good, make_disk, started

MIB = 1 << 20


def backup(tmp_path: Path, speed: str, **clusters: int) -> list[dict[str, Any]]:
    words = []
    for name, count in clusters.items():
        words += ["--disk", f"{name}={make_disk(tmp_path / name, 'A' * count)}"]
    out = good("backup", "--json", "--speed", speed, *words, tmp_path / "vm.vma")
    return [json.loads(line) for line in out.splitlines()]


def sending_s(events: list[dict[str, Any]]) -> float:
    """From the first piece, which is not waited for, to the last."""
    begun = next(event["time"] for event in events if event["event"] == "begun")
    stored = next(event["time"] for event in events if event["event"] == "stored")
    return float(stored - begun)


def test_two_disks_are_never_quicker_than_the_limit_and_the_report_says_what_was_done(
    tmp_path: Path,
) -> None:
    done = backup(tmp_path, "5M", a=64, b=192)[-1]
    # 16 MiB; a piece of each disk (an eighth of a second's) is not waited for, and as much is made up
    # for. From the first process's start on: when a busy machine tells that a backup has begun, some
    # of it may have been read.
    assert done["seconds"] >= 16 / 5 - 3 / 8
    assert done["read_bytes"] == 16 * MIB
    assert done["speed_bytes_s"] == 5 * MIB


@pytest.mark.slow
def test_64_mib_at_8_mib_a_second_take_8_seconds_within_5_per_cent(tmp_path: Path) -> None:
    """On a machine that has nothing else to do."""
    started = time.monotonic()
    events = backup(tmp_path, "8M", a=1024)
    assert sending_s(events) == pytest.approx(8, rel=0.05)
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_small_disk_leaves_its_share_to_a_large_one(tmp_path: Path) -> None:
    """On a machine that has nothing else to do. Without it: 15 MiB at 1 MiB/s."""
    events = backup(tmp_path, "2M", a=16, b=240)
    assert sending_s(events) == pytest.approx(8, rel=0.08)


def worst_deviation(read: list[tuple[float, int]], limit: float) -> float:
    """Over all stretches of ten seconds, and a little more: |bytes read / bytes allowed - 1|."""
    worst = 0.0
    for index, (start, before) in enumerate(read):
        end = next(((at, bytes_) for at, bytes_ in read[index:] if at >= start + 10), None)
        if end is not None:
            worst = max(worst, abs((end[1] - before) / (limit * (end[0] - start)) - 1))
    return worst


def read_at(events: list[dict[str, Any]], disks: int) -> list[tuple[float, int]]:
    """When how much had been read of all disks together, as they tell it while all are read."""
    latest: dict[str, int] = {}
    told = []
    for event in events:
        if event["event"] == "transfer":
            latest[event["device"]] = event["read_bytes"]
            if len(latest) == disks:
                told.append((event["time"], sum(latest.values())))
    return told


@pytest.mark.soak
def test_the_limit_holds_within_5_per_cent_over_any_10_seconds(tmp_path: Path) -> None:
    """On a machine that has nothing else to do. Twenty seconds at 8 MiB/s, then at 1 MiB/s."""
    fast, slow = 8 * MIB, 1 * MIB
    words = []
    for name in "ab":
        words += ["--disk", f"{name}={make_disk(tmp_path / name, 'A' * 1600)}"]
    command = ["backup", "--json", "--speed", str(fast), *words, str(tmp_path / "vm.vma")]
    events: list[dict[str, Any]] = []
    with started(*command) as process:
        assert process.stdout is not None
        changed_at = 0.0
        for line in process.stdout:
            events.append(json.loads(line))
            told = read_at(events, 2)
            if told and not changed_at and told[-1][0] - told[0][0] > 20:
                good("speed", str(slow))
            if events[-1]["event"] == "speed":
                changed_at = events[-1]["time"]
            if changed_at and told[-1][0] - changed_at > 20:
                break
    told = read_at(events, 2)
    before = [one for one in told if one[0] <= changed_at]
    after = [one for one in told if one[0] > changed_at + 0.5]
    found = worst_deviation(before, fast), worst_deviation(after, slow)
    print(f"worst over any 10 s: {found[0]:.2%} at 8 MiB/s, {found[1]:.2%} at 1 MiB/s")
    assert len(before) > 20
    assert len(after) > 20
    assert max(found) < 0.05
