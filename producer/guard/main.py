# SPDX-License-Identifier: Apache-2.0
"""The process that serves disks to guests. `vmapipe monitor` starts one for each disk.

On its control socket backup processes attach, and coordinators hold writes; each connection has a
thread. A backup process that dies closes its connection, and with that its backup is over here
too: the disk serves on.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from vmapipe.producer.guard.backup import DiskBackup
from vmapipe.producer.guard.disk import HOLD_S, ServedDisk
from vmapipe.producer.guard.image import Image
from vmapipe.producer.guard.peer import GuardPeer, close_all
from vmapipe.producer.nbd.server import DRAIN_S, Offer, Server, answer_promptly
from vmapipe.producer.nbd.workers import Pool
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.guard import (
    Attached,
    Claim,
    GuardAskFelt,
    GuardAttach,
    GuardBegin,
    GuardBegun,
    GuardCopied,
    GuardFelt,
    GuardRefused,
    GuardRelease,
    Held,
    Hold,
)
from vmapipe.protocol.nbd.constants import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.session import Export
from vmapipe.runtime.arguments import add_child_options, make_parser
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.logs import Trace, debug
from vmapipe.runtime.process import run_child
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import one_line

_log = Trace(__name__)

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
                    if isinstance(message, GuardAskFelt):
                        felt = disk.take_felt(message.bound_us / 1e6)
                        us = min(round(felt.p99_s * 1e6), 1 << 62)
                        peer.send(GuardFelt(felt.requests, felt.slow, us))
                    else:
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


DESCRIPTION = """\
Serve raw images or block devices over NBD on sockets that were opened by
whoever starts this (see `vmapipe monitor`), and let backups attach to them.
"""

# All connections to a disk write to the same file, so that one's flush is all's.
_FLAGS = (
    NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_FAST_ZERO
    | NBD_FLAG_SEND_CACHE
    | NBD_FLAG_SEND_DF
    | NBD_FLAG_CAN_MULTI_CONN
)


def main(argv: Sequence[str] | None = None, prog: str = "vmapipe guard") -> int:
    parser = make_parser(prog, DESCRIPTION, "")
    parser.add_argument(
        "--disk", action="append", required=True, metavar="NAME", help="the name of a disk to own"
    )
    parser.add_argument(
        "--path", action="append", required=True, metavar="PATH", help="where it is, one a --disk"
    )
    parser.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="FD=NAME",
        help="offer a disk on a listening socket; several on one when FD comes again",
    )
    parser.add_argument(
        "--control", type=int, required=True, metavar="FD", help="where backups connect to"
    )
    add_child_options(parser)
    options = parser.parse_args(argv)
    return run_child(
        prog, options.parent_fd, lambda cancel, emit: _guard(options, cancel, emit), _print
    )


def _guard(options: argparse.Namespace, cancel: Cancel, emit: Emit) -> None:
    answer_promptly()

    def report(text: str) -> None:
        emit({"event": "notice", "text": text})

    disks: dict[str, ServedDisk] = {}
    servers: list[Server] = []
    try:
        for name, path in zip(options.disk, options.path, strict=True):
            disks[name] = ServedDisk(Image(name, path))
            size = disks[name].image.size_bytes
            emit({"event": "serving", "disk": name, "path": path, "bytes": size})
        servers = _servers(options.serve, disks, report)
        conversations = Conversations(socket.socket(fileno=options.control), disks, report)
        for server in servers:
            server.start()
        emit({"event": "all-served"})
        readable([cancel.fd])
        conversations.close()
        for server in servers:
            server.close_intake()
        deadline = time.monotonic() + DRAIN_S
        for server in servers:
            server.finish(deadline)
    finally:
        for disk in disks.values():
            disk.image.close()


def _servers(
    words: Sequence[str], disks: dict[str, ServedDisk], report: Callable[[str], None]
) -> list[Server]:
    names_by_fd: dict[int, list[str]] = {}
    for word in words:
        fd, _, name = word.partition("=")
        names_by_fd.setdefault(int(fd), []).append(name)
    pool = Pool()
    return [
        Server(
            [socket.socket(fileno=fd)], [offer(name, disks[name]) for name in names], report, pool
        )
        for fd, names in names_by_fd.items()
    ]


def offer(name: str, disk: ServedDisk) -> Offer:
    """The export of a disk, under its name."""
    size = disk.image.size_bytes
    return Offer(Export(name, size, _FLAGS, f"vmapipe: {name}", allocation=True), disk)


def _print(event: Event) -> None:
    text = str(event.get("text") or f"{event['event']} {event.get('disk', '')}")
    print(one_line(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
