# SPDX-License-Identifier: Apache-2.0
"""Runs of a disk at rest on their way to the session: sent as credit comes, and of what has a base only what has changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vmapipe.producer.runs import Run
from vmapipe.producer.session import Session
from vmapipe.producer.since_base import UnchangedClusters
from vmapipe.protocol import limits

OnAck = Callable[[], None] | None


class UnsentMessage(NamedTuple):
    """One message that is not sent yet, and what it takes from the credit."""

    part: Run | UnchangedClusters
    charge: int
    on_ack: OnAck


class Outbox:
    """Give it runs with `put`; `advance` sends. The data of runs lies in `memory`."""

    def __init__(self, session: Session, memory: memoryview) -> None:
        self._session = session
        self._memory = memory
        #: In the order in which it was put.
        self.waiting: deque[UnsentMessage] = deque()
        # How many of these, from the first on, are compared with the base, or have none.
        self._ready = 0

    def put(self, run: Run, on_ack: OnAck = None) -> None:
        """`on_ack` is called when the memory of the run is free."""
        self.waiting.append(UnsentMessage(run, limits.charge(run.clusters, run.length), on_ack))
        if not self._session.compares:
            self._ready += 1

    def put_unchanged(self, first_cluster: int, clusters: int) -> None:
        """Clusters that the source itself knows to be as in the base, behind all runs so far."""
        self.waiting.append(_unchanged(UnchangedClusters(first_cluster, clusters)))
        if not self._session.compares:
            self._ready += 1

    def advance(self) -> bool:
        """Send one message; False: nothing is to be sent, or credit or digests have to come first."""
        if not self._ready and not (self.waiting and self._compare()):
            return False
        part, charge, on_ack = self.waiting[0]
        if self._session.credit < charge:
            return False
        self.waiting.popleft()
        self._ready -= 1
        if isinstance(part, Run):
            self._session.send(part, on_ack)
        else:
            self._session.send_unchanged(part.first_cluster, part.clusters)
        return True

    def _compare(self) -> bool:
        """Make the next run ready, in parts; False: digests have to come first."""
        run, _, on_ack = self.waiting[0]
        parts: list[Run | UnchangedClusters] | None = [run]
        if isinstance(run, Run):
            parts = self._session.since_base(run, self._memory)
        if parts is None:
            return False
        self.waiting.popleft()
        if on_ack is not None:
            with_data = sum(isinstance(part, Run) and part.length > 0 for part in parts)
            if with_data:
                on_ack = after(with_data, on_ack)
            else:
                on_ack()
        for part in reversed(parts):
            if isinstance(part, Run):
                cost = limits.charge(part.clusters, part.length)
                self.waiting.appendleft(UnsentMessage(part, cost, on_ack if part.length else None))
            else:
                self.waiting.appendleft(_unchanged(part))
        self._ready = len(parts)
        return True


def _unchanged(part: UnchangedClusters) -> UnsentMessage:
    return UnsentMessage(part, limits.charge(0, 0), None)


def after(times: int, call: Callable[[], None]) -> Callable[[], None]:
    """Return what makes the call when it was called itself so many times."""
    left = times

    def one_less() -> None:
        nonlocal left
        left -= 1
        if not left:
            call()

    return one_less
