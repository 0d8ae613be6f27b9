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
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure


class Sender:
    """One disk, from HELLO to DONE."""

    def __init__(self, source: Source, link: Link, job: bytes, pace: Pace, cancel: Cancel) -> None:
        self._source = source
        self._cancel = cancel
        self._ring = Ring()
        self._session = Session(source.name, source.size_bytes, link, job, self._ring, cancel)
        self._pace = pace

    @property
    def zero_clusters(self) -> int:
        return self._session.zero_clusters

    def run(self) -> None:
        """Send the whole disk. Raises Failure, and tells the archiver why."""
        try:
            self._session.greet()
            frame_bytes = self._pace.frame_bytes(self._session.frame_bytes)
            self._ring.fit(piece_bytes(frame_bytes))
            for run in runs(self._source, self._ring.view, self._take, frame_bytes):
                self._send(run)
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
        while (pause := self._pace.wait_s(time.monotonic())) > 0:
            session.step(pause)
        session.send(run)
        self._pace.took(run.clusters * CLUSTER_BYTES, session.spoke)
        if run.length:
            self._ring.hold(session.sent_frames, run.position, run.length)
        session.hear()
        self._cancel.check()

    def _take(self, length: int) -> int:
        """Room in the ring; waits until the archiver has written enough of it."""
        self._session.wait_until(lambda: self._ring.take(length) is not None)
        position = self._ring.take(length)
        if position is None:
            raise RuntimeError("room in the ring has vanished")
        return position
