# SPDX-License-Identifier: Apache-2.0
"""Outputs with planned faults, of which each must come, and outputs whose reader is asleep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.archiver.memory import Fault, MemoryOutput
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
