# SPDX-License-Identifier: Apache-2.0
"""The speed limit of whole backups, by the clock on the wall."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.machine import good, make_disk

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
    events = backup(tmp_path, "8M", a=64, b=192)
    # 16 MiB; a piece of each disk (256 and 512 KiB) is not waited for.
    assert sending_s(events) > 0.95 * (16 - 0.75) / 8
    done = events[-1]
    assert done["read_bytes"] == 16 * MIB
    assert done["speed_bytes_s"] == 8 * MIB


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
