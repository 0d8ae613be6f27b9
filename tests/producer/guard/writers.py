# SPDX-License-Identifier: Apache-2.0
"""Guests that write to a served disk while something else happens."""

from __future__ import annotations

import random
import threading
from pathlib import Path

from tests.machine import LIMIT_S
from tests.producer.guard.serving import Served
from tests.protocol.nbd.client import Client


class Writers:
    """Threads that write at random until the `with` ends; none may ever see an error."""

    def __init__(
        self, served: Served, name: str, threads: int = 2, seed: int = 1, pause_s: float = 0.0
    ) -> None:
        """`pause_s` after each write: all that is written to is saved, whatever a backup's --speed."""
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(served.socket(name), name, seed + index))
            for index in range(threads)
        ]
        self._each = threading.Barrier(threads + 1)
        self.faults: list[BaseException] = []
        self.writes = 0

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        self._each.wait(LIMIT_S)  # all have written at least once
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
        assert not self.faults, f"a guest saw {self.faults}"

    def _write(self, path: Path, name: str, seed: int) -> None:
        chance = random.Random(seed)
        waited = False
        try:
            with Client(path, name) as client:
                size = client.session.export.size_bytes
                while not self._stop.is_set():
                    length = chance.choice((512, 4096, 70_001))
                    offset = chance.randrange(size - length)
                    client.write(offset, chance.randbytes(length))
                    if chance.random() < 0.2:
                        client.read(offset, length)
                    self.writes += 1
                    if not waited:
                        self._each.wait(LIMIT_S)
                        waited = True
                    self._stop.wait(self._pause_s)
        except BaseException as error:  # noqa: BLE001  reported by the test
            self.faults.append(error)
            self._each.abort()
