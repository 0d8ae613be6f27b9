# SPDX-License-Identifier: Apache-2.0
"""Outputs with planned faults; one that never fired fails the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vmapipe.archiver.outputs.memory import Fault, MemoryOutput


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
