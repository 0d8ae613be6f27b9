# SPDX-License-Identifier: Apache-2.0
"""Freezing a guest, and above all thawing it, against an agent that the test plays.

The real one, in a guest, is in test_guest_agent.py.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.control.qemu.agent import be_killed_while_frozen
from tests.control.qemu.played_agent import Agent
from tests.control.qmp.hostile import Flood, hostile_qemu
from tests.machine import LIMIT_S
from vmapipe.control.qemu import guest_agent
from vmapipe.control.qemu.guest_agent import GuestAgent, frozen
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Event, ignore


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path / "agent.sock")
    agent.start()
    yield agent
    agent.close()


def begin_and_fail(agent: Agent) -> None:
    assert agent.is_frozen()
    raise Failure("the disk is full")


def test_the_guest_is_frozen_in_the_block_and_thawed_after_it(agent: Agent, cancel: Cancel) -> None:
    events: list[Event] = []
    with frozen(str(agent.path), events.append, cancel):
        assert agent.is_frozen()
    assert not agent.is_frozen()
    assert events[0]["event"] == "thawed"


def test_whatever_fails_in_the_block_the_guest_is_thawed(agent: Agent, cancel: Cancel) -> None:
    with pytest.raises(Failure, match="the disk is full"), frozen(str(agent.path), ignore, cancel):
        begin_and_fail(agent)
    assert agent.thawed.wait(LIMIT_S)
    assert not agent.is_frozen()


def test_a_coordinator_that_is_killed_leaves_no_guest_frozen(agent: Agent, cancel: Cancel) -> None:
    be_killed_while_frozen(agent.path)
    assert "guest-fsfreeze-freeze" in agent.commands
    assert agent.thawed.wait(LIMIT_S)


def test_an_agent_that_refuses_is_named_with_its_reason_and_thawed_all_the_same(
    agent: Agent, cancel: Cancel
) -> None:
    refusal = {"error": {"class": "GenericError", "desc": "no such thing"}}
    agent.answers["guest-fsfreeze-freeze"] = refusal
    with (
        pytest.raises(Failure, match="refuses guest-fsfreeze-freeze: no such thing"),
        frozen(str(agent.path), ignore, cancel),
    ):
        pytest.fail("the block must not run")
    assert agent.thawed.wait(LIMIT_S)


def test_a_freeze_that_takes_long_can_be_cancelled(agent: Agent, cancel: Cancel) -> None:
    agent.silent = "guest-fsfreeze-freeze"

    def cancel_in_the_middle() -> None:
        assert agent.is_silent.wait(LIMIT_S)
        cancel.ask("enough")

    canceller = threading.Thread(target=cancel_in_the_middle)
    canceller.start()
    with (
        pytest.raises(Cancelled),
        frozen(str(agent.path), ignore, cancel),
    ):
        pytest.fail("the block must not run")
    canceller.join()
    assert agent.thawed.wait(LIMIT_S)


def test_answers_to_an_earlier_client_are_passed_over(agent: Agent, cancel: Cancel) -> None:
    agent.left_over = b'{"return": 17}\n{"return": {"half": '
    with frozen(str(agent.path), ignore, cancel):
        assert agent.is_frozen()


def test_without_an_agent_the_message_says_what_to_do(tmp_path: Path, cancel: Cancel) -> None:
    with (
        pytest.raises(Failure, match="is qemu-guest-agent running in the guest") as caught,
        frozen(str(tmp_path / "none.sock"), ignore, cancel),
    ):
        pytest.fail("the block must not run")
    # Nobody was asked to freeze it, and it is not waited for somebody to thaw it.
    assert "MAY STILL BE FROZEN" not in str(caught.value)


def test_an_agent_that_is_busy_with_others_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen(0)
        other.connect(str(tmp_path / "agent.sock"))
        with pytest.raises(Failure, match="it serves one client at a time, and has others"):
            GuestAgent(str(tmp_path / "agent.sock"))


def test_a_guest_that_cannot_be_thawed_is_cried_out(agent: Agent, cancel: Cancel) -> None:
    agent.answers["guest-fsfreeze-thaw"] = {"error": {"class": "GenericError", "desc": "stuck"}}
    with (
        pytest.raises(Failure, match=r"THE GUEST MAY STILL BE FROZEN.*stuck.*Thaw it by hand"),
        frozen(str(agent.path), ignore, cancel),
    ):
        pass
    assert agent.commands.count("guest-fsfreeze-thaw") == 3


FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
REFUSAL = {"error": {"class": "GenericError", "desc": "stuck"}}
#: What an agent may answer in place of a number.
ODD = [
    b"[" * 100_000 + b"\n",
    b"[" * 100_000 + b"]" * 100_000 + b"\n",
    b'{"return": ' + b"[" * 10_000 + b"\n",
    b'{"return": ' + b"9" * 5000 + b"}\n",
    b'{"return": NaN}\n',
    b'{"return": "' + b"B" * (2 << 20) + b'"}\n',
    b"junk\n",
    b"\xff\xfe{}\n",
    b"{}\n",
    b'{"error": 5}\n',
    b'{"error": {"desc": 5}}\n',
]


@pytest.mark.parametrize(
    "answer",
    [*ODD, {"return": "x" * 900_000}, {"return": [1, 2]}],
    ids=lambda value: repr(value)[:30],
)
def test_whatever_an_agent_answers_to_the_freeze_the_guest_is_thawed_and_it_is_one_line(
    agent: Agent, cancel: Cancel, answer: Any
) -> None:
    agent.answers[FREEZE] = answer
    with (
        pytest.raises(Failure, match=f"its answer to {FREEZE} is not valid: ") as caught,
        frozen(str(agent.path), ignore, cancel),
    ):
        pytest.fail("the block must not run")
    assert agent.thawed.wait(LIMIT_S)
    assert not agent.is_frozen()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("answer", [*ODD, REFUSAL], ids=lambda value: repr(value)[:30])
def test_whatever_an_agent_answers_to_the_thaw_it_is_tried_again(
    agent: Agent, cancel: Cancel, answer: Any
) -> None:
    agent.answers[THAW], agent.odd_times[THAW] = answer, 2
    with frozen(str(agent.path), ignore, cancel):
        assert agent.is_frozen()
    assert not agent.is_frozen()
    assert agent.commands.count(THAW) == 3


def test_a_backup_that_cannot_begin_and_a_guest_that_cannot_be_thawed_are_both_told(
    agent: Agent, cancel: Cancel
) -> None:
    agent.answers[THAW] = REFUSAL
    with (
        pytest.raises(Failure, match=r"the disk is full; THE GUEST MAY STILL BE FROZEN.*stuck"),
        frozen(str(agent.path), ignore, cancel),
    ):
        begin_and_fail(agent)
    assert agent.commands.count(THAW) == 3


def test_a_freeze_and_a_thaw_that_are_both_refused_are_told_once(
    agent: Agent, cancel: Cancel
) -> None:
    agent.answers[FREEZE] = agent.answers[THAW] = REFUSAL
    with (
        pytest.raises(Failure, match="THE GUEST MAY STILL BE FROZEN") as caught,
        frozen(str(agent.path), ignore, cancel),
    ):
        pytest.fail("the block must not run")
    assert str(caught.value).count("FROZEN") == 1


def test_a_backup_that_is_cancelled_says_that_the_guest_may_be_frozen(
    agent: Agent, cancel: Cancel
) -> None:
    agent.answers[THAW] = REFUSAL
    told: list[Any] = []

    def stop() -> None:
        cancel.ask("enough")
        cancel.check()

    with pytest.raises(Cancelled), frozen(str(agent.path), told.append, cancel):
        stop()
    assert [each["event"] for each in told] == ["notice"]
    assert "THE GUEST MAY STILL BE FROZEN" in told[0]["text"]


def kill_the_freezer() -> None:
    (child,) = leaks.children()
    child.send_signal(signal.SIGKILL)


def test_a_freezer_that_is_killed_is_stood_in_for(agent: Agent, cancel: Cancel) -> None:
    text = "killed by SIGKILL: the guest's file systems were thawed"
    with pytest.raises(Failure, match=text), frozen(str(agent.path), ignore, cancel):
        kill_the_freezer()
    assert not agent.is_frozen()


def test_a_freezer_that_is_killed_is_stood_in_for_when_the_backup_fails_too(
    agent: Agent, cancel: Cancel
) -> None:
    def kill_and_fail() -> None:
        kill_the_freezer()
        begin_and_fail(agent)

    with pytest.raises(Failure, match="disk is full"), frozen(str(agent.path), ignore, cancel):
        kill_and_fail()
    assert not agent.is_frozen()


def test_a_killed_freezer_and_an_agent_that_refuses_are_cried_out(
    agent: Agent, cancel: Cancel
) -> None:
    agent.answers[THAW] = REFUSAL
    text = "killed by SIGKILL; THE GUEST MAY STILL BE FROZEN"
    with pytest.raises(Failure, match=text), frozen(str(agent.path), ignore, cancel):
        kill_the_freezer()


def test_what_an_agent_refuses_with_is_escaped_and_short(agent: Agent, cancel: Cancel) -> None:
    words = "\x1b[31mX\n\x07" + "A" * 900_000
    agent.answers[FREEZE] = {"error": {"class": "GenericError", "desc": words}}
    with (
        pytest.raises(Failure, match=r"refuses guest-fsfreeze-freeze: \\x1b\[31mX") as caught,
        frozen(str(agent.path), ignore, cancel),
    ):
        pytest.fail("the block must not run")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500
    assert agent.thawed.wait(LIMIT_S)


@pytest.mark.parametrize(
    "left_over",
    [
        b"junk\n" * 10,
        b'\xff{"return": 17}\n\xff{"return": {"half": ',
        b"[" * 100_000,
        b"x" * (3 << 20),
        b'\xff{"return": 17}\n' * 1000,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_whatever_an_earlier_client_has_left_is_passed_over(
    agent: Agent, cancel: Cancel, left_over: bytes
) -> None:
    agent.left_over = left_over
    with frozen(str(agent.path), ignore, cancel):
        assert agent.is_frozen()
    assert not agent.is_frozen()


def test_an_agent_that_floods_is_given_up_in_time_within_a_small_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_agent, "_SYNC_S", 0.5)
    for data in (b"{}\n" * 20_000, b"x" * 65536, b"\xff{", b'\xff{"return": 1}\n' * 5000):
        with (
            hostile_qemu(tmp_path / "a.sock", greeting=Flood(data)),
            pytest.raises(Failure, match="it does not answer; is qemu-guest-agent running"),
        ):
            GuestAgent(str(tmp_path / "a.sock"))
        os.unlink(tmp_path / "a.sock")


@pytest.mark.slow  # an agent has 30 s to freeze
def test_an_agent_that_takes_long_to_freeze_is_told_so_and_thawed_when_it_answers(
    agent: Agent, cancel: Cancel
) -> None:
    agent.silent = FREEZE
    with (
        pytest.raises(Failure, match=f"has not answered {FREEZE} within 30 s: the guest has much"),
        frozen(str(agent.path), ignore, cancel),
    ):
        pytest.fail("the block must not run")
    assert agent.thawed.wait(LIMIT_S)
