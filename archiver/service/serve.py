# SPDX-License-Identifier: Apache-2.0
"""The service's loop: carries messages to the core and its instructions out."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

from vmapipe.archiver.service import instructions as core
from vmapipe.archiver.service.crew import REAP_S, Crew
from vmapipe.archiver.service.front import Front
from vmapipe.archiver.service.link import Frames, FrontLink
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.process import notify

# Time passes for the core, and systemd's watchdog is fed, so often.
_TICK_S = 0.5


class Service:
    """From the first peer to the end of the last job."""

    def __init__(self, front: Front, link: FrontLink, crew: Crew, emit: Emit) -> None:
        self._front = front
        self._link = link
        self._crew = crew
        self._emit = emit
        self._next_tick = 0.0
        self._status = ""

    def run(self, cancel: Cancel, stop_timeout_s: int) -> None:
        """Until a stop was asked for, and every job has ended."""
        link, front = self._link, self._front
        link.watch(cancel.fd)
        deadline = float("inf")
        while not (deadline < float("inf") and front.idle):
            link.wait(REAP_S if self._crew.in_a_hurry else _TICK_S)
            now = time.monotonic()
            for peer, client, frames in link.receive():
                parts = [frame.buffer for frame in frames]
                self._carry_out(front.receive(peer, client, parts, now), frames)
            for peer, answer in link.answers():
                self._carry_out(front.answer(peer, answer))
            self._hear_crew(now)
            for peer in link.gone():
                front.left(peer, now)
            if cancel.asked and deadline == float("inf"):
                link.unwatch(cancel.fd)
                deadline = now + self._begin_stop(cancel, stop_timeout_s)
            if now >= deadline:
                self._carry_out(front.fail_all("the service was stopped", now))
            if now >= self._next_tick:
                self._next_tick = now + _TICK_S
                self._pass_time(now)

    def _begin_stop(self, cancel: Cancel, stop_timeout_s: int) -> float:
        """For how long jobs may go on. Ctrl-C means at once."""
        left_s = 0 if cancel.signum == signal.SIGINT else stop_timeout_s
        self._front.stop("the service is being stopped")
        notify("STOPPING=1")
        count = len(self._front.running)
        text = f"{cancel.reason}: {count} jobs may go on for {left_s} s"
        self._emit({"event": "notice", "text": text})
        return left_s

    def _hear_crew(self, now: float) -> None:
        for job, event in self._crew.events():
            if event is None:
                words, usage = self._crew.verdict(job), self._crew.usage(job)
                self._carry_out(self._front.ended(job, words, usage, now))
            elif event["event"] == "listening":
                self._carry_out(self._front.listening(job))
            else:
                self._carry_out(self._front.told(job, event))

    def _pass_time(self, now: float) -> None:
        for client in self._link.revoked(now):
            self._carry_out(self._front.revoke(client, now))
        for text in self._link.take_notices():
            self._emit({"event": "notice", "text": text})
        self._carry_out(self._front.tick(now))
        status = f"{len(self._front.running)} jobs are running"
        notify("WATCHDOG=1", *([f"STATUS={status}"] if status != self._status else ()))
        self._status = status

    def _carry_out(self, instructions: Iterator[core.Instruction], frames: Frames = ()) -> None:
        for instruction in instructions:
            match instruction:
                case core.Forward(peer):
                    self._link.forward(peer, frames)
                case core.Send(peer, parts):
                    self._link.send(peer, parts)
                case core.Attach(peer, job):
                    if not self._link.attach(peer, self._crew.endpoint_of(job)):
                        self._carry_out(self._front.unattached(peer, job))
                case core.Detach(peer):
                    self._link.detach(peer)
                case core.Drop(peer):
                    self._link.drop(peer)
                case core.Start():
                    self._start(instruction)
                case core.Stop(job):
                    self._crew.signal(job, signal.SIGTERM)
                case core.Kill(job):
                    self._crew.signal(job, signal.SIGKILL)
                case core.Release(job):
                    self._crew.release(job)
                case core.Log(event):
                    self._emit(event)

    def _start(self, order: core.Start) -> None:
        try:
            self._crew.start(order)
        except OSError as error:
            words = f"no archiver could be started: {os_error_text(error)}"
            self._carry_out(self._front.ended(order.job, words, {}, time.monotonic()))
