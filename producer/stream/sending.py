# SPDX-License-Identifier: Apache-2.0
"""Sends a stream whose length nobody knows yet as the device `vmstate`: whole clusters, in order."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import NamedTuple

from vmapipe.producer.link import Link
from vmapipe.producer.ring import RING_BYTES, Ring
from vmapipe.producer.runs import packed, piece_bytes
from vmapipe.producer.session import Refused, Session
from vmapipe.producer.stream.intake import END, Intake, Piece
from vmapipe.producer.telling import TELL_S, Teller, Waiting
from vmapipe.protocol import limits
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.syscalls import readable

# The room for what was read must hold several pieces, or reading and sending take turns.
_PIECES = 8
# QEMU's word comes milliseconds after the stream's end.
_LOOK_S = 0.02


class StreamOptions(NamedTuple):
    """`fd`: the pipe. `verdict_fd`: who started QEMU's saving writes a byte there when QEMU says
    that all of it is in the pipe; -1: the pipe's end is the stream's. Sizes in bytes.
    """

    fd: int
    verdict_fd: int
    estimate_bytes: int
    memory_bytes: int
    guest_wait_s: int


class StreamSender:
    """One stream, from HELLO to DONE."""

    def __init__(
        self, name: str, options: StreamOptions, job: bytes, link: Link, cancel: Cancel
    ) -> None:
        #: Of the stream, as far as it was sent.
        self.size_bytes = 0
        self._name = name
        self._options = options
        self._link = link
        self._cancel = cancel
        self._ring = Ring(options.memory_bytes)
        self._session = Session(name, options.estimate_bytes, link, job, self._ring, cancel)
        # Sent pieces, (frame, where their data lies), oldest first.
        self._sent: deque[tuple[int, int]] = deque()

    @property
    def zero_clusters(self) -> int:
        return self._session.zero_clusters

    def run(self, emit: Emit) -> None:
        """Raises Failure; the stream is then read on and dropped for as long as we live."""
        session = self._session
        session.greet()
        intake = self._new_intake()
        self._link.watch(intake.fd)
        intake.start()
        emit({"event": "attached", "device": self._name})
        try:
            self._send_all(intake, Teller(self._name, emit))
            self._hear_verdict()
            session.end()
        except (Failure, ProtocolError) as failure:
            intake.fail(str(failure))
            if not isinstance(failure, Refused):
                session.fail(str(failure))
            raise

    def close(self) -> None:
        self._ring.close()

    def _new_intake(self) -> Intake:
        options = self._options
        share = options.memory_bytes // _PIECES // CLUSTER_BYTES * CLUSTER_BYTES
        return Intake(
            options.fd,
            self._ring.view,
            range(RING_BYTES, RING_BYTES + options.memory_bytes),
            min(piece_bytes(self._session.frame_bytes), share),
            options.guest_wait_s,
        )

    def _send_all(self, intake: Intake, teller: Teller) -> None:
        session = self._session
        while (piece := intake.next()) is not END:
            if piece is not None and self._send(intake, piece):
                session.hear()
                session.keep_alive(time.monotonic())
            else:
                session.step(TELL_S)
            self._release(intake)
            teller.tell(Waiting(intake.used_bytes, 0, int(intake.is_waiting)))
            self._cancel.check()
            if intake.failure:
                raise Failure(intake.failure)

    def _send(self, intake: Intake, piece: Piece) -> bool:
        """One frame; False when the credit does not suffice."""
        session = self._session
        clusters = -(-piece.length // CLUSTER_BYTES)
        whole = clusters * CLUSTER_BYTES
        if session.credit < limits.charge(clusters, whole):
            return False
        view = self._ring.view
        view[piece.position + piece.length : piece.position + whole] = bytes(whole - piece.length)
        run = packed(view, piece.position, session.sent_clusters, whole)
        session.send(run)
        self.size_bytes += piece.length
        intake.taken()
        if run.length:
            self._sent.append((session.sent_frames, piece.position))
        else:
            intake.give_back(piece.position)
        return True

    def _release(self, intake: Intake) -> None:
        while self._sent and self._sent[0][0] <= self._session.acked:
            intake.give_back(self._sent.popleft()[1])

    def _hear_verdict(self) -> None:
        """A pipe also ends when its writer dies. Raises Failure unless QEMU says it is complete."""
        fd = self._options.verdict_fd
        while fd >= 0 and not readable([fd], 0):
            self._session.step(_LOOK_S)
        if not self.size_bytes or (fd >= 0 and not os.read(fd, 1)):
            raise Failure(
                f"{self._name}: the machine's memory is not complete: QEMU's stream ended after "
                f"{self.size_bytes} bytes"
            )
