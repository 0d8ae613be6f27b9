# SPDX-License-Identifier: Apache-2.0
"""Children that report, fail, hang and lose their parents."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vmapipe.runtime import children as module
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.events import Event, LineSplitter, encode_line
from vmapipe.runtime.orders import speed_order

PROGRAM = "tests.runtime.child_program"
LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture(params=[False, True], ids=["exec", "fork"])
def fork(request: pytest.FixtureRequest) -> bool:
    """Both ways to start a child; with threads of an earlier test both are the first."""
    return bool(request.param)


def events_until_end(children: Children) -> list[Event]:
    seen: list[Event] = []
    deadline = time.monotonic() + LIMIT_S
    while any(child.running for child in children.all):
        assert time.monotonic() < deadline
        seen += [event for _, event in children.wait(1.0) if event is not None]
    return seen


def wait_for(children: Children, name: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for _, event in children.wait(1.0):
            if event is not None and event["event"] == name:
                return
    pytest.fail(f"no event {name}")


def test_a_child_that_ends_well_has_no_verdict_and_its_usage_is_known(fork: bool) -> None:
    with Children(fork=fork) as children:
        child = children.start("it", PROGRAM, ["ends"])
        assert [event["event"] for event in events_until_end(children)] == ["started"]
    assert child.exit_code == 0
    assert child.verdict() == ""
    assert child.peak_rss_bytes > 1 << 20
    assert child.cpu_s > 0


@pytest.mark.parametrize(
    ("what", "verdict"),
    [("fails", "the disk is on fire"), ("os-error", "/nonexistent/file: No such file")],
)
def test_a_childs_failure_comes_as_its_own_words(fork: bool, what: str, verdict: str) -> None:
    with Children(fork=fork) as children:
        child = children.start("it", PROGRAM, [what])
        events_until_end(children)
    assert child.exit_code == 1
    assert child.verdict().startswith(verdict)


def test_a_child_that_is_killed_is_reported_with_the_signal(fork: bool) -> None:
    with Children(fork=fork) as children:
        child = children.start("the producer of 'a'", PROGRAM, ["waits"])
        wait_for(children, "started")
        child.send_signal(signal.SIGKILL)
        events_until_end(children)
    assert child.verdict() == "the producer of 'a' was killed by SIGKILL"


def test_leaving_the_block_ends_a_child_that_waits(fork: bool) -> None:
    with Children(fork=fork) as children:
        child = children.start("it", PROGRAM, ["waits"])
        wait_for(children, "started")
    assert child.exit_code == 128 + signal.SIGTERM


def test_leaving_the_block_kills_a_child_that_does_not_listen(
    fork: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.2)
    with Children(fork=fork) as children:
        child = children.start("it", PROGRAM, ["is-stuck"])
        wait_for(children, "stuck")
    assert child.exit_code == -signal.SIGKILL


def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from vmapipe.runtime.children import Child\n"
            f"child = Child('it', {PROGRAM!r}, ['waits'])\n"
            "child.socket.setblocking(True); child.read_events()\n"
            "print(child.pid, flush=True); input()",
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    assert parent.stdout
    assert parent.stdin
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    try:
        orphan.wait(timeout=LIMIT_S)
    except psutil.TimeoutExpired:
        orphan.kill()
        pytest.fail("the child outlived its parent")
    finally:
        parent.stdout.close()
        parent.stdin.close()


def test_a_child_that_ends_at_once_is_not_missed(fork: bool) -> None:
    child = Child("it", PROGRAM, ["ends"], fork=fork)
    try:
        assert child.reap(LIMIT_S)
        assert child.exit_code == 0
    finally:
        child.socket.close()


def test_events_survive_any_cut_of_the_stream() -> None:
    events: list[Event] = [{"event": "a", "n": 1}, {"event": "b", "text": "ü\n"}]
    stream = b"".join(map(encode_line, events))
    for cut in range(len(stream) + 1):
        splitter = LineSplitter()
        assert splitter.feed(stream[:cut]) + splitter.feed(stream[cut:]) == events


def test_no_descriptor_of_one_child_reaches_another(fork: bool) -> None:
    with Children(fork=fork) as children:
        children.start("one", PROGRAM, ["waits"])
        wait_for(children, "started")
        two = children.start("two", PROGRAM, ["waits"])
        # From then on it opens and closes nothing.
        wait_for(children, "started")
        sockets = [
            link
            for link in (
                os.readlink(f"/proc/{two.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{two.pid}/fd")
            )
            if link.startswith("socket:")
        ]
        # Its end of the pair to the parent, and the pair of its Cancel.
        assert len(sockets) <= 3
    assert isinstance(two.socket, socket.socket)


def test_what_a_parent_orders_reaches_a_child_that_works() -> None:
    with Children() as children:
        child = children.start("it", PROGRAM, ["obeys"])
        wait_for(children, "started")
        for speed in (5, 0):
            child.tell(speed_order(speed))
        seen = events_until_end(children)
    assert [event["speed"] for event in seen if event["event"] == "obeyed"] == [5, 0]
    assert child.exit_code == 0


def test_an_order_to_a_child_that_has_ended_is_no_error() -> None:
    with Children() as children:
        child = children.start("it", PROGRAM, ["ends"])
        events_until_end(children)
        child.tell(speed_order(1))
