# SPDX-License-Identifier: Apache-2.0
"""The carrier of `vmapipe fleet run`: requests to hosts by plain subprocesses and ssh, and their events back.

Each host gets a `vmapipe fleet agent` for one request: as a child here, or through ssh. When this process
dies, its pipes close, and the agents end their jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.fleet.agent import SILENCE_S, Event, vmapipe_words
from vmapipe.fleet.inventory import FleetHost
from vmapipe.runtime.text import one_line

# ssh's own way to say that it has not reached the host, or lost it.
_SSH_FAILED = 255
_CONNECT_S = 10
_PROBE_S = 60.0
_LINE_BYTES = 8 << 20
_SSH = (
    "ssh",
    "-T",
    "-oBatchMode=yes",
    f"-oConnectTimeout={_CONNECT_S}",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=3",
    "-oControlPath=none",
    "-oForwardAgent=no",
    "-oForwardX11=no",
    "-oClearAllForwardings=yes",
)


class ToldEvent(NamedTuple):
    """An event of a run; `ended`: its last."""

    run: str
    event: Event


class Ending(NamedTuple):
    """How a call of a host ended: its exit code (-1: unknown), and words. `is_down`: it was not reached."""

    code: int
    text: str
    is_down: bool


def agent_words(host: FleetHost) -> list[str]:
    """Return the argv of an agent on a host."""
    command = [
        *(host.command or (vmapipe_words() if not host.ssh else ["vmapipe"])),
        "fleet",
        "agent",
    ]
    if not host.ssh:
        return command
    # The far end's shell splits the words; a request is not among them.
    return [*_SSH, "--", host.ssh, shlex.join(command)]


def call(
    host: FleetHost,
    request: Mapping[str, Any],
    tell: Callable[[Event], None],
    stop: threading.Event,
    silence_s: float = SILENCE_S,
) -> Ending:
    """Send a request to a host's agent, and pass its events on until it ends. Never raises.

    `stop` asks it to end; an agent that says nothing for `silence_s` counts as lost.
    """
    words = agent_words(host)
    try:
        child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C is for us: agents are ended in order.
            start_new_session=True,
        )
    except OSError as error:
        return Ending(-1, f"cannot start {words[0]}: {error.strerror}", True)
    with child:
        errors = bytearray()
        try:
            text = _talk(child, request, tell, stop, silence_s, errors)
        finally:
            _end(child)
    said = _last_words(bytes(errors[-4000:]))
    is_down = bool(host.ssh) and child.returncode == _SSH_FAILED
    return Ending(child.returncode, text or said, is_down or bool(text))


def _last_words(raw: bytes) -> str:
    """Return them in one line; ssh draws a frame of @ about what is important."""
    lines = (line.strip(" \t\r@") for line in raw.decode(errors="replace").split("\n"))
    return one_line(" ".join(filter(None, lines)), 1000)


def _talk(
    child: subprocess.Popen[bytes],
    request: Mapping[str, Any],
    tell: Callable[[Event], None],
    stop: threading.Event,
    silence_s: float,
    errors: bytearray,
) -> str:
    """Return why it was given up; empty: it has ended."""
    stdin, stdout, stderr = child.stdin, child.stdout, child.stderr
    if stdin is None or stdout is None or stderr is None:
        return "no pipes"
    with contextlib.suppress(OSError):  # its words say why
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
    held, heard, asked = b"", time.monotonic(), False
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ, "out")
        selector.register(stderr, selectors.EVENT_READ, "err")
        while selector.get_map():
            if stop.is_set() and not asked:
                asked = True
                with contextlib.suppress(OSError):
                    stdin.close()
            for key, _ in selector.select(0.2):
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.data == "err":
                    errors += piece
                    del errors[:-8000]
                else:
                    heard = time.monotonic()
                    *lines, held = (held + piece).split(b"\n")
                    for line in lines:
                        _pass_on(line, tell)
                    if len(held) > _LINE_BYTES:
                        return f"its answer has a line of more than {_LINE_BYTES >> 20} MiB: is it vmapipe?"
            if time.monotonic() - heard > silence_s:
                return f"it has said nothing for {silence_s:.0f} s"
    return ""


def _pass_on(line: bytes, tell: Callable[[Event], None]) -> None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(event, dict):
        tell(event)


def _end(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        # It has lost its asker, and ends its job.
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.terminate()
        try:
            child.wait(70)
        except subprocess.TimeoutExpired:
            child.kill()


def probe(host: FleetHost) -> tuple[dict[str, Any] | None, str]:
    """Return a host's machines, or None and why it has not answered."""
    found = list[Event]()
    request = {"verb": "probe", "rules": list(host.guests)}
    ending = call(host, request, found.append, threading.Event(), _PROBE_S)
    answers = [event for event in found if event.get("event") == "probed"]
    if answers:
        return dict(answers[0]), ""
    what = f"ssh {host.ssh}: " if host.ssh else ""
    return None, what + (ending.text or f"it answered nothing (exit code {ending.code})")


class SubprocessCarrier:
    """Runs jobs on hosts, a thread each; `events` has what they tell."""

    def __init__(self, hosts: Mapping[str, FleetHost]) -> None:
        self._hosts = hosts
        self._running = dict[str, tuple[threading.Thread, threading.Event]]()
        self.events: queue.Queue[ToldEvent] = queue.Queue()

    def start(self, run: str, host: str, request: Mapping[str, Any]) -> None:
        stop = threading.Event()
        thread = threading.Thread(
            target=self._carry, args=(run, self._hosts[host], request, stop), name=run
        )
        self._running[run] = (thread, stop)
        thread.start()

    def _carry(
        self, run: str, host: FleetHost, request: Mapping[str, Any], stop: threading.Event
    ) -> None:
        ends = list[Event]()

        def tell(event: Event) -> None:
            if event.get("event") == "ended":
                ends.append(event)
            else:
                self.events.put(ToldEvent(run, event))

        ending = call(host, request, tell, stop)
        end: Event = {
            "event": "ended",
            "exit_code": ending.code,
            "text": ending.text or f"exit code {ending.code}",
            # Refused by the agent (exit code 2), or nobody knows how it went.
            "lost": ending.code != 2,
            "cancelled": stop.is_set(),
            "is_down": ending.is_down,
        }
        self.events.put(ToldEvent(run, ends[0] if ends else end))

    def cancel(self, run: str) -> None:
        if run in self._running:
            self._running[run][1].set()

    def forget(self, run: str) -> None:
        """Call it after a run's last event."""
        thread, _ = self._running.pop(run)
        thread.join()

    @property
    def runs(self) -> Sequence[str]:
        return list(self._running)
