# SPDX-License-Identifier: Apache-2.0
"""The checks that no test leaves anything behind do see what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from tests import leaks
from tests.copies import RUN_VARIABLE
from tests.machine import eventually

_SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# Ends at once and leaves its own child behind.
_ORPHAN_MAKER = [
    sys.executable,
    "-c",
    "from subprocess import *; import sys; print(Popen(sys.argv[1:], stdout=DEVNULL).pid)",
    *_SLEEP,
]


def test_a_child_process_is_seen_until_it_was_waited_for() -> None:
    with subprocess.Popen(_SLEEP) as child:
        assert [found.pid for found in leaks.child_processes()] == [child.pid]
        leaks.kill(leaks.child_processes())
    assert leaks.child_processes() == set()


def test_a_child_that_ended_but_was_not_waited_for_is_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert [found.pid for found in leaks.child_processes()] == [child.pid]
    child.wait()


def test_an_orphan_is_found_with_the_name_of_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "a run of its own")
    output = subprocess.run(_ORPHAN_MAKER, check=True, stdout=subprocess.PIPE, text=True).stdout
    orphan = psutil.Process(int(output))
    found = leaks.processes_of_run("a run of its own")
    leaks.kill(found)
    assert list(found) == [orphan]
    assert "test_an_orphan_is_found" in found[orphan]


# A server of its own session; a command in a copy, which waits for its standard input; a copy of pytest
# itself holds pytest's end of the socket open.
_KILLED = """
import os, signal, subprocess, sys, threading
from tests.machine import run
server = subprocess.Popen(["sleep", "600"], start_new_session=True)
fork = os.fork() or signal.pause()
pipe, _ = os.pipe()
threading.Thread(target=run, args=("verify", "-"), kwargs={"stdin": pipe}, daemon=True).start()
print(os.getpid(), server.pid, fork, flush=True)
signal.pause()
"""


def test_what_a_killed_pytest_has_started_ends_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", _KILLED], stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        pids = [*map(int, killed.stdout.readline().split())]
        killing = psutil.Process(killed.pid)
        # The process that is copied, its copy, the server and the fork.
        assert eventually(lambda: len(killing.children(recursive=True)) >= 4)
        left = killing.children(recursive=True)
        fork = psutil.Process(pids[2])
        killed.kill()
        killed.wait()
    try:
        assert eventually(lambda: not any(map(_lives, set(left) - {fork})))
        assert pids[1] in {process.pid for process in left}
    finally:
        fork.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_open_descriptor_is_seen_until_it_is_closed() -> None:
    before = leaks.open_descriptors()
    with open(os.devnull, "rb") as file:
        assert leaks.new_descriptors(before) == {file.fileno(): os.devnull}
    assert leaks.new_descriptors(before) == {}


def test_what_goes_away_in_time_is_no_leak() -> None:
    finds = iter([["a"], ["a"], []])
    assert leaks.left_after_grace(lambda: next(finds)) == []


def test_what_stays_is_a_leak_when_the_grace_period_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_S", 0.1)
    assert leaks.left_after_grace(lambda: ["a"]) == ["a"]
