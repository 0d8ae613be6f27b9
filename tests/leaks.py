# SPDX-License-Identifier: Apache-2.0
"""What a test left behind in this process: child processes and file descriptors.

A leak is what was not there before the test and is still there some time
after it. The time is for what ends on its own: a child that notices that its
parent has gone, or a library's thread that closes its descriptors.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Collection
from types import FunctionType, ModuleType
from typing import TypeVar

import psutil

from tests.copies import pids_of_run
from tests.machine import COPIES

Left = TypeVar("Left", bound=Collection[object])

# A tidy test never waits; a leaking one waits this long once and then fails.
GRACE_S = 30.0
_POLL_S = 0.02


def child_processes() -> set[psutil.Process]:
    """All descendants, and children that have ended but were not waited for: those of tests."""
    # Most tests have none. The kernel says so in microseconds, where a search through all
    # processes of the machine takes milliseconds, twice a test.
    if not (_has_children("self", COPIES.pid) or _has_children(str(COPIES.pid))):
        return set()
    found = psutil.Process().children(recursive=True)
    return {process for process in found if process.pid != COPIES.pid}


def children() -> list[psutil.Process]:
    """The children of this process which tests have started."""
    return [child for child in psutil.Process().children() if child.pid != COPIES.pid]


def _has_children(process: str, known_pid: int = 0) -> bool:
    """Whether a process has children, beside a known one."""
    for task in os.listdir(f"/proc/{process}/task"):
        try:
            with open(f"/proc/{process}/task/{task}/children", "rb") as children:
                if {*map(int, children.read().split())} - {known_pid}:
                    return True
        except FileNotFoundError:
            # A thread that ended just now, or a kernel without this file.
            if not os.path.exists("/proc/thread-self/children"):
                return True
    return False


def processes_of_run(run: str) -> dict[psutil.Process, str]:
    """Processes that the tests of this run started and that still live, with the test's name.

    Here too are the orphans, which are nobody's children any more.
    """
    found = {}
    for pid in pids_of_run(run):
        with contextlib.suppress(psutil.Error):  # it ends just now
            process = psutil.Process(pid)
            found[process] = process.environ().get("PYTEST_CURRENT_TEST", "a test")
    return found


def describe_process(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline()) or process.name()
        return f"process {process.pid} ({process.status()}): {words}"
    except psutil.NoSuchProcess:
        return f"process {process.pid}: gone"
    except psutil.Error as error:
        return f"process {process.pid}: {error}"


def kill(processes: Collection[psutil.Process]) -> None:
    """End leaked processes for good, so that they do not disturb the tests that follow."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    left_after_grace(lambda: [process for process in processes if not _has_ended(process)])


def open_descriptors() -> dict[int, str]:
    """What every open descriptor of this process leads to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def new_descriptors(before: dict[int, str]) -> dict[int, str]:
    """Open now and not before; a number that leads elsewhere now is new."""
    return {
        number: target
        for number, target in open_descriptors().items()
        if before.get(number) != target and not _kept_by_a_library(target)
    }


def left_after_grace(find: Callable[[], Left]) -> Left:
    """What `find` finds; while it finds something, look again until the grace period ends."""
    deadline_s = time.monotonic() + GRACE_S
    while (left := find()) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        # An object that only waits for the collector is no leak.
        gc.collect()
    return left


def _has_ended(process: psutil.Process) -> bool:
    """Ended, and waited for as far as that is our part: an orphan's zombie is not ours."""
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(timeout=0)
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kept_by_a_library(target: str) -> bool:
    """Opened once on first use, then kept: the source of random numbers."""
    return target == "/dev/urandom"


def held_bytes_objects(root: object) -> set[bytes]:
    """All that an object holds of `bytes`, at whatever depth: what it remembers of its peers' names.

    Modules, classes and functions are not looked into.
    """
    seen, waiting, found = {id(root)}, [root], set[bytes]()
    while waiting:
        for one in gc.get_referents(waiting.pop()):
            if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
                continue
            seen.add(id(one))
            waiting.append(one)
            if isinstance(one, bytes):
                found.add(one)
    return found
