# SPDX-License-Identifier: Apache-2.0
"""The ways to ask a guest that need a wait: its agent, commands in it, its TCP ports; a thread each.

What a thread has heard it puts into a queue; the test's own loop takes it from there.
"""

from __future__ import annotations

import base64
import binascii
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vmapipe.access.drill.plan import Step
from vmapipe.control.qemu.freezing import AgentRefused
from vmapipe.control.qemu.guest_agent import GuestAgent
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import one_line

# The agent takes a question when it has started; between two attempts it may come up.
_AGAIN_S = 0.5
_ANSWER_S = 10.0
# A command in a guest that is still starting; it is asked for so often whether it has ended.
_COMMAND_S = 60.0
_POLL_S = 0.3
# A service greets its client within that, or is asked again.
_TCP_S = 5.0
_MOST_BYTES = 64 << 10
_SHOWN_CHARS = 200


class Heard(NamedTuple):
    """What a step's thread has to say: `text` is the answer; `refusal`: it was not even an answer."""

    step: int
    at: float
    text: str = ""
    refusal: str = ""


class Probes:
    """Threads that ask until `close`. Each answer of a guest is in `heard`, for `take`."""

    def __init__(self) -> None:
        self._cancel = Cancel()
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Which steps are done with: nobody is asked any more.
        self._done: set[int] = set()

    def ask_agent(self, path: str, steps: Sequence[tuple[int, Step]]) -> None:
        """Ask the agent, and the commands that run through it, one after the other."""
        self._start("drill-agent", lambda: self._agent(path, steps))

    def ask_tcp(self, port: int, index: int, step: Step) -> None:
        self._start("drill-tcp", lambda: self._tcp(port, index, step))

    def take(self) -> list[Heard]:
        """Return what was heard since the last call."""
        found = []
        while not self._heard.empty():
            found.append(self._heard.get())
        return found

    def done_with(self, index: int) -> None:
        self._done.add(index)

    def close(self) -> None:
        self._cancel.ask("the test is over")
        for thread in self._threads:
            thread.join()
        self._cancel.close()

    def _start(self, name: str, work: Callable[[], None]) -> None:
        def until_the_end() -> None:
            while not self._cancel.asked:
                try:
                    work()
                except Cancelled:
                    return
                except (Failure, OSError):
                    pass  # nobody is there yet
                readable([self._cancel.fd], _AGAIN_S)

        thread = threading.Thread(target=until_the_end, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _say(self, index: int, text: str = "", refusal: str = "") -> None:
        self._heard.put(Heard(index, time.monotonic(), text, refusal))

    def _is_open(self, index: int) -> bool:
        return index not in self._done and not self._cancel.asked

    # --- The agent ---

    def _agent(self, path: str, steps: Sequence[tuple[int, Step]]) -> None:
        if not any(self._is_open(index) for index, _ in steps):
            return
        agent = GuestAgent(path, self._cancel)
        try:
            agent.execute("guest-ping", _ANSWER_S)
            for index, step in steps:
                if step.kind == "agent":
                    self._say(index)
                elif self._is_open(index):
                    self._command(agent, index, step)
        finally:
            agent.close()

    def _command(self, agent: GuestAgent, index: int, step: Step) -> None:
        words = {"path": step.run[0], "arg": list(step.run[1:]), "capture-output": True}
        try:
            started = agent.execute("guest-exec", _ANSWER_S, words)
            pid = started.get("pid") if isinstance(started, dict) else None
            if not isinstance(pid, int):
                self._say(index, refusal="the agent has started nothing")
                return
            deadline = time.monotonic() + _COMMAND_S
            while time.monotonic() < deadline:
                state = agent.execute("guest-exec-status", _ANSWER_S, {"pid": pid})
                if isinstance(state, dict) and state.get("exited") is True:
                    self._ended(index, step, state)
                    return
                readable([self._cancel.fd], _POLL_S)
                self._cancel.check()
            self._say(index, refusal=f"it has not ended within {_COMMAND_S:.0f} s")
        except AgentRefused as error:
            self._say(index, refusal=str(error).partition(": ")[2] or str(error))

    def _ended(self, index: int, step: Step, state: dict[str, Any]) -> None:
        code = state.get("exitcode")
        said = _decoded(state.get("out-data")) + _decoded(state.get("err-data"))
        if code != step.exit_code:
            self._say(index, refusal=f"it ended with exit code {code}, and said {shown(said)}")
        else:
            self._say(index, said)

    # --- TCP ---

    def _tcp(self, port: int, index: int, step: Step) -> None:
        """Connect, and wait for data: QEMU takes the connection before there is a guest."""
        if not self._is_open(index):
            return
        with socket.create_connection(("127.0.0.1", port), _TCP_S) as sock:
            sock.settimeout(_TCP_S)
            sock.sendall(step.send)
            deadline, data = time.monotonic() + _TCP_S, b""
            while len(data) < _MOST_BYTES and time.monotonic() < deadline:
                if not readable([sock.fileno(), self._cancel.fd], deadline - time.monotonic()):
                    break
                self._cancel.check()
                piece = sock.recv(_MOST_BYTES)
                if not piece:
                    break
                data += piece
                if step.pattern is None or b"\n" in piece:
                    self._say(index, data.decode(errors="replace"))
                    if step.pattern is None:
                        return
            if data:
                self._say(index, data.decode(errors="replace"))


def shown(text: str) -> str:
    """An answer of a guest's, for a report."""
    return repr(one_line(" ".join(text.split())[:_SHOWN_CHARS], _SHOWN_CHARS + 100))


def _decoded(value: object) -> str:
    if not isinstance(value, str):
        return ""
    try:
        return base64.b64decode(value).decode(errors="replace")
    except (binascii.Error, ValueError):
        return ""
