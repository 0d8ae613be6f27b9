# SPDX-License-Identifier: Apache-2.0
"""Copies of a process: what they keep, what they leave behind, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 60.0
# A parent of its own for each test: pytest's process may have threads, and much open.
PARENT = """
import os, signal, sys, threading, types
from vmapipe.runtime.forking import can_fork, fork_module

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
