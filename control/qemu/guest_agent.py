# SPDX-License-Identifier: Apache-2.0
"""The guest agent (qemu-ga): file systems kept frozen for the moment in which a backup begins.

    python -m vmapipe.control.qemu.guest_agent --parent-fd N --agent SOCKET

A process of its own, because a guest that stays frozen hangs: it thaws when it
is told to, when its parent dies, when anything fails, and after a bound.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from vmapipe.control.qmp.addresses import Address, connect
from vmapipe.control.qmp.answers import SIZE
from vmapipe.control.qmp.client import Wire
from vmapipe.control.qmp.reader import SHORT_LIMITS, JsonReader, Unreadable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import Cancelled, Failure, os_error_text
from vmapipe.runtime.events import Emit, Event, ignore
from vmapipe.runtime.process import run_child
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import one_line

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
# manager, a port that another program keeps busy becomes free, and an agent that still freezes
# (some take a minute) answers after that: tried for so long.
_THAW_FOR_S = 60.0
_THAW_AGAIN_S = 0.2
# One that refuses has its reasons.
_MOST_REFUSALS = 3
# The last attempt may begin at the very end.
_THAW_LIMIT_S = _THAW_FOR_S + _SYNC_S + _THAW_S + 5.0
# An agent's reasons are a sentence.
_WORDS_CHARS = 1000
# Its socket takes one client at a time; one that asks it something leaves within moments.
_CONNECT_S = 3.0
# After its last word, or when it is killed.
_END_S = 5.0
_THAWED: Final = "thawed"
_NOT_THAWED: Final = "not-thawed"
FREEZE = "guest-fsfreeze-freeze"
_LATE = {
    FREEZE: ": the guest has much to write out, or a hook of its own (a database's) takes its "
    "time; try at a quieter hour. Without --agent the backup is as after a power cut"
}
# Marks the beginning of an answer (qemu-ga's guest-sync-delimited).
_DELIMITER = b"\xff"


class AgentRefused(Failure):
    """The agent has answered, with an error."""


class GuestAgent:
    """A connection to qemu-ga. Every method raises Failure."""

    def __init__(self, path: str, cancel: Cancel | None = None) -> None:
        """Connect and synchronise; a stop that `cancel` asks for ends every wait: Cancelled."""
        self._path = path
        deadline = time.monotonic() + _SYNC_S
        try:
            sock = connect(Address(path), time.monotonic() + _CONNECT_S)
        except OSError as error:
            raise self._silent(error) from error
        self._wire = Wire(sock, JsonReader(SHORT_LIMITS), cancel)
        try:
            self._sync(deadline)
        except OSError as error:
            self.close()
            raise self._silent(error) from error
        except BaseException:
            self.close()
            raise

    def execute(
        self, command: str, timeout_s: float, arguments: Mapping[str, Any] | None = None
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = dict(arguments)
        try:
            self._wire.send(request, deadline)
            answer = self._wire.receive(deadline)
        except TimeoutError as error:
            raise Failure(
                f"the guest agent at {self._path} has not answered {command} within "
                f"{timeout_s:.0f} s{_LATE.get(command, '')}"
            ) from error
        except OSError as error:
            raise self._silent(error) from error
        except Unreadable as error:
            raise self._not_valid(command, str(error)) from error
        if "return" in answer:
            return answer["return"]
        described = answer.get("error")
        text = described.get("desc") if isinstance(described, dict) else None
        if not isinstance(text, str):
            raise self._not_valid(command, "it has neither a member 'return' nor an 'error'")
        raise AgentRefused(
            f"the guest agent at {self._path} refuses {command}: {one_line(text, _WORDS_CHARS)}"
        )

    def close(self) -> None:
        self._wire.close()

    def _sync(self, deadline: float) -> None:
        """Skip whatever an earlier client has left: ours is the answer with our number."""
        number = time.monotonic_ns() & 0x7FFFFFFF
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        line = json.dumps(request).encode() + b"\n"
        self._wire.send_bytes(_DELIMITER + line, deadline)
        reader, is_answer = self._wire.reader, False
        while True:
            is_answer = reader.drop_to(_DELIMITER) or is_answer
            if not is_answer:
                reader.drop()
            try:
                while is_answer and (answer := reader.next()) is not None:
                    if answer.get("return") == number:
                        return
            except Unreadable:
                is_answer = False
            if time.monotonic() >= deadline:
                raise TimeoutError("it does not answer")
            self._wire.wait(deadline)
            self._wire.take()

    def _silent(self, error: OSError) -> Failure:
        return Failure(
            f"the guest agent at {self._path}: {os_error_text(error)}; is qemu-guest-agent running "
            "in the guest, and nobody else connected to it? Without --agent the backup is as after a "
            "power cut"
        )

    def _not_valid(self, command: str, why: str) -> Failure:
        return Failure(
            f"the guest agent at {self._path}: its answer to {command} is not valid: {why}"
        )


@contextmanager
def frozen(agent: str, emit: Emit, cancel: Cancel) -> Iterator[None]:
    """The guest's file systems are frozen while the block runs. Raises Failure, Cancelled.

    Whatever happens in the block, a guest that could not be thawed is told.
    """
    with Children() as children:
        children.watch(cancel.fd)
        child = children.start(
            "the guest's freezer", "vmapipe.control.qemu.guest_agent", [f"--agent={agent}"]
        )
        try:
            _await_frozen(children, child, cancel)
            yield
        except BaseException as error:
            # It must not be killed before it has thawed.
            trouble = _end(child, agent, ignore).trouble
            if not trouble:
                raise
            if isinstance(error, Failure) and not isinstance(error, Cancelled):
                raise Failure(
                    f"{error}; {trouble}" if str(error) != trouble else trouble
                ) from error
            emit({"event": "notice", "text": trouble})
            raise
        end = _end(child, agent, emit)
        if end.failure:
            raise Failure(end.failure)


def _await_frozen(children: Children, child: Child, cancel: Cancel) -> None:
    """Wait until the guest's file systems are frozen. Raises Failure, Cancelled."""
    limit_s = _SYNC_S + _FREEZE_S + _THAW_LIMIT_S
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for who, event in children.wait(0.2):
            if event is None:
                raise Failure(who.verdict() or f"{who.name} ended too early")
            if event["event"] == "frozen":
                return
        cancel.check()
    raise Failure(f"{child.name} is not done after {limit_s:.0f} s")


class _End(NamedTuple):
    """How freezing ended. `trouble`: the guest may be frozen still; `failure`: that, or another."""

    trouble: str
    failure: str


def _end(child: Child, agent: str, emit: Emit) -> _End:
    """End the freezing process, which thaws; where it was killed, thaw in its place."""
    child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _THAW_LIMIT_S
    is_over: dict[str, bool] = {_THAWED: False, _NOT_THAWED: False}
    is_closed = not child.running
    while not is_closed and time.monotonic() < deadline:
        readable([child.socket.fileno()], 0.2)
        events, is_closed = child.read_events()
        for event in events:
            is_over[event["event"]] = True
            if event["event"] == _THAWED:
                emit(event)
    if not child.reap(_END_S):
        child.send_signal(signal.SIGKILL)
        child.reap(_END_S)
    failure = child.verdict()
    if is_over[_NOT_THAWED]:
        return _End(failure, failure)
    if child.error or is_over[_THAWED] or not failure:
        return _End("", failure)
    # It was killed, or a defect ended it.
    try:
        _thaw(agent)
    except Failure as error:
        return _End(f"{failure}; {error}", f"{failure}; {error}")
    return _End("", f"{failure}: the guest's file systems were thawed in its place")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe.control.qemu.guest_agent")
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
            count = agent.execute(FREEZE, _FREEZE_S)
            if fault := SIZE.fault(count):
                raise Failure(
                    f"the guest agent at {path}: its answer to {FREEZE} is not valid: it{fault}"
                )
            emit({"event": "frozen", "file_systems": count})
            asked = bool(readable([cancel.fd], _FROZEN_S))
        finally:
            agent.close()
    finally:
        # Also when freezing has failed: it may have done so half-way.
        try:
            _thaw(path)
        except Failure:
            emit({"event": _NOT_THAWED})
            raise
    if not asked:
        raise Failure(
            f"the guest's file systems were frozen for {_FROZEN_S:.0f} s and the backup had not "
            "begun: they were thawed"
        )
    emit({"event": _THAWED, "seconds": round(time.monotonic() - started, 3)})


def _thaw(path: str) -> None:
    """Thaw, trying again for a minute. Raises Failure when the guest cannot be thawed."""
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
