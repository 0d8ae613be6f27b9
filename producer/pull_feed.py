# SPDX-License-Identifier: Apache-2.0
"""The feed of a disk that an NBD export holds: read ahead, sent in the order of the disk."""

from __future__ import annotations

import time

from vmapipe.producer.outbox import Outbox
from vmapipe.producer.pull_reader import PullReader
from vmapipe.producer.runs import largest_frame_bytes
from vmapipe.producer.session import Session
from vmapipe.producer.shared_memory import Ring
from vmapipe.producer.transmit import NOT_BUFFERED, REPORT_S, Transfer
from vmapipe.runtime.events import Emit, ignore
from vmapipe.runtime.rate_limit import RateLimiter

# Data comes every few hundred microseconds, and is waited for here: the session, which waits
# for it, too, costs more. The archiver is heard in between.
_WAIT_S = 0.02


class PullFeed:
    """An export's disk, at the speed that `limiter` allows."""

    buffered = NOT_BUFFERED

    def __init__(
        self, reader: PullReader, ring: Ring, session: Session, limiter: RateLimiter
    ) -> None:
        self.name = reader.name
        self.ended = False
        self.pause_s = REPORT_S
        self._reader = reader
        self._ring = ring
        self._session = session
        self._limiter = limiter
        self._emit: Emit = ignore
        self._outbox = Outbox(session, ring.view)

    def begin(self, emit: Emit) -> None:
        self._emit = emit
        is_incremental = self._can_be_incremental()
        self._reader.begin(self._ring, self._session.frame_bytes, is_incremental=is_incremental)
        self._session.watch(self._reader.fd)

    def _can_be_incremental(self) -> bool:
        """Whether what the export's bitmap says is enough; if not, and there is one, report why."""
        if not self._reader.bitmap:
            return False
        why_full = self._reader.why_full
        if not self._session.has_base:
            why_full = "the archiver has no base of it"
        if why_full:
            self._emit(
                {"event": "notice", "text": f"disk {self.name!r}: all of it is read: {why_full}"}
            )
        return not why_full

    def advance(self) -> bool:
        self.pause_s = REPORT_S
        asked = self._read_ahead()
        if not self._outbox.waiting and (pulled := self._reader.next_run()) is not None:
            run = pulled.run
            if pulled.is_unchanged:
                self._outbox.put_unchanged(run.first_cluster, run.clusters)
            else:
                self._outbox.put(run, pulled.free)
        sent = self._outbox.advance()
        if not sent and not self._outbox.waiting and self._reader.has_all:
            self.ended = self._reader.prove()
        # Whoever waits for credit, or for digests of the base, waits with the session.
        waits = not (asked or sent) and not self._outbox.waiting and self.pause_s >= REPORT_S
        came = self._pump() if waits else self._reader.pump(0)
        return asked or sent or came

    def _pump(self) -> bool:
        """Wait until the next run is complete, or more can be asked, but not long; whether anything came."""
        reader = self._reader
        until = time.monotonic() + _WAIT_S
        left_s, came = _WAIT_S, False
        while left_s > 0 and not (reader.has_run or reader.knows_more) and reader.pump(left_s):
            came = True
            left_s = until - time.monotonic()
        return came

    def _read_ahead(self) -> bool:
        """Ask for the next piece, unless the speed limit forbids it now."""
        now = time.monotonic()
        pause_s = self._limiter.wait_s(now)
        if pause_s > 0:
            self.pause_s = min(self.pause_s, pause_s)
            return False
        # A piece is as large as the limit is now, and not before.
        frame_bytes = largest_frame_bytes(self._session.frame_bytes, self._limiter.bytes_per_s)
        asked_bytes = self._reader.plan_ahead(frame_bytes)
        if asked_bytes is None:
            return False
        # Holes are not counted: nothing is read there.
        self._limiter.took(asked_bytes, now)
        return True

    @property
    def transfer(self) -> Transfer:
        return Transfer(self._reader.read_bytes, self._session.sent_bytes, 0)

    def check(self) -> None:
        while self._reader.notices:
            self._emit({"event": "notice", "text": self._reader.notices.pop(0)})

    def finish(self) -> None:
        """Leave the export: until the archive is stored, nobody would look what it says."""
        self._session.unwatch(self._reader.fd)
        self._reader.close()

    def fail(self, reason: str) -> None: ...

    def leave(self) -> None: ...
