# SPDX-License-Identifier: Apache-2.0
"""Sends one disk at rest: reads, waits for credit, sends, hears answers, ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from vmapipe.producer.link import Link
from vmapipe.producer.pace import Pace
from vmapipe.producer.runs import Buffers, Run, runs
from vmapipe.producer.source import Source
from vmapipe.protocol import limits
from vmapipe.protocol.messages import Abort, Done, Refuse
from vmapipe.protocol.producer_side import ProducerSide, State
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

# Until the archiver has said its own limit. It answers a PING at once, even
# while it waits for other producers.
GREETING_HEARTBEAT_S = 30


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
        self._side = ProducerSide(job, source.name, source.size_bytes, "vmapipe")
        self._buffers = Buffers(limits.MAX_PAYLOAD_BYTES)
        # (frame number, buffer) of what the archiver has not acknowledged yet.
        self._unacked: deque[tuple[int, bytearray]] = deque()
        self._heard = self._spoke = time.monotonic()
        self._pace = Pace(speed_bytes_s, self._heard)
        self.zero_clusters = 0

    def run(self) -> None:
        """Send the whole disk. Raises Failure, and tells the archiver why."""
        try:
            self._say(self._side.hello())
            self._wait_until(lambda: self._side.state is State.SENDING)
            for run in runs(self._source, self._buffers, self._side.frame_bytes):
                self._send_run(run)
            self._source.check_unchanged()
            self._say(self._side.end())
            self._wait_until(lambda: self._side.state is State.CLOSED)
        except Refused:
            raise
        except Failure as failure:
            self._say(self._side.fail(str(failure)))
            raise

    def _send_run(self, run: Run) -> None:
        if self._side.credit < run.charge:
            self._wait_until(lambda: self._side.credit >= run.charge)
        while (pause := self._pace.wait_s(time.monotonic())) > 0:
            self._step(pause)
        self._say(self._side.run(run.first_cluster, run.count, run.masks, run.payload))
        self._pace.took(run.count * limits.CLUSTER_BYTES, self._spoke)
        if run.buffer is not None:
            self._unacked.append((self._side.sent_frames, run.buffer))
        if not run.masks:
            self.zero_clusters += run.count
        self._hear()
        self._cancel.check()

    def _say(self, parts: list[bytes | bytearray | memoryview]) -> None:
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
        while self._unacked and self._unacked[0][0] <= self._side.acked:
            self._buffers.give_back(self._unacked.popleft()[1])

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        self._hear()
        while not reached():
            self._step(self._heartbeat_s / 3)

    @property
    def _heartbeat_s(self) -> float:
        return self._side.heartbeat_s or GREETING_HEARTBEAT_S

    def _step(self, longest_s: float) -> None:
        """Wait for an answer for at most `longest_s`; keep the session alive meanwhile."""
        self._link.wait(min(longest_s, self._heartbeat_s / 3))
        self._cancel.check()
        self._hear()
        now = time.monotonic()
        if now - self._heard > self._heartbeat_s:
            raise Failure(
                f"device {self._source.name!r}: the archiver has been silent for "
                f"{self._heartbeat_s:.0f} s; is it still running?"
            )
        if now - self._spoke >= self._heartbeat_s / 3 and self._side.state is not State.CLOSED:
            self._say(self._side.ping())
