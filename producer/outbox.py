# SPDX-License-Identifier: Apache-2.0
"""Runs of a disk at rest on their way to the session: sent as credit comes, and of what has a base only what has changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from vmapipe.producer.runs import Run
from vmapipe.producer.session import Session
from vmapipe.producer.since_base import UnchangedClusters
from vmapipe.protocol import limits

OnAck = Callable[[], None] | None


class Outbox:
    """Give it runs with `put`; `advance` sends. The data of runs lies in `memory`."""

    def __init__(self, session: Session, memory: memoryview) -> None:
        self._session = session
        self._memory = memory
        self._runs: deque[tuple[Run | UnchangedClusters, OnAck]] = deque()
        self._parts: deque[tuple[Run | UnchangedClusters, OnAck]] = deque()

    def put(self, run: Run, on_ack: OnAck = None) -> None:
        """`on_ack` is called when the memory of the run is free."""
        self._runs.append((run, on_ack))

    def put_unchanged(self, first_cluster: int, clusters: int) -> None:
        """Clusters that the source itself knows to be as in the base, behind all runs so far."""
        self._runs.append((UnchangedClusters(first_cluster, clusters), None))

    @property
    def is_empty(self) -> bool:
        return not self._runs and not self._parts

    def advance(self) -> bool:
        """Send one message; False: nothing is to be sent, or credit or digests have to come first."""
        if not self._parts and not (self._runs and self._split()):
            return False
        if not self._parts:
            return True
        part, on_ack = self._parts[0]
        clusters, length = (part.clusters, part.length) if isinstance(part, Run) else (0, 0)
        if self._session.credit < limits.charge(clusters, length):
            return False
        self._parts.popleft()
        if isinstance(part, Run):
            self._session.send(part, on_ack)
        else:
            self._session.send_unchanged(part.first_cluster, part.clusters)
        return True

    def _split(self) -> bool:
        """Make the next run ready; False: digests have to come first."""
        run, on_ack = self._runs[0]
        parts: list[Run | UnchangedClusters] | None = [run]
        if isinstance(run, Run):
            parts = self._session.since_base(run, self._memory)
        if parts is None:
            return False
        self._runs.popleft()
        with_data = sum(isinstance(part, Run) and part.length > 0 for part in parts)
        if on_ack is not None and not with_data:
            on_ack()
        part_done = after(with_data, on_ack) if on_ack is not None and with_data else None
        for part in parts:
            has_data = isinstance(part, Run) and part.length > 0
            self._parts.append((part, part_done if has_data else None))
        return True


def after(times: int, call: Callable[[], None]) -> Callable[[], None]:
    """Return what makes the call when it was called itself so many times."""
    left = times

    def one_less() -> None:
        nonlocal left
        left -= 1
        if not left:
            call()

    return one_less
