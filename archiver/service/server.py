# SPDX-License-Identifier: Apache-2.0
"""The service's loop: carries messages to the core and its instructions out."""

from __future__ import annotations

import contextlib
import errno
import signal
import time
from collections.abc import Callable, Sequence

import zmq

from vmapipe.archiver.listener.socket import ANSWER_MARK, LINGER_MS, TURN, ListeningSocket
from vmapipe.archiver.service import jobs as core
from vmapipe.archiver.service.archivers import REAP_S, ArchiverProcesses
from vmapipe.archiver.service.front import (
    ArchiverAnswer,
    ArchiverEnded,
    ArchiverEvent,
    AttachFailed,
    ClientRevoked,
    Front,
    FrontEvent,
    PeerGone,
    PeerMessage,
    ServiceTicked,
    StopAsked,
    StopNow,
)
from vmapipe.protocol import limits
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.keys import ServerKeys
from vmapipe.runtime.logs import DEBUG, TRACE, Trace, shown
from vmapipe.runtime.process import notify

# Time passes for the core, and systemd's watchdog is fed, so often.
_TICK_S = 0.5

_log = Trace(__name__)


class ServiceLoop:
    """From the first peer to the end of the last job."""

    def __init__(
        self,
        front: Front,
        link: ServiceSockets,
        archivers: ArchiverProcesses,
        emit: Emit,
        flush_log: Callable[[], None],
    ) -> None:
        self._front = front
        self._link = link
        self._archivers = archivers
        self._emit = emit
        self._flush_log = flush_log
        self._next_tick = 0.0
        self._status = ""

    def run(self, cancel: Cancel, stop_timeout_s: int) -> None:
        """Until a stop was asked for, and every job has ended."""
        link, front = self._link, self._front
        link.watch(cancel.fd)
        deadline = float("inf")
        while not (deadline < float("inf") and front.idle):
            link.wait(REAP_S if self._archivers.in_a_hurry else _TICK_S)
            now = time.monotonic()
            self._receive(now)
            for peer, answer in link.answers():
                self._handle(ArchiverAnswer(peer, answer))
            self._handle_archivers(now)
            for peer in link.gone():
                self._handle(PeerGone(peer, now))
            if cancel.asked and deadline == float("inf"):
                link.unwatch(cancel.fd)
                deadline = now + self._begin_stop(cancel, stop_timeout_s)
            if now >= deadline:
                self._handle(StopNow("the service was stopped", now))
            if now >= self._next_tick:
                self._next_tick = now + _TICK_S
                self._pass_time(now)

    def _receive(self, now: float) -> None:
        for _ in range(TURN):
            message = self._link.take_message()
            if message is None:
                return
            peer, client, frames = message
            parts = [frame.buffer for frame in frames]
            self._handle(PeerMessage(peer, client, parts, now), frames)

    def _begin_stop(self, cancel: Cancel, stop_timeout_s: int) -> float:
        """For how long jobs may go on. Ctrl-C means at once."""
        left_s = 0 if cancel.signum == signal.SIGINT else stop_timeout_s
        self._handle(StopAsked("the service is being stopped"))
        notify("STOPPING=1")
        count = len(self._front.running)
        text = f"{cancel.reason}: {count} jobs may go on for {left_s} s"
        self._emit({"event": "notice", "text": text})
        return left_s

    def _handle_archivers(self, now: float) -> None:
        for job, event in self._archivers.take_events():
            if event is None:
                reason, usage = self._archivers.verdict(job), self._archivers.usage(job)
                self._handle(ArchiverEnded(job, reason, usage, now))
            else:
                self._handle(ArchiverEvent(job, event))

    def _pass_time(self, now: float) -> None:
        for client in self._link.revoked(now):
            self._handle(ClientRevoked(client, now))
        for text in self._link.take_notices():
            self._emit({"event": "notice", "text": text})
        self._handle(ServiceTicked(now))
        self._flush_log()
        status = f"{len(self._front.running)} jobs are running"
        notify("WATCHDOG=1", *([f"STATUS={status}"] if status != self._status else ()))
        self._status = status

    def _handle(self, event: FrontEvent, frames: Frames = ()) -> None:
        is_traced, level = _log.has(DEBUG), DEBUG
        if is_traced:
            is_data = isinstance(event, PeerMessage) and len(event.parts) > 1
            level = TRACE if is_data or isinstance(event, ServiceTicked) else level
            _log.log(level, "event %s", shown(event))
        for instruction in self._front.handle(event):
            if is_traced:
                _log.log(level, "instruction %s", shown(instruction))
            self._carry_out(instruction, frames)

    def _carry_out(self, instruction: core.ServiceInstruction, frames: Frames) -> None:
        match instruction:
            case core.ForwardMessage(peer):
                self._link.forward(peer, frames)
            case core.SendAnswer(peer, parts):
                self._link.send(peer, parts)
            case core.AttachProducer(peer, job):
                if not self._link.attach(peer, self._archivers.endpoint_of(job)):
                    self._handle(AttachFailed(peer, job))
            case core.DetachProducer(peer):
                self._link.detach(peer)
            case core.DropPeer(peer):
                self._link.drop(peer)
            case core.StartArchiver():
                self._start(instruction)
            case core.StopArchiver(job):
                self._archivers.signal(job, signal.SIGTERM)
            case core.KillArchiver(job):
                self._archivers.signal(job, signal.SIGKILL)
            case core.ReleaseJob(job):
                self._archivers.release(job)
            case core.LogEvent(line):
                self._emit(line)

    def _start(self, instruction: core.StartArchiver) -> None:
        try:
            self._archivers.start(instruction)
        except OSError as error:
            reason = f"no archiver could be started: {os_error_text(error)}"
            self._handle(ArchiverEnded(instruction.job, reason, {}, time.monotonic()))


# We pass messages on at once, so that only a flood ever fills it, and each may have 4 MiB.
_RECEIVE_MARK = 8
# Credit bounds what is under way to an archiver (jobs.SLACK_BYTES, counted with at
# least 72 bytes a message): this is an assertion above it.
_FORWARD_MARK = 500_000
# CURVE is work: a thread for it, and one for the sockets beside it.
_IO_THREADS = 2
# Sockets of one context; the descriptors that a process may have are a closer bound.
_MAX_SOCKETS = 65_000

Frames = Sequence[zmq.Frame]


class ServiceSockets(ListeningSocket):
    """All peers come to its endpoint; and there is a DEALER for each producer."""

    def __init__(self, endpoint: str, keys: ServerKeys | None) -> None:
        """Raises Failure."""
        super().__init__(
            endpoint,
            keys,
            receive_mark=_RECEIVE_MARK,
            io_threads=_IO_THREADS,
            max_sockets=_MAX_SOCKETS,
        )
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}
        self._peers: dict[zmq.Socket[bytes], bytes] = {}
        self._ready: list[zmq.Socket[bytes]] = []

    def wait(self, timeout_s: float) -> list[tuple[object, int]]:
        ready = super().wait(timeout_s)
        self._ready = [
            sock for sock, _ in ready if isinstance(sock, zmq.Socket) and sock in self._peers
        ]
        return ready

    def answers(self) -> list[tuple[bytes, list[bytes]]]:
        """Messages from archivers: (to which peer, parts), of at most MAX_CONTROL_BYTES each."""
        answers = []
        for sock in self._ready:
            for _ in range(TURN):
                peer = self._peers.get(sock)
                if peer is None or not int(sock.get(zmq.EVENTS)) & zmq.POLLIN:
                    break
                answers.append((peer, sock.recv_multipart(zmq.NOBLOCK)))
        return answers

    def attach(self, peer: bytes, endpoint: str) -> bool:
        """Open a connection to an archiver for what this peer sends; False: no descriptor is left."""
        try:
            sock = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return False
        sock.linger = LINGER_MS
        sock.sndhwm = _FORWARD_MARK
        sock.rcvhwm = ANSWER_MARK
        sock.maxmsgsize = limits.MAX_CONTROL_BYTES
        sock.connect(endpoint)
        self._dealers[peer] = sock
        self._peers[sock] = peer
        self._poller.register(sock, zmq.POLLIN)
        return True

    def detach(self, peer: bytes) -> None:
        sock = self._dealers.pop(peer)
        del self._peers[sock]
        self._poller.unregister(sock)
        sock.close()

    def forward(self, peer: bytes, parts: Frames) -> None:
        """Pass a message on to the peer's archiver, without a copy."""
        # Above the mark it is lost; the archiver then misses its number, and says so.
        dealer = self._dealers.get(peer)
        with contextlib.suppress(zmq.Again):
            if dealer is not None:
                dealer.send_multipart(parts, zmq.NOBLOCK, copy=False)
