# SPDX-License-Identifier: Apache-2.0
"""Reads what no guest has written to yet, one claim at a time."""

from __future__ import annotations

import os
import time

from vmapipe.producer.guarded import Guarded
from vmapipe.producer.pace import Pace
from vmapipe.producer.ring import Ring
from vmapipe.producer.runs import Run, packed, piece_bytes, whole_blocks
from vmapipe.producer.saved import read_exactly
from vmapipe.producer.session import Session
from vmapipe.protocol import limits
from vmapipe.protocol.guarding import MAX_CLAIM_CLUSTERS, Claimed
from vmapipe.protocol.limits import CLUSTER_BYTES

# A guest that writes to what is being read waits for it: a megabyte is read
# within the time of a few of its own requests, even from a disk that turns.
_PIECE_CLUSTERS = 16
_ASK_AGAIN_S = 0.25


class Background:
    """Nothing is claimed that cannot be read at once, because a guest may wait for it."""

    def __init__(self, name: str, ring: Ring, guard: Guarded, pace: Pace, session: Session) -> None:
        self._name = name
        self._ring = ring
        self._guard = guard
        self._pace = pace
        self._session = session
        # The limit may change meanwhile: the ring has room for the largest pieces.
        ring.fit(min(_PIECE_CLUSTERS * CLUSTER_BYTES, piece_bytes(session.frame_bytes)))
        #: The largest frame, in clusters.
        self.piece = 1
        self._fit_pieces()
        #: A claim is under way: what it needs is not to be used for anything else.
        self.asked = False
        #: From the disk, not counting holes.
        self.read_bytes = 0
        self._ask_at = 0.0
        self._next = 0

    def _fit_pieces(self) -> None:
        """To the speed limit, so that it holds evenly."""
        frame_bytes = self._pace.frame_bytes(self._session.frame_bytes)
        self._fitted_to = self._pace.bytes_per_s
        self.piece = min(_PIECE_CLUSTERS, piece_bytes(frame_bytes) // CLUSTER_BYTES)
        # A hole is one frame, however long, as long as its charge is allowed.
        room = frame_bytes - limits.CHARGE_PER_FRAME
        self._longest_hole = min(MAX_CLAIM_CLUSTERS, room // limits.CHARGE_PER_CLUSTER)
        self._least_credit = limits.charge(self.piece, self.piece * CLUSTER_BYTES)

    def ask(self) -> bool:
        """Claim the next piece, if it could be read at once; whether that was done."""
        if self.asked or self.pause_s() > 0 or time.monotonic() < self._ask_at:
            return False
        if self._pace.bytes_per_s != self._fitted_to:
            self._fit_pieces()
        if self._session.credit < self._least_credit:
            return False
        if self._ring.take(self.piece * CLUSTER_BYTES) is None:
            return False
        # The claim may begin behind `_next`, where guests were quicker.
        hole = (self._data_from(self._next * CLUSTER_BYTES) // CLUSTER_BYTES) - self._next
        if self._session.credit < limits.charge(self._longest_hole, 0):
            hole = 0
        self.asked = True
        self._guard.claim(max(self.piece, min(hole, self._longest_hole)))
        return True

    def pause_s(self) -> float:
        """So long until the speed limit allows more."""
        return 0.0 if self.asked else self._pace.wait_s(time.monotonic())

    def take(self, claimed: Claimed) -> None:
        """Read and send what was claimed. Raises Failure."""
        self.asked = False
        first, clusters = claimed
        if not clusters:
            # Guests are copying the last ones, and may yet leave one to us.
            self._ask_at = time.monotonic() + _ASK_AGAIN_S
            return
        at, end = first * CLUSTER_BYTES, (first + clusters) * CLUSTER_BYTES
        data = self._data_from(at)
        hole = clusters if data >= end else (data - at) // CLUSTER_BYTES
        run = Run(first, hole, b"", 0, 0) if hole else self._read(first, min(clusters, self.piece))
        self._guard.copied(run.clusters)
        self._session.send(run)
        if run.length:
            self._ring.hold(self._session.sent_frames, run.position, run.length)
        if not hole:
            self._pace.took(run.clusters * CLUSTER_BYTES, self._session.spoke)
        self._next = first + run.clusters

    def _read(self, first: int, clusters: int) -> Run:
        at = first * CLUSTER_BYTES
        length = min(clusters * CLUSTER_BYTES, self._guard.size_bytes - at)
        position = self._ring.take(whole_blocks(length))
        if position is None:
            raise RuntimeError("room in the ring has vanished")
        target = self._ring.view[position : position + length]
        read_exactly(self._guard.disk_fd, target, at, f"disk {self._name!r}")
        self.read_bytes += length
        return packed(self._ring.view, position, first, length)

    def _data_from(self, at: int) -> int:
        """Where the next data is; a number beyond every cluster when there is none."""
        try:
            return os.lseek(self._guard.disk_fd, at, os.SEEK_DATA)
        except OSError:
            # A disk without any more data; or one that does not know holes, whose
            # SEEK_DATA does not fail.
            return 1 << 62
