# SPDX-License-Identifier: Apache-2.0
"""Freezing a guest, and above all thawing it, against an agent that the test plays.

The real one, in a guest, is in test_guest_agent.py.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine import LIMIT_S
from tests.qemu.agent import be_killed_while_frozen
from vmapipe.control.qemu.freezing import GuestAgent, frozen
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Event, ignore


class Agent(threading.Thread):
    """What qemu-ga does, as far as a backup sees it; one client after the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self._frozen = False
        self.commands: list[str] = []
        self.thawed = threading.Event()
        #: Answers that are not as they should be, by command.
        self.answers: dict[str, Any] = {}
        #: A command that is never answered.
        self.silent = ""
        #: It has come.
        self.is_silent = threading.Event()
        #: What an earlier client has left in the channel.
        self.left_over = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def is_frozen(self) -> bool:
        return self._frozen

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                client.sendall(self.left_over)
                for line in client.makefile("rb"):
                    self._do(client, line)

    def _do(self, client: socket.socket, line: bytes) -> None:
        request = json.loads(line.rpartition(b"\xff")[2])
        command = request["execute"]
        self.commands.append(command)
        answer: dict[str, Any] = {"return": 1}
        prefix = b""
        if command == "guest-sync-delimited":
            answer, prefix = {"return": request["arguments"]["id"]}, b"\xff"
        if command == self.silent:
            self.is_silent.set()
            return
        if command == "guest-fsfreeze-freeze":
            self._frozen = True
        if command == "guest-fsfreeze-thaw" and command not in self.answers:
            self._frozen = False
            self.thawed.set()
        client.sendall(prefix + json.dumps(self.answers.get(command, answer)).encode() + b"\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join(LIMIT_S)
        self._listener.close()


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
        pytest.raises(Failure, match="is qemu-guest-agent running in the guest"),
        frozen(str(tmp_path / "none.sock"), ignore, cancel),
    ):
        pytest.fail("the block must not run")


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
