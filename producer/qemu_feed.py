# SPDX-License-Identifier: Apache-2.0
"""Sends a disk as QEMU's backup job delivers it, and keeps QEMU content whatever happens."""

from __future__ import annotations

import socket
import time
from collections import deque
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.chunks import Chunk
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.producer.nbd.backend import sink_export
from vmapipe.producer.nbd.server import Offer, Server, answer_promptly
from vmapipe.producer.qemu_sink import MAX_PIECE_CLUSTERS, QemuSink
from vmapipe.producer.runs import Run, packed, piece_bytes, whole_blocks
from vmapipe.producer.session import RefusedByArchiver, Session
from vmapipe.producer.shared_memory import RING_BYTES, Ring
from vmapipe.producer.transmit import REPORT_S, BufferUse, ProgressReporter, Transfer
from vmapipe.protocol import limits
from vmapipe.protocol.errors import ProtocolError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import (
    ChildCommands,
    Emit,
    JobCopied,
    copied_in,
    is_job_speed_set,
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

    `speed_bytes_s`: the limit that QEMU's job begins with; 0: none. `awaits_job`: the disk is complete only when an order says that QEMU's job has ended well.
    """

    listener_fd: int
    size_bytes: int
    memory_bytes: int
    guest_wait_s: int
    speed_bytes_s: int
    awaits_job: bool


class SinkSender:
    """One disk, from HELLO to DONE, and on until QEMU has left."""

    def __init__(
        self,
        name: str,
        options: SinkOptions,
        job: bytes,
        link: ArchiverConnection,
        cancel: Cancel,
        orders: ChildCommands,
    ) -> None:
        self._name = name
        self._options = options
        self._link = link  # to be woken by what arrives
        self._cancel = cancel
        self._ring = Ring(options.memory_bytes)
        self._session = Session(name, options.size_bytes, link, job, self._ring, cancel)
        self._listener = socket.socket(fileno=options.listener_fd)
        # Sent runs, (frame, where their data lies), oldest first.
        self._sent: deque[tuple[int, int]] = deque()
        self._absent_since = time.monotonic()
        self._orders = orders
        # Of QEMU's job: none awaited, or heard.
        self._job_ended = not options.awaits_job
        # The speed of QEMU's job, as our parent knows it.
        self._told_speed = options.speed_bytes_s
        self._all_came_at = float("inf")

    @property
    def zero_clusters(self) -> int:
        return self._session.zero_clusters

    def run(self, emit: Emit) -> None:
        """Raises Failure, after QEMU could leave in peace."""
        answer_promptly()
        self._session.greet()
        sink = self._new_sink()
        self._link.watch(sink.fd)
        self._link.watch(self._orders.fd)
        server = self._serve(sink, emit)
        emit({"event": "attached", "device": self._name})
        try:
            self._send_all(sink, server, emit)
            self._session.end()
        except (Failure, ProtocolError) as failure:
            sink.fail(str(failure))
            if not isinstance(failure, RefusedByArchiver):
                self._session.fail(str(failure))
            emit({"event": "draining", "device": self._name, "text": str(failure)})
            self._drain(server)
            raise
        self._see_off(server)

    def close(self) -> None:
        self._ring.close()

    def _new_sink(self) -> QemuSink:
        frame_clusters = piece_bytes(self._session.frame_bytes) // CLUSTER_BYTES
        return QemuSink(
            self._name,
            self._options.size_bytes,
            self._ring.view,
            range(RING_BYTES, RING_BYTES + self._options.memory_bytes),
            min(MAX_PIECE_CLUSTERS, frame_clusters),
            self._options.guest_wait_s,
            self._options.speed_bytes_s,
        )

    def _serve(self, sink: QemuSink, emit: Emit) -> Server:
        """Never stopped: that would shut the socket down, and its other holder needs it."""
        server = Server(
            [self._listener],
            [Offer(sink_export(self._options.size_bytes), sink)],
            lambda text: emit({"event": "notice", "text": text}),
            request_limit_s=self._options.guest_wait_s,
        )
        server.start()
        return server

    def _send_all(self, sink: QemuSink, server: Server, emit: Emit) -> None:
        session = self._session
        teller = ProgressReporter(self._name, emit)
        while not self._is_complete(sink):
            arrived = sink.next()
            if arrived is not None and self._send(sink, arrived):
                session.hear()
                session.keep_alive(time.monotonic())
            elif not self._is_complete(sink):
                session.step(REPORT_S)
            self._release(sink)
            teller.tell(BufferUse(sink.used_bytes, 0, sink.waiting_writes))
            teller.tell_transfer(self._transfer(sink))
            self._check(sink, server)
            self._tell_job_speed(sink, emit)
        teller.tell_transfer(self._transfer(sink), last=True)

    def _is_complete(self, sink: QemuSink) -> bool:
        """All is sent, and QEMU's job has ended well: before that, nothing may be stored."""
        return self._job_ended and self._session.sent_clusters >= sink.clusters

    def _transfer(self, sink: QemuSink) -> Transfer:
        """QEMU reads, and does not tell what it copied before a write."""
        return Transfer(sink.taken_bytes, self._session.sent_bytes, 0)

    def _check(self, sink: QemuSink, server: Server) -> None:
        """Raises Failure."""
        self._cancel.check()
        if sink.failure:
            raise Failure(sink.failure)
        for order in self._orders.take():
            copied, speed = copied_in(order), speed_in(order)
            if is_job_speed_set(order):
                sink.job_is_limited()
            if copied is not None:
                self._take_verdict(sink, copied)
            if speed is not None:
                sink.limit(speed)
                # What we said last may reach our parent after it gave QEMU the new one.
                self._told_speed = -1
        now = time.monotonic()
        if not self._job_ended and not sink.missing:
            self._all_came_at = min(self._all_came_at, now)
            if now - self._all_came_at > _ABSENCE_S:
                raise Failure(
                    f"disk {self._name!r}: all of it has come, but QEMU's job has not ended for "
                    f"{_ABSENCE_S:.0f} s"
                )
        if server.clients or not sink.missing:
            self._absent_since = now
        elif now - self._absent_since > _ABSENCE_S:
            raise Failure(
                f"disk {self._name!r}: {sink.missing} of {sink.clusters} clusters have not come, "
                f"and QEMU has not been seen for {_ABSENCE_S:.0f} s"
            )

    def _tell_job_speed(self, sink: QemuSink, emit: Emit) -> None:
        speed = sink.job_speed
        if speed != self._told_speed:
            self._told_speed = speed
            emit({"event": "job-speed", "device": self._name, "bytes_per_s": speed})

    def _take_verdict(self, sink: QemuSink, copied: JobCopied) -> None:
        """QEMU's job has ended well. Raises Failure when less has come than that means."""
        came_bytes = sink.arrived * CLUSTER_BYTES
        if not copied.rest_is_zero and sink.missing:
            raise Failure(
                f"disk {self._name!r}: QEMU's job has ended, but {sink.missing} of {sink.clusters} "
                "clusters have not come"
            )
        # The last cluster counts as a whole one on both sides.
        if copied.rest_is_zero and came_bytes < copied.copied_bytes:
            raise Failure(
                f"disk {self._name!r}: QEMU's job has copied {copied.copied_bytes} bytes, but "
                f"{came_bytes} have come"
            )
        if copied.rest_is_zero:
            sink.rest_is_zero()
        self._job_ended = True

    def _send(self, sink: QemuSink, arrived: Chunk) -> bool:
        """One frame; False when the credit does not suffice."""
        session = self._session
        if arrived.position < 0:
            room = min(session.frame_bytes, session.credit) - limits.CHARGE_PER_FRAME
            count = min(arrived.clusters, room // limits.CHARGE_PER_CLUSTER)
            if count > 0:
                session.send(Run(arrived.first, count, b"", 0, 0))
                sink.sent(count)
            return count > 0
        first, count, position, length = arrived
        if session.credit < limits.charge(count, whole_blocks(length)):
            return False
        run = packed(self._ring.view, position, first, length)
        session.send(run)
        sink.sent(count)
        if run.length:
            self._sent.append((session.sent_frames, position))
        else:
            sink.give_back([position])
        return True

    def _release(self, sink: QemuSink) -> None:
        free = []
        while self._sent and self._sent[0][0] <= self._session.acked:
            free.append(self._sent.popleft()[1])
        if free:
            sink.give_back(free)

    def _see_off(self, server: Server) -> None:
        """Everything is stored; QEMU lets go of us when its job is dismissed."""
        while server.clients and not self._cancel.asked:
            time.sleep(_LOOK_S)

    def _drain(self, server: Server) -> None:
        """Acknowledge and drop until our parent ends us: it first ends QEMU's jobs."""
        until = float("inf")
        while time.monotonic() < until:
            if self._cancel.asked:
                if not server.clients or not self._cancel.signum:
                    return  # QEMU has left; or our parent is dead: the guardian takes over
                until = min(until, time.monotonic() + _LEAVE_S)
            time.sleep(_LOOK_S)
