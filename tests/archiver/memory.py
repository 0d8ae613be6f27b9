# SPDX-License-Identifier: Apache-2.0
"""An archive in memory, with faults that come when they were planned.

For tests, and for whoever embeds us and wants the bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from vmapipe.archiver.outputs.base import Buffers, OutputFailure


class Fault:
    """At write number `write` (the first is 1), or at the commit (None), fail or stand still.

    `stalls`: instead of failing, wait until `release` or until the output is
    abandoned. `fired` is set when the moment has come.
    """

    def __init__(
        self, write: int | None, text: str = "a planned fault", *, stalls: bool = False
    ) -> None:
        self.write = write
        self.text = text
        self.stalls = stalls
        self.fired = threading.Event()
        self._go = threading.Event()

    def release(self) -> None:
        self._go.set()

    def happen(self) -> None:
        self.fired.set()
        if not self.stalls:
            raise OutputFailure(self.text, target="memory")
        self._go.wait()

    def __repr__(self) -> str:
        place = "the commit" if self.write is None else f"write {self.write}"
        return f"{'stall' if self.stalls else 'failure'} at {place}"


class MemoryOutput:
    """Keeps what it gets in `data`; `pieces` has the length of each write, in bytes."""

    def __init__(self, faults: Iterable[Fault] = (), *, is_stream: bool = False) -> None:
        self.description = "memory"
        self.is_stream = is_stream
        self.data = bytearray()
        self.pieces: list[int] = []
        self.committed = False
        self.abandoned = False
        self._faults = list(faults)

    @property
    def written_bytes(self) -> int:
        return len(self.data)

    @property
    def unfired(self) -> list[Fault]:
        """Planned faults that never happened: the test has not tested what it says."""
        return [fault for fault in self._faults if not fault.fired.is_set()]

    def write(self, buffers: Buffers) -> None:
        self._check()
        self._happen(len(self.pieces) + 1)
        before = len(self.data)
        for buffer in buffers:
            self.data += buffer
        self.pieces.append(len(self.data) - before)

    def commit(self) -> None:
        self._check()
        self._happen(None)
        self.committed = True

    def abandon(self) -> None:
        if self.committed:
            return
        self.abandoned = True
        self.data.clear()
        for fault in self._faults:
            fault.release()

    def _check(self) -> None:
        if self.abandoned or self.committed:
            raise OutputFailure("memory takes no more: it is complete or given up")

    def _happen(self, write: int | None) -> None:
        for fault in self._faults:
            if fault.write == write and not fault.fired.is_set():
                fault.happen()
                self._check()
