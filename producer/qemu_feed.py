# SPDX-License-Identifier: Apache-2.0
"""The feed of a disk that QEMU's backup job writes: QEMU is served well whatever happens."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer import chunks
from vmapipe.producer.chunks import Chunk
from vmapipe.producer.nbd.backend import sink_export
from vmapipe.producer.nbd.server import Offer, Server, answer_promptly
from vmapipe.producer.outbox import after
from vmapipe.producer.qemu_sink import MAX_PIECE_CLUSTERS, QemuSink
from vmapipe.producer.runs import Run, packed, piece_bytes, whole_blocks
from vmapipe.producer.sample_check import SampleCheck
from vmapipe.producer.session import Session
from vmapipe.producer.shared_memory import RING_BYTES, Ring
from vmapipe.producer.transmit import REPORT_S, Buffered, Transfer
from vmapipe.protocol import limits
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import DoubtfulBase, Failure
from vmapipe.runtime.events import (
    ChildCommands,
    Command,
    Emit,
    JobCopied,
    copied_in,
    ignore,
    is_job_speed_set,
    sampled_in,
    speed_in,
)

# QEMU comes within a second and stays; an interrupted connection it opens again
# at once. Twice its reconnect-delay without it: it does not come any more.
_ABSENCE_S = 60.0
# How often it is looked for; also for how long a finished job may wait in vain.
_LOOK_S = 0.05
# Asked to end while QEMU writes, we give its jobs so long to be cancelled: the
# coordinator needs a second; after STOP_S (10 s) it would kill us.
_LEAVE_S = 8.0


class SinkOptions(NamedTuple):
    """`listener_fd`: a listening socket. Sizes in bytes.

    `speed_bytes_s`: the limit that QEMU's job begins with; 0: none. `awaits_job`: the disk is
    complete only when a command says that QEMU's job has ended well. `awaits_sample`: nothing is
    sent before a command says what is to be compared with the base.
    """

    listener_fd: int
    size_bytes: int
    memory_bytes: int
    guest_wait_s: int
    speed_bytes_s: int
    awaits_job: bool
    awaits_sample: bool = False


class QemuFeed:
    """A disk as QEMU's backup job writes it to an export of ours, in any order.

    The export serves on after the end, until QEMU has left: a guest's write may wait for it.
    """

    pause_s = REPORT_S

    def __init__(
        self,
        name: str,
        options: SinkOptions,
        ring: Ring,
        session: Session,
        cancel: Cancel,
        commands: ChildCommands,
    ) -> None:
        self.name = name
        self._options = options
        self._ring = ring
        self._session = session
        self._cancel = cancel
        self._commands = commands
        self._listener = socket.socket(fileno=options.listener_fd)
        room = range(RING_BYTES, RING_BYTES + options.memory_bytes)
        self._sink = QemuSink(
            *(name, options.size_bytes, ring.view, room),
            *(options.guest_wait_s, options.speed_bytes_s),
        )
        self._server: Server | None = None
        self._emit: Emit = ignore
        self._absent_since = time.monotonic()
        # The end of QEMU's job: not awaited, or reported.
        self._job_ended = not options.awaits_job
        self._sample = SampleCheck(name, is_awaited=options.awaits_sample)
        # The speed of QEMU's job, as our parent knows it.
        self._reported_speed = options.speed_bytes_s
        self._all_came_at = float("inf")

    def begin(self, emit: Emit) -> None:
        self._emit = emit
        self._sample.set_key(self._session.digest_key)
        self._session.on_digests = self._sample.take
        answer_promptly()
        frame_clusters = piece_bytes(self._session.frame_bytes) // CLUSTER_BYTES
        self._sink.piece_clusters = min(MAX_PIECE_CLUSTERS, frame_clusters)
        self._session.watch(self._sink.fd)
        self._session.watch(self._commands.fd)
        # Never stopped: that would shut the socket down, and its other holder needs it.
        self._server = Server(
            [self._listener],
            [Offer(sink_export(self._options.size_bytes), self._sink)],
            lambda text: emit({"event": "notice", "text": text}),
            request_limit_s=self._options.guest_wait_s,
        )
        self._server.start()
        emit({"event": "attached", "device": self.name})

    @property
    def ended(self) -> bool:
        """True when all is sent, and QEMU's job has ended well: nothing may be stored before."""
        return self._job_ended and self._session.sent_clusters >= self._sink.clusters

    def advance(self) -> bool:
        try:
            return self._advance()
        except DoubtfulBase as doubt:
            self._emit({"event": "base-damaged", "text": str(doubt)})
            raise

    def _advance(self) -> bool:
        chunk = self._sink.next()
        if chunk is None or not self._sample.is_told:
            return False
        if chunk.position != chunks.UNCHANGED and not self._sample.is_ready(*chunk[:2]):
            return False
        match chunk.position:
            case chunks.ZEROES:
                return self._send_zeroes(chunk)
            case chunks.UNCHANGED:
                return self._send_unchanged(chunk)
        return self._send_data(chunk)

    def _send_zeroes(self, chunk: Chunk) -> bool:
        session = self._session
        for cluster in self._sample.sampled(chunk.first, chunk.clusters):
            self._sample.compare_zeroes(cluster)
        room = min(session.frame_bytes, session.credit) - limits.CHARGE_PER_FRAME
        count = min(chunk.clusters, room // limits.CHARGE_PER_CLUSTER)
        if count <= 0:
            return False
        session.send(Run(chunk.first, count, b"", 0, 0))
        self._sink.sent(count)
        return True

    def _send_unchanged(self, chunk: Chunk) -> bool:
        if self._session.credit < limits.CHARGE_PER_FRAME:
            return False
        self._session.send_unchanged(chunk.first, chunk.clusters)
        self._sink.sent(chunk.clusters)
        return True

    def _send_data(self, chunk: Chunk) -> bool:
        first, count, position, length = chunk
        sampled = self._sample.sampled(first, count)
        # Each of them may be a message of its own, and cut what is beside it in two.
        charge = limits.charge(count, whole_blocks(length))
        if self._session.credit < charge + 2 * len(sampled) * limits.CHARGE_PER_FRAME:
            return False
        run = packed(self._ring.view, position, first, length)
        parts = self._sample.split(run, self._ring.view) if sampled else [run]
        self._sink.sent(count)
        runs = [part for part in parts if isinstance(part, Run)]
        give_back = after(len(runs), lambda: self._sink.give_back([position]))
        for part in parts:
            if isinstance(part, Run):
                self._session.send(part, give_back)
            else:
                self._session.send_unchanged(part.first_cluster, part.clusters)
        if not runs:
            self._sink.give_back([position])
        return True

    @property
    def buffered(self) -> Buffered:
        return Buffered(self._sink.used_bytes, 0, self._sink.waiting_writes)

    @property
    def transfer(self) -> Transfer:
        """QEMU reads, and does not report what it copied before a write."""
        return Transfer(self._sink.taken_bytes, self._session.sent_bytes, 0)

    def check(self) -> None:
        if self._sink.failure:
            raise Failure(self._sink.failure)
        for command in self._commands.take():
            self._carry_out(command)
        for cluster in self._sample.wants():
            self._session.want(cluster, 1)
        if self.ended and not self._sample.is_done:
            raise Failure(f"disk {self.name!r}: QEMU has not sent all of the sample")
        self._check_absence(time.monotonic())
        speed = self._sink.job_speed
        if speed != self._reported_speed:
            self._reported_speed = speed
            self._emit({"event": "job-speed", "device": self.name, "bytes_per_s": speed})

    def _carry_out(self, command: Command) -> None:
        copied, speed, sampled = copied_in(command), speed_in(command), sampled_in(command)
        if sampled is not None:
            self._take_sample(*sampled)
        if is_job_speed_set(command):
            self._sink.job_is_limited()
        if copied is not None:
            self._take_verdict(copied)
        if speed is not None:
            self._sink.limit(speed)
            # What we reported last may reach our parent after it gave QEMU the new one.
            self._reported_speed = -1

    def _take_sample(self, clusters: list[int], is_last: bool) -> None:
        try:
            self._sample.tell(clusters, is_last=is_last)
        except DoubtfulBase as doubt:
            self._emit({"event": "base-damaged", "text": str(doubt)})
            raise

    def _check_absence(self, now: float) -> None:
        """Raises Failure when QEMU, or the end of its job, has not come for long."""
        sink = self._sink
        if not self._job_ended and not sink.missing:
            self._all_came_at = min(self._all_came_at, now)
            if now - self._all_came_at > _ABSENCE_S:
                raise Failure(
                    f"disk {self.name!r}: all of it has come, but QEMU's job has not ended for "
                    f"{_ABSENCE_S:.0f} s"
                )
        if self._clients or not sink.missing:
            self._absent_since = now
        elif now - self._absent_since > _ABSENCE_S:
            raise Failure(
                f"disk {self.name!r}: {sink.missing} of {sink.clusters} clusters have not come, "
                f"and QEMU has not been seen for {_ABSENCE_S:.0f} s"
            )

    def _take_verdict(self, copied: JobCopied) -> None:
        """Take the good end of QEMU's job. Raises Failure when less has come than that means."""
        sink = self._sink
        came_bytes = sink.arrived * CLUSTER_BYTES
        if copied.rest == "none" and sink.missing:
            raise Failure(
                f"disk {self.name!r}: QEMU's job has ended, but {sink.missing} of {sink.clusters} "
                "clusters have not come"
            )
        # The last cluster counts as a whole one on both sides.
        if copied.rest != "none" and came_bytes < copied.copied_bytes:
            raise Failure(
                f"disk {self.name!r}: QEMU's job has copied {copied.copied_bytes} bytes, but "
                f"{came_bytes} have come"
            )
        if copied.rest == "unchanged" and not self._session.has_base:
            raise Failure(f"disk {self.name!r}: the archiver has no base to take the rest from")
        if copied.rest != "none":
            sink.rest_is(chunks.UNCHANGED if copied.rest == "unchanged" else chunks.ZEROES)
        self._job_ended = True

    def finish(self) -> None: ...

    def fail(self, reason: str) -> None:
        self._sink.fail(reason)

    def leave(self) -> None:
        """Return when QEMU has left; after a failure its parent first ends QEMU's jobs."""
        if self._server is None:
            return
        if self._sink.failure:
            self._emit({"event": "draining", "device": self.name, "text": self._sink.failure})
            self._drain()
        else:
            while self._clients and not self._cancel.asked:
                time.sleep(_LOOK_S)

    def _drain(self) -> None:
        """Acknowledge and drop until our parent ends us: it first ends QEMU's jobs."""
        until = float("inf")
        while time.monotonic() < until:
            if self._cancel.asked:
                if not self._clients or not self._cancel.signum:
                    return  # QEMU has left; or our parent is dead: the guardian takes over
                until = min(until, time.monotonic() + _LEAVE_S)
            time.sleep(_LOOK_S)

    @property
    def _clients(self) -> int:
        return self._server.clients if self._server else 0
