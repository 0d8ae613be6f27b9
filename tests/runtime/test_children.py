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
from typing import Any

import psutil
import pytest

from vmapipe.runtime import children as module
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.events import LineSplitter, encode_line, speed_command

PROGRAM = "tests.runtime.child_program"
LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture(params=[False, True], ids=["exec", "fork"])
def fork(request: pytest.FixtureRequest) -> bool:
    """Both ways to start a child; with threads of an earlier test both are the first."""
    return bool(request.param)


def events_until_end(children: Children) -> list[Any]:
    seen: list[Any] = []
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
    events: list[dict[str, Any]] = [{"event": "a", "n": 1}, {"event": "b", "text": "ü\n"}]
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
            child.tell(speed_command(speed))
        seen = events_until_end(children)
    assert [event["speed"] for event in seen if event["event"] == "obeyed"] == [5, 0]
    assert child.exit_code == 0


def test_an_order_to_a_child_that_has_ended_is_no_error() -> None:
    with Children() as children:
        child = children.start("it", PROGRAM, ["ends"])
        events_until_end(children)
        child.tell(speed_command(1))


# A parent of its own for each test: pytest's process may have threads, and much open.
PARENT = """
import os, signal, sys, threading, types
from vmapipe.runtime.children import can_fork, fork_module

def run(work, *fds, words=("--word",)):
    module = sys.modules["a_module"] = types.ModuleType("a_module")
    module.main = work
    pid = fork_module("a_module", list(words), fds)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def parent(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PARENT + code],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=Path(__file__).parents[2],
    )


def output_of(code: str) -> str:
    done = parent(code)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("lambda words: 0", 0),
        ("lambda words: 4", 4),
        ("lambda words: sys.exit(2)", 2),
        ("lambda words: sys.exit()", 0),
        ("lambda words: os.kill(os.getpid(), signal.SIGTERM)", -15),
    ],
)
def test_a_copy_ends_with_its_own_code(work: str, code: int) -> None:
    assert output_of(f"print(run({work}))") == f"{code}\n"


def test_a_defect_in_a_copy_is_shown_and_ends_only_the_copy() -> None:
    done = parent("print(run(lambda words: 1 // 0))")
    assert done.stdout == "1\n"
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


def test_a_copy_has_no_descriptors_but_those_it_was_given() -> None:
    code = """
given, kept = os.pipe()
def work(words):
    leads = {int(n): os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")[:-1]}
    assert leads.pop(0) == "/dev/null"
    assert sorted(leads) == [1, 2, given], leads
    return 0
print(run(work, given))
"""
    assert output_of(code) == "0\n"


def test_what_waits_to_be_printed_is_printed_once() -> None:
    assert output_of('print("once")\nrun(lambda words: print("copy") or 0)') == "once\ncopy\n"


def test_a_signal_for_a_copy_does_not_reach_its_parents_handler() -> None:
    code = """
signal.signal(signal.SIGTERM, lambda *a: print("the parent's handler"))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
def work(words):
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.kill(os.getpid(), signal.SIGTERM)
print(run(work))
"""
    assert output_of(code) == "-15\n"


def test_a_copy_is_known_by_its_own_name() -> None:
    code = """
def work(words):
    print(open("/proc/self/cmdline").read().rstrip("\\0").split("\\0"))
    return 0
run(work, words=["--disk=a b", "--parent-fd", "7"])
"""
    assert output_of(code) == "['a_module', '--disk=a b', '--parent-fd', '7']\n"


def test_a_process_with_another_thread_is_not_copied() -> None:
    code = """
print(can_fork())
end = threading.Event()
thread = threading.Thread(target=end.wait); thread.start()
print(can_fork()); end.set(); thread.join()
import zmq
context = zmq.Context(); socket = context.socket(zmq.DEALER)
print(can_fork())
context.destroy(linger=0)
"""
    assert output_of(code) == "True\nFalse\nFalse\n"


def test_the_processes_of_a_backup_are_copies_of_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(65536))
    words = ["backup", "--quiet", "--disk", str(disk), str(tmp_path / "vm.vma")]
    program = "from vmapipe.control.main import main; import os, subprocess\n"
    program += "subprocess.Popen = None  # nobody can be started with it\n"
    done = subprocess.run([sys.executable, "-c", program + f"raise SystemExit(main({words!r}))"])
    assert done.returncode == 0
