# SPDX-License-Identifier: Apache-2.0
"""Outputs with planned faults, of which each must come, and outputs whose reader is asleep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.archiver.changing import PATTERN
from tests.archiver.memory import Fault, MemoryOutput
from tests.machine import good, make_disk
from vmapipe.archiver.outputs.base import DescriptorOutput


@pytest.fixture
def memory() -> Iterator[Callable[..., MemoryOutput]]:
    """`memory(Fault(2), Fault(None))`: an output in memory that fails as planned."""
    made: list[MemoryOutput] = []

    def make(*faults: Fault) -> MemoryOutput:
        made.append(MemoryOutput(faults))
        return made[-1]

    yield make
    unfired = [fault for output in made for fault in output.unfired]
    assert unfired == [], "planned, but never happened"


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when an output begins to wait for its reader."""
    event = threading.Event()
    wait_writable = DescriptorOutput._wait_writable

    def wait(output: DescriptorOutput) -> None:
        event.set()
        wait_writable(output)

    monkeypatch.setattr(DescriptorOutput, "_wait_writable", wait)
    return event


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", PATTERN, tail_bytes=5000)


@pytest.fixture
def base(disk: Path, tmp_path: Path) -> Path:
    good("backup", "--disk", f"a={disk}", tmp_path / "vm-2026-01-01.vma")
    return tmp_path / "vm-2026-01-01.vma"
