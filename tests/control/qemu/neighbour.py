# SPDX-License-Identifier: Apache-2.0
"""Another program that uses the same monitor, and how long it had to wait for each answer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from tests.machine import LIMIT_S
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone, QmpPeer, QmpRefused


class Neighbour(threading.Thread):
    """Connects for a moment again and again and asks, as Proxmox VE's services do."""

    def __init__(self, qmp: Path, pause_s: float) -> None:
        super().__init__(daemon=True)
        self._qmp = str(qmp)
        self._pause_s = pause_s
        self._is_over = threading.Event()
        #: How long each visit took; infinite: it was not answered.
        self.took_s: list[float] = []

    def ask(self, client: QmpClient) -> None:
        """What it asks at each visit."""
        client.execute(Command("query-jobs", {}))

    def run(self) -> None:
        peer = QmpPeer()
        peer.greeting_s = peer.answer_s = LIMIT_S
        while not self._is_over.wait(self._pause_s):
            asked_at = time.monotonic()
            try:
                with contextlib.closing(QmpClient(self._qmp, peer)) as client:
                    self.ask(client)
                self.took_s.append(time.monotonic() - asked_at)
            except (QmpGone, QmpRefused):
                self.took_s.append(float("inf"))

    def finish(self) -> None:
        self._is_over.set()
        self.join(LIMIT_S)


Asking = TypeVar("Asking", bound=Neighbour)


@contextlib.contextmanager
def visiting(asking: Asking) -> Iterator[Asking]:
    """It asks until the block ends."""
    asking.start()
    try:
        yield asking
    finally:
        asking.finish()
