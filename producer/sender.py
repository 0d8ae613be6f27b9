# SPDX-License-Identifier: Apache-2.0
"""Sends one disk at rest: reads, waits for credit, sends, hears answers, ends."""

from __future__ import annotations

import time
from collections.abc import Callable

from vmapipe.producer.link import Link
from vmapipe.producer.pace import Pace
from vmapipe.producer.ring import Ring
from vmapipe.producer.runs import Run, piece_bytes, runs
from vmapipe.producer.source import Source
from vmapipe.protocol import limits
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.frames import Part
from vmapipe.protocol.messages import Abort, Done, Refuse
from vmapipe.protocol.producer_side import ProducerSide, State
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

# Beyond what a loaded machine may oversleep: then we were stopped (Ctrl-Z).
_STOPPED_S = 5.0


class Refused(Failure):
    """The archiver said no, or the job failed elsewhere."""


class Sender:
    """One session with the archiver, from HELLO to DONE."""

    def __init__(
        self, source: Source, link: Link, job: bytes, speed_bytes_s: int, cancel: Cancel
    ) -> None:
        self._source = source
        self._link = link
        self._cancel = cancel
        self._ring = Ring()
        # Over a network nobody could open it; and nobody needs to know its name.
        shared_at = self._ring.shared_at if link.is_local else ""
        self._side = ProducerSide(job, source.name, source.size_bytes, "vmapipe", shared_at)
        self._heard = self._spoke = time.monotonic()
        self._pace = Pace(speed_bytes_s, self._heard)
        self.zero_clusters = 0

    def run(self) -> None:
        """Send the whole disk. Raises Failure, and tells the archiver why."""
        try:
            self._say(self._side.hello())
            self._wait_until(lambda: self._side.state is State.SENDING)
            self._ring.fit(piece_bytes(self._frame_bytes))
            for run in runs(self._source, self._ring.view, self._take, self._frame_bytes):
                self._send_run(run)
            self._source.check_unchanged()
            self._say(self._side.end())
            self._wait_until(lambda: self._side.state is State.CLOSED)
        except Refused:
            raise
        except (Failure, ProtocolError) as failure:
            self._say(self._side.fail(str(failure)))
            raise
        finally:
            self._ring.close()

    @property
    def _frame_bytes(self) -> int:
        """The largest frame: with a speed limit, several a second, so that it holds evenly."""
        allowed = self._side.frame_bytes
        if self._pace.bytes_per_s:
            allowed = min(allowed, self._pace.bytes_per_s // 8)
        return max(limits.MIN_FRAME_CHARGE, allowed)

    def _send_run(self, run: Run) -> None:
        if self._side.credit < run.charge:
            self._wait_until(lambda: self._side.credit >= run.charge)
        while (pause := self._pace.wait_s(time.monotonic())) > 0:
            self._step(pause)
        self._say(self._frame(run))
        self._pace.took(run.clusters * limits.CLUSTER_BYTES, self._spoke)
        if run.length:
            self._ring.hold(self._side.sent_frames, run.position, run.length)
        if not run.masks:
            self.zero_clusters += run.clusters
        self._hear()
        self._cancel.check()

    def _frame(self, run: Run) -> list[Part]:
        if run.length and self._side.shared:
            return self._side.shared_run(run.first_cluster, run.clusters, run.masks, run.position)
        payload = self._ring.view[run.position : run.position + run.length]
        return self._side.run(run.first_cluster, run.clusters, run.masks, payload)

    def _take(self, length: int) -> int:
        """Room in the ring; waits until the archiver has written enough of it."""
        self._wait_until(lambda: self._ring.take(length) is not None)
        position = self._ring.take(length)
        if position is None:
            raise RuntimeError("room in the ring has vanished")
        return position

    def _say(self, parts: list[Part]) -> None:
        self._link.send(parts)
        self._spoke = time.monotonic()

    def _hear(self) -> None:
        while (parts := self._link.receive()) is not None:
            self._heard = time.monotonic()
            match self._side.receive(parts):
                case Refuse(code, reason):
                    raise Refused(f"the archiver refused {self._source.name!r}: {reason} [{code}]")
                case Abort(reason):
                    raise Refused(f"the job was ended: {reason}")
                case Done():
                    return
        self._ring.release(self._side.acked)

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._step(self._heartbeat_s / 3)

    @property
    def _heartbeat_s(self) -> float:
        return self._side.heartbeat_s or limits.GREETING_HEARTBEAT_S

    def _step(self, longest_s: float) -> None:
        """Wait for an answer for at most `longest_s`; keep the session alive meanwhile."""
        longest_s = min(longest_s, self._heartbeat_s / 3)
        before = time.monotonic()
        self._link.wait(longest_s)
        self._cancel.check()
        self._hear()
        now = time.monotonic()
        if now - before > longest_s + _STOPPED_S:
            # This process itself was stopped: nobody else's silence counts.
            self._heard = now
        if now - self._heard > self._heartbeat_s:
            raise Failure(
                f"device {self._source.name!r}: the archiver has been silent for "
                f"{self._heartbeat_s:.0f} s; is it still running?"
            )
        if now - self._spoke >= self._heartbeat_s / 3 and self._side.state is not State.CLOSED:
            self._say(self._side.ping())
