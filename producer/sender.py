# SPDX-License-Identifier: Apache-2.0
"""Sends one disk at rest: reads, waits for credit, sends, ends."""

from __future__ import annotations

import time

from vmapipe.producer.link import Link
from vmapipe.producer.pace import Pace
from vmapipe.producer.ring import Ring
from vmapipe.producer.runs import Run, piece_bytes, runs
from vmapipe.producer.session import Refused, Session
from vmapipe.producer.source import Source
from vmapipe.producer.telling import Teller, Transfer
from vmapipe.protocol.errors import ProtocolError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit

# Whatever comes ends a wait; so does the next heartbeat.
_WAIT_S = 1.0
# Well below any heartbeat, and far above the time of a read.
_QUIET_S = 0.25


class Sender:
    """One disk, from HELLO to DONE."""

    def __init__(self, source: Source, link: Link, job: bytes, pace: Pace, cancel: Cancel) -> None:
        self._source = source
        self._cancel = cancel
        self._ring = Ring()
        self._session = Session(source.name, source.size_bytes, link, job, self._ring, cancel)
        self._pace = pace
        self._read_bytes = 0

    @property
    def zero_clusters(self) -> int:
        return self._session.zero_clusters

    def run(self, emit: Emit) -> None:
        """Send the whole disk. Raises Failure, and tells the archiver why."""
        try:
            self._session.greet()
            teller = Teller(self._source.name, emit)
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
        except Refused:
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
        while (pause := self._pace.wait_s(time.monotonic())) > 0:
            self._session.step(pause)
        if time.monotonic() - self._session.spoke > _QUIET_S:
            # Zeroes may be read for minutes before there is anything to send.
            self._session.step(0)
        piece = piece_bytes(self._pace.frame_bytes(self._session.frame_bytes))
        self._ring.fit(piece)
        return piece

    def _reading(self, length: int) -> None:
        # Holes are not counted: nobody reads them.
        self._pace.took(length, time.monotonic())
        self._read_bytes += length

    @property
    def _transfer(self) -> Transfer:
        return Transfer(self._read_bytes, self._session.sent_bytes, 0)
