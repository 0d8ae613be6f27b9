# SPDX-License-Identifier: Apache-2.0
"""Tells what a producer has done, and where data of a guest waits: events `transfer`, `buffer`."""

from __future__ import annotations

import time
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.producer.runs import Run, largest_frame_bytes, piece_bytes, runs
from vmapipe.producer.session import RefusedByArchiver, Session
from vmapipe.producer.shared_memory import Ring
from vmapipe.producer.source import Source
from vmapipe.protocol.errors import ProtocolError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.rate_limit import RateLimiter

# At most so often.
REPORT_S = 0.25


class BufferUse(NamedTuple):
    """Bytes in memory and in the spool file, and writes of the guest that wait."""

    memory_bytes: int
    spool_bytes: int
    writes: int


class Transfer(NamedTuple):
    """Of one device so far.

    `read_bytes` by the producer itself, `saved_clusters` before a guest's writes.
    """

    read_bytes: int
    sent_bytes: int
    saved_clusters: int


class ProgressReporter:
    """Of one device. What has not changed is not told again."""

    def __init__(self, device: str, emit: Emit) -> None:
        self._device = device
        self._emit = emit
        self._told = BufferUse(0, 0, 0)
        self._tell_at = 0.0
        self._told_transfer = Transfer(0, 0, 0)
        self._tell_transfer_at = 0.0

    def tell(self, state: BufferUse) -> None:
        now = time.monotonic()
        if state == self._told or now < self._tell_at:
            return
        self._told, self._tell_at = state, now + REPORT_S
        self._emit(
            {
                "event": "buffer",
                "device": self._device,
                "memory_bytes": state.memory_bytes,
                "spool_bytes": state.spool_bytes,
                "waiting_writes": state.writes,
            }
        )

    def tell_transfer(self, done: Transfer, *, last: bool = False) -> None:
        """`last`: at once, whenever it was told before."""
        now = time.monotonic()
        if done == self._told_transfer or (now < self._tell_transfer_at and not last):
            return
        self._told_transfer, self._tell_transfer_at = done, now + REPORT_S
        self._emit(
            {
                "event": "transfer",
                "device": self._device,
                "read_bytes": done.read_bytes,
                "sent_bytes": done.sent_bytes,
                "saved_bytes": done.saved_clusters * CLUSTER_BYTES,
            }
        )


# Whatever comes ends a wait; so does the next heartbeat.
_WAIT_S = 1.0
# A change of the speed limit is followed within this.
_LONGEST_PAUSE_S = 0.25
# Well below any heartbeat, and far above the time of a read.
_QUIET_S = 0.25


class Sender:
    """One disk, from HELLO to DONE."""

    def __init__(
        self,
        source: Source,
        link: ArchiverConnection,
        job: bytes,
        limiter: RateLimiter,
        cancel: Cancel,
    ) -> None:
        self._source = source
        self._cancel = cancel
        self._ring = Ring()
        self._session = Session(source.name, source.size_bytes, link, job, self._ring, cancel)
        self._limiter = limiter
        self._read_bytes = 0

    @property
    def zero_clusters(self) -> int:
        return self._session.zero_clusters

    def run(self, emit: Emit) -> None:
        """Send the whole disk. Raises Failure, and tells the archiver why."""
        try:
            self._session.greet()
            teller = ProgressReporter(self._source.name, emit)
            frame_bytes = self._session.frame_bytes
            for run in runs(
                *(self._source, self._ring.view, self._take, frame_bytes),
                *(self._next_piece_bytes, self._reading),
            ):
                self._send(run)
                teller.tell_transfer(self._transfer)
            teller.tell_transfer(self._transfer, last=True)
            self._source.check_unchanged()
            self._session.end()
        except RefusedByArchiver:
            raise
        except (Failure, ProtocolError) as failure:
            self._session.fail(str(failure))
            raise
        finally:
            self._ring.close()

    def _send(self, run: Run) -> None:
        session = self._session
        if session.credit < run.charge:
            session.wait_until(lambda: session.credit >= run.charge)
        session.send(run)
        if run.length:
            self._ring.hold(session.sent_frames, run.position, run.length)
        session.hear()
        self._cancel.check()

    def _take(self, length: int) -> int:
        """Room in the ring; waits until the archiver has written enough."""
        while (position := self._ring.take(length)) is None:
            self._session.step(_WAIT_S)
        return position

    def _next_piece_bytes(self) -> int:
        """Waits for the speed limit; a piece is as large as the limit is then, and not before."""
        while (pause := self._limiter.wait_s(time.monotonic())) > 0:
            self._session.step(min(pause, _LONGEST_PAUSE_S))
        if time.monotonic() - self._session.spoke > _QUIET_S:
            # Zeroes may be read for minutes before there is anything to send.
            self._session.step(0)
        piece = piece_bytes(
            largest_frame_bytes(self._session.frame_bytes, self._limiter.bytes_per_s)
        )
        self._ring.fit(piece)
        return piece

    def _reading(self, length: int) -> None:
        # Holes are not counted: nobody reads them.
        self._limiter.took(length, time.monotonic())
        self._read_bytes += length

    @property
    def _transfer(self) -> Transfer:
        return Transfer(self._read_bytes, self._session.sent_bytes, 0)
