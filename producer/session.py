# SPDX-License-Identifier: Apache-2.0
"""One session with the archiver: credit, acknowledgements, heartbeats, and their waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from vmapipe.producer.link import Link
from vmapipe.producer.ring import Ring
from vmapipe.producer.runs import Run
from vmapipe.protocol import limits
from vmapipe.protocol.frames import Part
from vmapipe.protocol.messages import Abort, Done, Refuse
from vmapipe.protocol.producer_side import ProducerSide, State
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

# Beyond what a loaded machine may oversleep: then we were stopped (Ctrl-Z).
_STOPPED_S = 5.0


class Refused(Failure):
    """The archiver said no, or the job failed elsewhere."""


class Session:
    """From HELLO to DONE. Runs lie in `ring`; what is acknowledged is free there again."""

    def __init__(
        self, name: str, size_bytes: int, link: Link, job: bytes, ring: Ring, cancel: Cancel
    ) -> None:
        self._name = name
        self._link = link
        self._cancel = cancel
        self._ring = ring
        # Over a network nobody could open it; and nobody needs to know its name.
        shared_at = ring.shared_at if link.is_local else ""
        self._side = ProducerSide(job, name, size_bytes, "vmapipe", shared_at)
        self._heard = self._pinged = self.spoke = time.monotonic()
        self.zero_clusters = 0
        #: Of data; what says only that something is zero has none.
        self.sent_bytes = 0

    @property
    def credit(self) -> int:
        return self._side.credit

    @property
    def frame_bytes(self) -> int:
        """The largest charge of one frame."""
        return self._side.frame_bytes

    @property
    def sent_clusters(self) -> int:
        return self._side.sent_clusters

    @property
    def sent_frames(self) -> int:
        return self._side.sent_frames

    @property
    def acked(self) -> int:
        """Frames up to this number are out of our hands."""
        return self._side.acked

    def greet(self) -> None:
        """Until the archiver has taken us, and everybody else of the job. Raises Failure."""
        self._say(self._side.hello())
        self.wait_until(lambda: self._side.state is State.SENDING)

    def send(self, run: Run) -> None:
        """The credit must suffice. The run's memory is held until it is acknowledged."""
        self._say(self._frame(run))
        self.sent_bytes += run.length
        if not run.masks:
            self.zero_clusters += run.clusters

    def end(self) -> None:
        """All is sent; until it is stored. Raises Failure."""
        self._say(self._side.end())
        self.wait_until(lambda: self._side.state is State.CLOSED)

    def fail(self, reason: str) -> None:
        self._say(self._side.fail(reason))

    def _frame(self, run: Run) -> list[Part]:
        if run.length and self._side.shared:
            return self._side.shared_run(run.first_cluster, run.clusters, run.masks, run.position)
        payload = self._ring.view[run.position : run.position + run.length]
        return self._side.run(run.first_cluster, run.clusters, run.masks, payload)

    def _say(self, parts: list[Part]) -> None:
        self._link.send(parts)
        self.spoke = time.monotonic()

    def hear(self) -> None:
        """Take in what has come. Raises Refused."""
        while (parts := self._link.receive()) is not None:
            self._heard = time.monotonic()
            match self._side.receive(parts):
                case Refuse(code, reason):
                    raise Refused(f"the archiver refused {self._name!r}: {reason} [{code}]")
                case Abort(reason):
                    raise Refused(f"the job was ended: {reason}")
                case Done():
                    return
        self._ring.release(self._side.acked)

    def wait_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self.step(self._heartbeat_s / 3)

    @property
    def _heartbeat_s(self) -> float:
        return self._side.heartbeat_s or limits.GREETING_HEARTBEAT_S

    def step(self, longest_s: float) -> None:
        """Wait for anything for at most `longest_s`; keep the session alive meanwhile."""
        longest_s = min(longest_s, self._heartbeat_s / 3)
        before = time.monotonic()
        self._link.wait(longest_s)
        self._cancel.check()
        self.hear()
        now = time.monotonic()
        if now - before > longest_s + _STOPPED_S:
            # This process itself was stopped: nobody else's silence counts.
            self._heard = now
        self.keep_alive(now)

    def keep_alive(self, now: float) -> None:
        """Ask for a sign of life in time. Raises Failure when the archiver is silent."""
        if now - self._heard > self._heartbeat_s:
            raise Failure(
                f"device {self._name!r}: the archiver has been silent for "
                f"{self._heartbeat_s:.0f} s; is it still running?"
            )
        # An archiver has no need to answer data: who only sends would hear nothing for ever.
        silence_s = now - min(self.spoke, max(self._heard, self._pinged))
        if silence_s >= self._heartbeat_s / 3 and self._side.state is not State.CLOSED:
            self._pinged = now
            self._say(self._side.ping())
