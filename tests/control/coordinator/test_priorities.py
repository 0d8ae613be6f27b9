# SPDX-License-Identifier: Apache-2.0
"""What of the host a backup may use."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import psutil
import pytest

from tests.machine import bad, children, make_disk, next_event, started
from tests.producer.guard.serving import serving
from vmapipe.control.coordinator.priorities import add_priority_options, buffer_of_each, priorities
from vmapipe.runtime.errors import UsageError

MIB = 1 << 20
LOW = ("--nice", "7", "--ionice", "best-effort:6")


def nice_and_io(process: psutil.Process) -> tuple[int, int, int]:
    io = process.ionice()
    return process.nice(), int(io.ioclass), io.value


def test_the_processes_of_disks_at_rest_have_the_priorities_asked_for(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 32)
    core = str(min(os.sched_getaffinity(0)))
    words = (*LOW, "--cpus", core, "--speed", "1K", "--disk", f"d={disk}", tmp_path / "vm.vma")
    with started("backup", "--json", *words) as backup:
        next_event(backup, "begun")
        processes = [*children(backup, "archiver.main"), *children(backup, "producer.main")]
        assert len(processes) == 2
        for process in processes:
            assert nice_and_io(process) == (7, psutil.IOPRIO_CLASS_BE, 6)
            assert process.cpu_affinity() == [int(core)]


def test_what_a_guests_writes_may_wait_for_has_its_own_priority_whatever_is_asked_for(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 32)
    nice, *io = nice_and_io(psutil.Process())
    with (
        serving(tmp_path, d=disk) as served,
        started(
            *("backup", "--json", *LOW, "--speed", "1K"),
            *("--monitor", served.monitor, tmp_path / "vm.vma"),
        ) as backup,
    ):
        next_event(backup, "begun")
        (archiver,) = children(backup, "archiver.main")
        (producer,) = children(backup, "producer.main")
        assert nice_and_io(archiver) == (7, psutil.IOPRIO_CLASS_BE, 6)
        # It stands back a little behind the guest, and no further.
        assert nice_and_io(producer) == (max(5, nice), *io)


def test_the_memory_for_buffers_is_divided_and_never_too_little() -> None:
    assert buffer_of_each(64 * MIB, 0, 9) == 64 * MIB
    assert buffer_of_each(64 * MIB, 96 * MIB, 3) == 32 * MIB
    assert buffer_of_each(64 * MIB, 1024 * MIB, 3) == 64 * MIB
    with pytest.raises(UsageError, match="3 live disks need at least 24M"):
        buffer_of_each(64 * MIB, 23 * MIB, 3)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--nice", "20", "from -20 to 19"),
        ("--nice", "low", "from -20 to 19"),
        ("--ionice", "idle:3", "neither idle nor"),
        ("--ionice", "best-effort:8", "neither idle nor"),
        ("--ionice", "realtime:0", "neither idle nor"),
        ("--cpus", "0-", "not a valid list of cores"),
        ("--cpus", "60000", "cores that may be used here are"),
        ("--cpus", "3-1", "cores that may be used here are"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, option: str, value: str, words: str) -> None:
    assert words in bad("backup", option, value, "--disk", "x", tmp_path / "a", code=2)


def test_a_range_of_cores_is_all_of_them() -> None:
    parser = argparse.ArgumentParser()
    add_priority_options(parser)
    allowed = sorted(os.sched_getaffinity(0))
    text = ",".join(map(str, allowed))
    assert priorities(parser.parse_args(["--cpus", text])).cores == tuple(allowed)
    if allowed == list(range(allowed[0], allowed[-1] + 1)):
        text = f"{allowed[0]}-{allowed[-1]}"
        assert priorities(parser.parse_args(["--cpus", text])).cores == tuple(allowed)
