# SPDX-License-Identifier: Apache-2.0
"""The worker processes of one restore: gives them work, hears them, ends them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from vmapipe.protocol.restore import FinishWork, Ready, Setup, WorkDone, decode_for_reader, encode
from vmapipe.protocol.schema import Part
from vmapipe.restore.workers.sockets import ReaderLink
from vmapipe.restore.workers.work import Feed, RateLimits, Work, WorkerTable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import STOP_S, Children
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.logs import DEBUG, Trace, shown

_log = Trace(__name__)

# A Python process starts in a tenth of a second; on a stalled machine later.
_START_S = 60.0
# Only a bound: every reason to go on wakes us at once.
_WAIT_S = 1.0
# A worker that cannot be reached has ended or is about to, and knows the reason.
_VERDICT_S = 2.0


def start_workers(children: Children, count: int, endpoint: str, fds: Sequence[int]) -> None:
    """Start `count` workers, which inherit `fds`; they wait for the reader to listen at `endpoint`."""
    for number in range(1, count + 1):
        name = f"worker-{number}"
        argv = ["--endpoint", endpoint, "--name", name]
        children.start(f"restore {name}", "vmapipe.restore.workers.worker", argv, fds)


class WorkerPool:
    """Raises Failure, from any of its methods, as soon as one worker fails."""

    def __init__(
        self,
        link: ReaderLink,
        children: Children,
        cancel: Cancel,
        pace: RateLimits,
        done: Callable[[Work, Sequence[int]], None],
        all_here: Callable[[], None],
    ) -> None:
        """`done` is called for every piece of work that is done, with those of its extents
        whose digest was wrong.

        `all_here` is called when all are connected, and the socket's name is no longer needed.
        """
        self.gave_work = False
        #: Data that was on the targets already.
        self.kept_bytes = 0
        self._link = link
        self._children = children
        self._cancel = cancel
        self._pace = pace
        self._done = done
        self._all_here = all_here
        self._roster = WorkerTable()
        self._setup: Setup | None = None
        self._give_up = 0.0

    def welcome(self, setup: Setup) -> None:
        """The workers were started and are about to report: `setup` is for each of them."""
        self._setup = setup
        self._give_up = time.monotonic() + _START_S

    def carry_out(self, feed: Feed) -> None:
        """Have all work of `feed` done."""
        work: Work | None = None
        while True:
            self._cancel.check()
            if work is None and not feed.ended:
                work = feed.poll()
            if work is not None and not work.parts:
                self._done(work, ())
                work = None
                continue
            if work is not None and self._give(work):
                work = None
                continue
            if work is None and feed.ended and self._roster.idle:
                return
            if work is None and not feed.ended and feed.fd < 0:
                continue
            self._hear(self._wait_s(work), [feed.fd] if work is None and feed.fd >= 0 else [])

    def _give(self, work: Work) -> bool:
        """Give the work to a free worker; return False where there is none."""
        now = time.monotonic()
        worker = self._roster.free_worker(work)
        if worker is None or self._pace.wait_s(work.data_bytes, now) > 0:
            return False
        self._send(worker, work.parts)
        self.gave_work = True
        self._pace.took(work.data_bytes, now)
        self._roster.gave(worker, work)
        return True

    def _wait_s(self, work: Work | None) -> float:
        if work is None:
            return _WAIT_S
        pause_s = self._pace.wait_s(work.data_bytes, time.monotonic())
        return min(_WAIT_S, pause_s) if pause_s > 0 else _WAIT_S

    def _hear(self, timeout_s: float, fds: Sequence[int]) -> None:
        """Wait for anything to happen, and take it in."""
        sockets = [child.socket.fileno() for child in self._children.all if child.running]
        self._link.wait(timeout_s, [self._cancel.fd, *sockets, *fds])
        self._cancel.check()
        for worker, parts in self._link.receive():
            message = decode_for_reader(parts)
            if _log.has(DEBUG):
                _log.debug("%s answers %s", worker, shown(message))
            match message:
                case Ready() if self._setup is not None:
                    self._send(worker, encode(self._setup))
                    self._roster.joined(worker)
                    if len(self._roster.workers) == len(self._children.all):
                        self._all_here()
                case WorkDone(seq, kept_bytes, damaged):
                    self.kept_bytes += kept_bytes
                    work = self._roster.done(worker, seq)
                    if work is None:
                        raise Failure(f"{worker} answers work {seq}, which it does not have")
                    self._done(work, damaged)
        self._hear_children(0)

    def _send(self, worker: str, parts: Sequence[Part]) -> None:
        try:
            self._link.send(worker, parts)
        except Failure:
            deadline = time.monotonic() + _VERDICT_S
            while (left_s := deadline - time.monotonic()) > 0:
                self._hear_children(left_s)
            raise

    def _hear_children(self, timeout_s: float) -> None:
        for child, event in self._children.wait(timeout_s):
            if event is None:
                self._cancel.check()
                raise Failure(child.verdict() or f"{child.name} ended too early")
        if not self._roster.workers and time.monotonic() > self._give_up:
            raise Failure(f"no worker process has started within {_START_S:.0f} s")

    def finish(self) -> None:
        """Let the workers exit; terminate those that have never connected. All work is done."""
        for worker in self._roster.workers:
            self._send(worker, encode(FinishWork()))
        ending = [
            child
            for child in self._children.all
            if child.name.removeprefix("restore ") in self._roster.workers
        ]
        deadline = time.monotonic() + STOP_S
        while any(child.running for child in ending) and time.monotonic() < deadline:
            self._cancel.check()
            for child, event in self._children.wait(min(_WAIT_S, STOP_S)):
                if event is None and child.exit_code:
                    raise Failure(child.verdict())
