# SPDX-License-Identifier: Apache-2.0
"""File systems of a guest that are kept frozen for the moment in which a backup begins: thawed whatever happens.

A process of its own freezes, because a guest that stays frozen hangs: it thaws when it is
told to, when its parent dies, when anything fails, and after a bound. How the guest is asked
(its agent's socket, libvirt) is a `Freezer`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, Protocol

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Emit, ignore
from vmapipe.runtime.syscalls import readable

# Whoever freezes has found the guest's agent by then.
FIND_S = 10.0
# Freezing writes out all that is dirty. Less than what producers wait for the
# instant (60 s).
FREEZE_S = 30.0
THAW_S = 10.0
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
_THAW_LIMIT_S = _THAW_FOR_S + FIND_S + THAW_S + 5.0
# After its last word, or when it is killed.
_END_S = 5.0
_THAWED: Final = "thawed"
_NOT_THAWED: Final = "not-thawed"


class AgentRefused(Failure):
    """The agent has answered, with an error."""


class Freezer(Protocol):
    """A way to a guest's file systems. Its methods raise Failure; AgentRefused for the agent's own word."""

    #: What an administrator does where nothing else helps: `Thaw it by hand: …`.
    by_hand: str

    def reach(self, cancel: Cancel) -> None:
        """Find whoever freezes. Nothing is asked of the guest yet: what fails here leaves nothing to thaw."""
        ...

    def freeze(self, cancel: Cancel) -> int:
        """Freeze, and return how many file systems; a stop that `cancel` asks for ends the wait."""
        ...

    def thaw(self) -> None:
        """Thaw: one attempt."""
        ...


class Freezing(NamedTuple):
    """What freezes: the module of its process, the options, and the same in this process."""

    module: str
    arguments: Sequence[str]
    freezer: Callable[[], Freezer]


@contextmanager
def frozen_by(freezing: Freezing, emit: Emit, cancel: Cancel) -> Iterator[None]:
    """The guest's file systems are frozen while the block runs. Raises Failure, Cancelled.

    Whatever happens in the block, a guest that could not be thawed is told.
    """
    with Children() as children:
        children.watch(cancel.fd)
        child = children.start("the guest's freezer", freezing.module, freezing.arguments)
        try:
            _await_frozen(children, child, cancel)
            yield
        except BaseException as error:
            # It must not be killed before it has thawed.
            trouble = _end(child, freezing, ignore).trouble
            if not trouble:
                raise
            if isinstance(error, Failure) and not isinstance(error, Cancelled):
                raise Failure(
                    f"{error}; {trouble}" if str(error) != trouble else trouble
                ) from error
            emit({"event": "notice", "text": trouble})
            raise
        end = _end(child, freezing, emit)
        if end.failure:
            raise Failure(end.failure)


def _await_frozen(children: Children, child: Child, cancel: Cancel) -> None:
    """Wait until the guest's file systems are frozen. Raises Failure, Cancelled."""
    limit_s = FIND_S + FREEZE_S + _THAW_LIMIT_S
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


def _end(child: Child, freezing: Freezing, emit: Emit) -> _End:
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
        _thaw(freezing.freezer())
    except Failure as error:
        return _End(f"{failure}; {error}", f"{failure}; {error}")
    return _End("", f"{failure}: the guest's file systems were thawed in its place")


def keep_frozen(freezer: Freezer, cancel: Cancel, emit: Emit) -> None:
    """Be the process that freezes: return when it has thawed. Raises Failure."""
    freezer.reach(cancel)
    started = time.monotonic()
    try:
        emit({"event": "frozen", "file_systems": freezer.freeze(cancel)})
        asked = bool(readable([cancel.fd], _FROZEN_S))
    finally:
        # Also when freezing has failed: it may have done so half-way.
        try:
            _thaw(freezer)
        except Failure:
            emit({"event": _NOT_THAWED})
            raise
    if not asked:
        raise Failure(
            f"the guest's file systems were frozen for {_FROZEN_S:.0f} s and the backup had not "
            "begun: they were thawed"
        )
    emit({"event": _THAWED, "seconds": round(time.monotonic() - started, 3)})


def _thaw(freezer: Freezer) -> None:
    """Thaw, trying again for a minute. Raises Failure when the guest cannot be thawed."""
    until, refusals = time.monotonic() + _THAW_FOR_S, 0
    while True:
        try:
            freezer.thaw()
            return
        except Failure as error:
            refusals += isinstance(error, AgentRefused)
            if refusals == _MOST_REFUSALS or time.monotonic() > until:
                raise Failure(
                    f"THE GUEST MAY STILL BE FROZEN: {error}. Thaw it by hand: {freezer.by_hand}"
                ) from error
        time.sleep(_THAW_AGAIN_S)
