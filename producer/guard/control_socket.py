# SPDX-License-Identifier: Apache-2.0
"""The guard's control socket: backup processes that attach, and coordinators that hold writes.

One thread a connection. A backup process that dies closes its connection, and
with that its backup is over here too: the disk serves on.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping

from vmapipe.producer.guard.backup import DiskBackup
from vmapipe.producer.guard.disk import HOLD_S, ServedDisk
from vmapipe.producer.guard.peer import GuardPeer, close_all
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.guard import (
    Attached,
    Claim,
    GuardAttach,
    GuardBegin,
    GuardBegun,
    GuardCopied,
    GuardRefused,
    GuardRelease,
    Held,
    Hold,
)
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.logs import debug

_log = logging.getLogger(__name__)

# A coordinator that holds the writes has so long to say go: longer would be
# felt in a guest.
_BEGIN_S = 5.0
# A peer that connects identifies itself at once.
_GREETING_S = 10.0
# Conversations end as soon as their connection does, unless a disk hangs.
_CLOSE_S = 5.0


class Conversations:
    """Serves the control socket `listener`, which it owns, until `close`."""

    def __init__(
        self,
        listener: socket.socket,
        disks: Mapping[str, ServedDisk],
        report: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._disks = disks
        self._report = report
        self._lock = threading.Lock()
        self._peers: dict[threading.Thread, GuardPeer] = {}
        threading.Thread(target=self._accept, name="guard-control", daemon=True).start()

    def close(self) -> None:
        """Disconnect all peers: a backup that is attached has failed."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            peers = dict(self._peers)
        for peer in peers.values():
            peer.close()
        deadline = time.monotonic() + _CLOSE_S
        for thread in peers:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        """Accept peers; after a lack of descriptors, memory or threads, go on when they are there again."""
        while self._listener.fileno() >= 0:
            sock = None
            try:
                sock, _ = self._listener.accept()
                self._converse(sock)
            except (OSError, RuntimeError, MemoryError):
                if sock is not None:
                    sock.close()
                if self._listener.fileno() >= 0:
                    time.sleep(0.1)

    def _converse(self, sock: socket.socket) -> None:
        """Serve a peer in a thread of its own. Raises RuntimeError, MemoryError: there is none."""
        peer = GuardPeer(sock)
        thread = threading.Thread(
            target=self._serve, args=(sock, peer), name="guard-peer", daemon=True
        )
        with self._lock:
            self._peers[thread] = peer
            try:
                thread.start()
            except BaseException:
                del self._peers[thread]
                raise

    def _serve(self, sock: socket.socket, peer: GuardPeer) -> None:
        try:
            received = peer.receive(_GREETING_S)
            if received is None:
                return
            message, fds = received
            debug(_log, "a peer begins with", message)
            match message:
                case GuardAttach():
                    self._back_up(message, fds, peer)
                case Hold():
                    close_all(fds)
                    self._hold(message, peer)
                case _:
                    close_all(fds)
                    raise Failure(f"{type(message).__name__} comes too early")
        except (Failure, ProtocolError) as error:
            debug(_log, "a peer is refused:", str(error))
            peer.send(GuardRefused(str(error)))
        except TimeoutError:
            peer.send(GuardRefused("nothing was heard for too long"))
        finally:
            peer.close()
            sock.close()
            with self._lock:
                del self._peers[threading.current_thread()]

    def _back_up(self, attach: GuardAttach, fds: list[int], peer: GuardPeer) -> None:
        """Raises Failure, RemoteProtocolError."""
        try:
            disk = self._disks.get(attach.disk)
            if disk is None:
                raise Failure(f"there is no disk {attach.disk!r} here")
            try:
                job = disk.attach(attach, peer, fds)
            except (OSError, ValueError) as error:
                raise Failure(f"the offered memory cannot be used: {error}") from error
        except Failure:
            close_all(fds)
            raise
        try:
            reading = disk.image.open_again()
            peer.send(Attached(disk.image.size_bytes), [reading])
            close_all([reading])
            self._report(f"{attach.disk}: a backup is attached")
            while (received := peer.receive()) is not None:
                message, more = received
                close_all(more)
                with disk.lock:
                    _carry_out(job, message)
        except OSError as error:
            raise Failure(f"disk {attach.disk!r}: {os_error_text(error)}") from error
        finally:
            disk.detach(job)
            copied = "complete" if job.core.complete else "ended early"
            self._report(f"{attach.disk}: the backup is over ({copied})")

    def _hold(self, hold: Hold, peer: GuardPeer) -> None:
        """Raises Failure, TimeoutError."""
        held: list[ServedDisk] = []
        try:
            for name in hold.disks:
                disk = self._disks.get(name)
                if disk is None:
                    raise Failure(f"there is no disk {name!r} here")
                disk.hold()
                held.append(disk)
            # All at once, and one limit for all: guests wait meanwhile.
            deadline = time.monotonic() + HOLD_S
            for disk in held:
                disk.wait_until_held(deadline)
            peer.send(Held())
            received = peer.receive(_BEGIN_S)
            if received is None:
                return
            message, fds = received
            close_all(fds)
            if not isinstance(message, GuardBegin):
                raise Failure(f"{type(message).__name__} in place of GuardBegin")
            for disk in held:
                disk.begin(hold.job)
        finally:
            for disk in held:
                disk.release()
        peer.send(GuardBegun())


def _carry_out(job: DiskBackup, message: object) -> None:
    """Carry out a message, the disk's lock being held. Raises Failure."""
    match message:
        case Claim(most):
            job.claim(most)
        case GuardCopied(clusters):
            job.copied(clusters)
        case GuardRelease(slots):
            job.release(slots)
        case _:
            raise Failure(f"{type(message).__name__} is not for a backup that is attached")
