# SPDX-License-Identifier: Apache-2.0
"""Sends a guarded disk: what guests' writes saved as it comes, the rest in the background."""

from __future__ import annotations

import os
import tempfile
import time
from typing import NamedTuple

from vmapipe.producer import telling
from vmapipe.producer.background import Background
from vmapipe.producer.guarded import Guarded
from vmapipe.producer.link import Link
from vmapipe.producer.pace import Pace
from vmapipe.producer.ring import RING_BYTES, Ring
from vmapipe.producer.saved import SavedData
from vmapipe.producer.session import Refused, Session
from vmapipe.protocol import limits
from vmapipe.protocol.errors import ProtocolError, RemoteProtocolError
from vmapipe.protocol.guarding import Attach, Begun, Claimed, FromGuard, Saved, SavedHole, Waiting
from vmapipe.protocol.limits import CLUSTER_BYTES
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.process import yield_cpu

# From a producer being ready to the instant that the coordinator chooses.
_BEGIN_S = 60.0
# What is looked at between frames costs as much as a frame of one cluster. So many
# take a millisecond, in which nobody waits for us: a claim is not under way then.
_FRAMES_IN_A_ROW = 16
# What guests save within this time goes together: each message wakes five threads on
# its way into the archive, on processors that the guests need.
_GATHER_S = 0.002


class Buffering(NamedTuple):
    """Where old data may wait for a slow archiver (sizes in bytes), and how long a guest may.

    `spool_folder` is empty where there is to be no spool file.
    """

    memory_bytes: int
    spool_folder: str
    spool_bytes: int
    guest_wait_s: int


class LiveSender:
    """One guarded disk, from HELLO to DONE. Raises Failure when the guard will not."""

    def __init__(
        self, name: str, guard: str, job: bytes, buffering: Buffering, link: Link, cancel: Cancel
    ) -> None:
        self._name = name
        self._cancel = cancel
        memory_slots = buffering.memory_bytes // CLUSTER_BYTES
        spool_slots = buffering.spool_bytes // CLUSTER_BYTES if buffering.spool_folder else 0
        self._ring = Ring(memory_slots * CLUSTER_BYTES)
        self._spool_fd = _open_spool(buffering.spool_folder) if spool_slots else -1
        fds = [fd for fd in (self._ring.fd, self._spool_fd) if fd is not None and fd >= 0]
        if self._ring.fd is None:
            raise Failure(f"disk {name!r}: no shared memory is to be had (ulimit -f?)")
        attach = Attach(
            limits.VERSION,
            job,
            name,
            RING_BYTES,
            memory_slots,
            spool_slots,
            buffering.guest_wait_s,
        )
        self._guard = Guarded(name, guard, attach, fds)
        self.size_bytes = self._guard.size_bytes
        self._session = Session(name, self.size_bytes, link, job, self._ring, cancel)
        self._saved = SavedData(
            self.size_bytes, memory_slots, self._spool_fd, self._ring, self._guard
        )
        self._background: Background | None = None
        self._gather_until = 0.0
        self._begun = False
        self._waiting_writes = 0
        link.watch(self._guard.fd)

    @property
    def zero_clusters(self) -> int:
        return self._session.zero_clusters

    def run(self, pace: Pace, emit: Emit) -> None:
        """Raises Failure, and tells the archiver why."""
        try:
            self._session.greet()
            emit({"event": "attached", "device": self._name})
            self._wait_for_instant()
            self._background = Background(self._name, self._ring, self._guard, pace, self._session)
            self._send_all(self._background, emit)
            self._session.end()
        except Refused:
            raise
        except (Failure, ProtocolError) as failure:
            self._session.fail(str(failure))
            raise

    def close(self) -> None:
        self._guard.close()
        self._ring.close()
        if self._spool_fd >= 0:
            os.close(self._spool_fd)

    def _wait_for_instant(self) -> None:
        deadline = time.monotonic() + _BEGIN_S
        while not self._begun:
            self._session.step(1.0)
            self._listen()
            if time.monotonic() > deadline:
                raise Failure(f"disk {self._name!r}: nobody said when the backup begins")

    def _send_all(self, background: Background, emit: Emit) -> None:
        session, saved = self._session, self._saved
        clusters = -(-self.size_bytes // CLUSTER_BYTES)
        teller = telling.Teller(self._name, emit)
        while session.sent_clusters < clusters:
            self._listen()
            # What guests' writes saved comes first: it takes room that others wait for.
            # Not while a claim is under way: it was asked for with the credit and the
            # room that there were then.
            now = time.monotonic()
            gather_s = self._gather_until - now if saved and not saved.is_many else 0.0
            if saved and gather_s <= 0 and not background.asked:
                did = self._send_saved(background.piece)
                self._gather_until = now + _GATHER_S
            else:
                did = background.ask()
            if did:
                yield_cpu()
                session.hear()
                session.keep_alive(now)
            elif gather_s > 0 and not background.asked:
                time.sleep(gather_s)
            elif session.sent_clusters < clusters:
                session.step(min(background.pause_s() or telling.TELL_S, telling.TELL_S))
            saved.release(session.acked)
            memory, spool = saved.used_memory * CLUSTER_BYTES, saved.used_spool * CLUSTER_BYTES
            teller.tell(telling.Waiting(memory, spool, self._waiting_writes))
            teller.tell_transfer(self._transfer(background))
            self._cancel.check()
        teller.tell_transfer(self._transfer(background), last=True)

    def _send_saved(self, most_clusters: int) -> bool:
        """Some frames in a row; False when credit or room is missing for the first."""
        sent = 0
        while self._saved and sent < _FRAMES_IN_A_ROW:
            if not self._saved.send(self._session, most_clusters):
                break
            sent += 1
        return sent > 0

    def _transfer(self, background: Background) -> telling.Transfer:
        sent_bytes = self._session.sent_bytes
        return telling.Transfer(background.read_bytes, sent_bytes, self._saved.saved_clusters)

    def _listen(self) -> None:
        while (message := self._guard.receive()) is not None:
            self._take(message)

    def _take(self, message: FromGuard) -> None:
        match message:
            case Begun():
                self._begun = True
            case Claimed() if self._background:
                self._background.take(message)
            case Saved() | SavedHole():
                self._saved.add(message)
            case Waiting(writes):
                self._waiting_writes = writes
            case _:
                raise RemoteProtocolError("sequence", f"{type(message).__name__} from the guard")


def _open_spool(folder: str) -> int:
    """A file without a name: whatever happens, nothing is left of it. Raises Failure."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise Failure(f"cannot make a spool file in {folder}: {os_error_text(error)}") from error
