# SPDX-License-Identifier: Apache-2.0
"""The one loop that sends a device to the archiver, and reports how far it is.

A Feed is where the frames come from: a disk at rest, an NBD export, a disk that a guard serves,
what QEMU's backup job writes, a machine's memory. `transmit` asks it to advance, keeps the session alive
meanwhile, and tells both sides when something fails.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.session import RefusedByArchiver, Session
from vmapipe.protocol.errors import ProtocolError
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit

# At most so often is reported; no wait is longer, so that changes are seen in time.
REPORT_S = 0.25


class Buffered(NamedTuple):
    """Bytes that wait in memory and in the spool file, and writes of the guest that wait."""

    memory_bytes: int
    spool_bytes: int
    writes: int


NOT_BUFFERED = Buffered(0, 0, 0)


class Transfer(NamedTuple):
    """Progress of one device: `read_bytes` by the producer, `saved_clusters` before guests' writes."""

    read_bytes: int
    sent_bytes: int
    saved_clusters: int


NOTHING_TRANSFERRED = Transfer(0, 0, 0)


class Feed(Protocol):
    """The source of one device's frames. Every method may raise Failure.

    `begin` comes first, then `advance` until `ended`, then `finish`; in the end `leave`.
    """

    @property
    def name(self) -> str: ...

    @property
    def ended(self) -> bool:
        """True when all is sent."""

    @property
    def pause_s(self) -> float:
        """The longest wait after `advance` had nothing to do, in seconds."""

    @property
    def buffered(self) -> Buffered: ...

    @property
    def transfer(self) -> Transfer: ...

    def begin(self, emit: Emit) -> None:
        """Start what delivers the data: the archiver has accepted the device."""

    def advance(self) -> bool:
        """Send a frame, or do a step towards the next one; False: nothing can be done now."""

    def check(self) -> None:
        """Look at what else may have happened. Called after each step and each wait."""

    def finish(self) -> None:
        """Return when it is sure that what was sent is complete."""

    def fail(self, reason: str) -> None:
        """Drop all data from now on, so that nothing waits for the archiver. Raises nothing."""

    def leave(self) -> None:
        """Return when nothing needs this process any more: all is stored, or has failed."""


def transmit(feed: Feed, session: Session, emit: Emit) -> None:
    """Send all of `feed`, from HELLO to DONE. Raises Failure, and tells the archiver why."""
    try:
        session.greet()
        feed.begin(emit)
        reporter = ProgressReporter(feed.name, emit)
        while not feed.ended:
            if feed.advance():
                session.poll()
            elif not feed.ended:
                session.step(min(feed.pause_s, REPORT_S))
            feed.check()
            if time.monotonic() >= reporter.due:
                reporter.report(feed)
        reporter.report(feed, last=True)
        feed.finish()
        # Before END is on its way: who hears that all is stored has heard this before.
        emit({"event": "ending", "device": feed.name})
        session.end()
    except (Failure, ProtocolError) as failure:
        feed.fail(str(failure))
        if not isinstance(failure, RefusedByArchiver):
            session.fail(str(failure))
        feed.leave()
        raise
    feed.leave()


class ProgressReporter:
    """Reports one device's progress as events `transfer` and `buffer`; unchanged values are not repeated."""

    def __init__(self, device: str, emit: Emit) -> None:
        self._device = device
        self._emit = emit
        self._buffered = NOT_BUFFERED
        self._transfer = NOTHING_TRANSFERRED
        #: When `report` is to be called again.
        self.due = 0.0

    def report(self, feed: Feed, *, last: bool = False) -> None:
        """`last`: how much was transferred is reported at once, whatever was reported before."""
        self.due = time.monotonic() + REPORT_S
        if feed.buffered != self._buffered and not last:
            self._buffered = feed.buffered
            self._report_buffered(self._buffered)
        if feed.transfer != self._transfer:
            self._transfer = feed.transfer
            self._report_transfer(self._transfer)

    def _report_buffered(self, buffered: Buffered) -> None:
        self._emit(
            {
                "event": "buffer",
                "device": self._device,
                "memory_bytes": buffered.memory_bytes,
                "spool_bytes": buffered.spool_bytes,
                "waiting_writes": buffered.writes,
            }
        )

    def _report_transfer(self, done: Transfer) -> None:
        self._emit(
            {
                "event": "transfer",
                "device": self._device,
                "read_bytes": done.read_bytes,
                "sent_bytes": done.sent_bytes,
                "saved_bytes": done.saved_clusters * CLUSTER_BYTES,
            }
        )
