# SPDX-License-Identifier: Apache-2.0
"""A guest's writer: what it writes, and in which order, follows from its seed.

So a copy of the disks can be held against it: there must be one number n such
that the copy has the first n writes, on all disks, and nothing of the others.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.machine import LIMIT_S
from tests.protocol.nbd.client import Client

CLUSTER = 65536
_BYTES = 4096


class Write(NamedTuple):
    disk: str
    offset: int
    data: bytes


class Hammer:
    """Writes from `with` on to its end, one after the other, on the clusters of its `lane`."""

    def __init__(
        self,
        path: Path,
        sizes: Mapping[str, int],
        lane: int = 0,
        lanes: int = 1,
        pause_s: float = 0,
        seed: int = 0,
    ) -> None:
        self.done = 0
        self.longest_s = 0.0
        self.error: Exception | None = None
        self._path, self._sizes, self._lane, self._lanes = path, dict(sizes), lane, lanes
        self._pause = threading.Event()
        self._pause_s = pause_s
        self._seed = seed
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def writes(self) -> Iterator[Write]:
        chance = random.Random(self._seed * 64 + self._lane)
        names = sorted(self._sizes)
        number = 0
        while True:
            number += 1
            disk = names[number % len(names)]
            clusters = self._sizes[disk] // CLUSTER
            cluster = chance.randrange(clusters // self._lanes) * self._lanes + self._lane
            offset = cluster * CLUSTER + chance.randrange(CLUSTER // _BYTES) * _BYTES
            yield Write(disk, offset, number.to_bytes(8, "big") + chance.randbytes(_BYTES - 8))

    def wait_for(self, more: int) -> None:
        """Until so many more writes have been acknowledged, or one has failed."""
        with self._changed:
            wanted = self.done + more
            reached = self._changed.wait_for(lambda: self.done >= wanted or self.error, LIMIT_S)
        assert reached
        assert self.error is None, self.error

    def replay(self, copies: Mapping[str, bytes], before: Mapping[str, bytearray]) -> int:
        """Make those writes on `before` that the copies have; returns how many those are."""
        count = 0
        pending: list[Write] = []
        for number, write in enumerate(self.writes(), start=1):
            if number > self.done + 1:
                break
            pending.append(write)
            if copies[write.disk][write.offset : write.offset + _BYTES] == write.data:
                count = number
        for write in pending[:count]:
            before[write.disk][write.offset : write.offset + _BYTES] = write.data
        return count

    def replay_all(self, before: Mapping[str, bytearray]) -> None:
        """Make all its writes on `before`, when it has ended."""
        for _, write in zip(range(self.done), self.writes(), strict=False):
            before[write.disk][write.offset : write.offset + _BYTES] = write.data

    def __enter__(self) -> Hammer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pause.set()
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        clients: dict[str, Client] = {}
        try:
            for name in self._sizes:
                clients[name] = Client(self._path, name)
            for write in self.writes():
                started = time.monotonic()
                clients[write.disk].write(write.offset, write.data)
                took = time.monotonic() - started
                with self._changed:
                    self.done += 1
                    self.longest_s = max(self.longest_s, took)
                    self._changed.notify_all()
                if self._pause.wait(self._pause_s):
                    break
        except Exception as error:  # noqa: BLE001  whatever it is, the test has to see it
            with self._changed:
                self.error = error
                self._changed.notify_all()
        finally:
            for client in clients.values():
                try:
                    client.__exit__()
                except OSError:
                    pass
