# SPDX-License-Identifier: Apache-2.0
"""Keeps a guest's file systems frozen for the moment in which a backup begins.

    python -m vmapipe.control.qemu.freezing --parent-fd N --agent SOCKET

A process of its own, because a guest that stays frozen hangs: it thaws when it
is told to, when its parent dies, when anything fails, and after a bound.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.process import run_child
from vmapipe.runtime.waiting import readable

# An agent that is alive answers a ping at once; a guest under load takes longer.
_SYNC_S = 10.0
# Freezing writes out all that is dirty. Less than what producers wait for the
# instant (60 s).
_FREEZE_S = 30.0
_THAW_S = 10.0
# Beginning a backup takes some 20 ms. A guest that is frozen for longer than
# this begins to fail; a database's clients time out.
_FROZEN_S = 10.0
# An agent that died while the guest was frozen is started again by the guest's service
# manager, and a port that somebody else keeps busy becomes free: tried for so long.
_THAW_FOR_S = 30.0
_THAW_AGAIN_S = 0.2
# One that refuses has its reasons.
_MOST_REFUSALS = 3
# The last attempt may begin at the very end.
_THAW_LIMIT_S = _THAW_FOR_S + _SYNC_S + _THAW_S + 5.0
_MAX_ANSWER_BYTES = 1 << 20
# Marks the beginning of an answer (qemu-ga's guest-sync-delimited).
_DELIMITER = b"\xff"


class AgentRefused(Failure):
    """The agent has answered, with an error."""


class GuestAgent:
    """A connection to qemu-ga. Every method raises Failure."""

    def __init__(self, path: str, cancel: Cancel | None = None) -> None:
        """With `cancel`, a stop ends every wait: Cancelled."""
        self._path = path
        self._cancel = cancel
        self._socket = socket.socket(socket.AF_UNIX)
        self._rest = b""
        try:
            self._socket.settimeout(_SYNC_S)
            self._socket.connect(path)
            self._sync()
        except OSError as error:
            self._socket.close()
            raise self._silent(error) from error
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, timeout_s: float) -> Any:
        try:
            self._send(command, {})
            answer = self._answer(timeout_s)
        except OSError as error:
            raise self._silent(error) from error
        if "error" in answer:
            described = answer["error"]
            text = described.get("desc", "") if isinstance(described, dict) else ""
            raise AgentRefused(f"the guest agent at {self._path} refuses {command}: {text}")
        return answer.get("return")

    def close(self) -> None:
        self._socket.close()

    def _sync(self) -> None:
        """Skip whatever an earlier client has left: ours is the answer with our number."""
        number = time.monotonic_ns() & 0x7FFFFFFF
        self._socket.sendall(_DELIMITER)
        self._send("guest-sync-delimited", {"id": number})
        deadline = time.monotonic() + _SYNC_S
        while True:
            answer = self._answer(deadline - time.monotonic())
            if answer.get("return") == number:
                return

    def _send(self, command: str, arguments: dict[str, Any]) -> None:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._rest) > _MAX_ANSWER_BYTES:
                raise TimeoutError("it does not answer")
            self._wait(left)
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("it has closed the connection")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            value = json.loads(line.rpartition(_DELIMITER)[2])
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _wait(self, timeout_s: float) -> None:
        """Until something has come. Raises TimeoutError, Cancelled."""
        watched = [self._socket.fileno()] + ([self._cancel.fd] if self._cancel else [])
        ready = readable(watched, timeout_s)
        if self._cancel is not None:
            self._cancel.check()
        if not ready:
            raise TimeoutError("it does not answer")

    def _silent(self, error: OSError) -> Failure:
        # A Unix socket says so when its queue is full.
        busy = isinstance(error, BlockingIOError)
        why = "it serves one client at a time, and has others" if busy else os_error_text(error)
        return Failure(
            f"the guest agent at {self._path}: {why}; is qemu-guest-agent running in the guest, and "
            "nobody else connected to it? Without --agent the backup is as after a power cut"
        )


@contextmanager
def frozen(agent: str, emit: Emit, cancel: Cancel) -> Iterator[None]:
    """The guest's file systems are frozen while the block runs. Raises Failure, Cancelled."""
    with Children() as children:
        children.watch(cancel.fd)
        child = children.start(
            "the guest's freezer", "vmapipe.control.qemu.freezing", [f"--agent={agent}"]
        )
        try:
            for _ in _until(children, child, "frozen", _SYNC_S + _FREEZE_S + _THAW_S):
                cancel.check()
            yield
        except BaseException:
            # It must not be killed before it has thawed.
            child.send_signal(signal.SIGTERM)
            child.reap(_THAW_LIMIT_S)
            raise
        child.send_signal(signal.SIGTERM)
        for event in _until(children, child, "thawed", _THAW_LIMIT_S):
            if event is not None:
                emit(event)


def _until(children: Children, child: Child, name: str, limit_s: float) -> Iterator[Event | None]:
    """Ends with the event `name`; None: somebody has to look whether to go on. Raises Failure."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for who, event in children.wait(0.2):
            if event is None:
                raise Failure(who.verdict() or f"{who.name} ended too early")
            if event["event"] == name:
                yield event
                return
        yield None
    raise Failure(f"{child.name} is not done after {limit_s:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe.control.qemu.freezing")
    parser.add_argument("--parent-fd", type=int, default=None)
    parser.add_argument("--agent", required=True, metavar="SOCKET")
    options = parser.parse_args(argv)

    def work(cancel: Cancel, emit: Emit) -> None:
        _freeze(options.agent, cancel, emit)

    return run_child(parser.prog, options.parent_fd, work, _print)


def _freeze(path: str, cancel: Cancel, emit: Emit) -> None:
    agent = GuestAgent(path, cancel)
    started = time.monotonic()
    try:
        try:
            count = agent.execute("guest-fsfreeze-freeze", _FREEZE_S)
            emit({"event": "frozen", "file_systems": count})
            asked = bool(readable([cancel.fd], _FROZEN_S))
        finally:
            agent.close()
    finally:
        # Also when freezing has failed: it may have done so half-way.
        _thaw(path)
    if not asked:
        raise Failure(
            f"the guest's file systems were frozen for {_FROZEN_S:.0f} s and the backup had not "
            "begun: they were thawed"
        )
    emit({"event": "thawed", "seconds": round(time.monotonic() - started, 3)})


def _thaw(path: str) -> None:
    """Raises Failure when the guest cannot be thawed, however often it is tried."""
    until, refusals = time.monotonic() + _THAW_FOR_S, 0
    while True:
        try:
            # A connection of its own: the other one may be in the middle of something.
            agent = GuestAgent(path)
            try:
                agent.execute("guest-fsfreeze-thaw", _THAW_S)
                return
            finally:
                agent.close()
        except Failure as error:
            refusals += isinstance(error, AgentRefused)
            if refusals == _MOST_REFUSALS or time.monotonic() > until:
                raise Failure(
                    f"THE GUEST MAY STILL BE FROZEN: {error}. Thaw it by hand: send "
                    f'{{"execute": "guest-fsfreeze-thaw"}} to {path}'
                ) from error
        time.sleep(_THAW_AGAIN_S)


def _print(event: Event) -> None:
    print(event["event"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
