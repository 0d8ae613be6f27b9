# SPDX-License-Identifier: Apache-2.0
"""Commands run in copies of a process that is made before any test is collected.

Thousands of collected tests are hundreds of megabytes, and each fork of a process that holds them takes
some 40 ms of CPU time; so do the forks of the command itself. This process stays small, and has Python and
the commands' modules loaded already. When pytest has ended, it kills what the tests have left.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

# The exit code of a command whose own error reached nobody: none of ours ends with it.
_BROKEN = 99
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)
# Three standard streams, a request, a way back, and what a test lets be inherited.
_MOST_FDS = 64
# How the copy ended is heard a moment after its own limit.
_LATE_S = 20.0
#: Every program that a test starts inherits this variable, and so do the programs that those start.
RUN_VARIABLE = "VMAPIPE_TEST_RUN"
# Killed processes are gone within milliseconds; while they are found, they may have started others.
_KILL_S = 10.0
_KILL_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


class _Command(NamedTuple):
    """What is run, as JSON. `module` has the entry `main`; `loads` is imported before the fork, once."""

    module: str
    loads: str
    words: list[str]
    limit_s: int
    cwd: str
    env: Mapping[str, str]
    umask: int
    #: Soft and hard, in the order of _LIMITS.
    limits: list[tuple[int, int]]
    #: The numbers that the descriptors have which come with it.
    fds: list[int]


class Copies:
    """The process that is copied: a child of this one, which ends with it.

    `run_id`: the value of RUN_VARIABLE in what the tests start.
    """

    def __init__(self) -> None:
        # That of pytest-xdist's workers begins with that of the process that has started them: when
        # that one is killed, all of theirs has to end, also where they cannot do it any more.
        self.run_id = f"{os.environ.get(RUN_VARIABLE, '')}/{uuid.uuid4()}"
        os.environ[RUN_VARIABLE] = self.run_id
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                self._requests.detach()
                _serve(theirs)

    def run(
        self,
        module: str,
        loads: str,
        words: Sequence[str],
        fds: Sequence[int],
        limit_s: int,
        cwd: str,
        env: Mapping[str, str],
        as_patched: bool = False,
    ) -> int:
        """Run a command with `fds` as its standard streams; return its exit code, -N for a signal.

        All else it inherits as a program would: limits, umask, descriptors that are made for it.
        `as_patched`: with the modules as the test has changed them, in a copy of this process.
        """
        kept = [fd for fd in _open_fds() if fd > 2 and _is_inheritable(fd)]
        umask = os.umask(0o77)
        os.umask(umask)
        limits = [resource.getrlimit(which) for which in _LIMITS]
        command = _Command(
            module, loads, [*words], limit_s, cwd, env, umask, limits, [0, 1, 2, *kept]
        )
        if as_patched:
            return _end_of(command, [*fds, *kept])
        ours, theirs = socket.socketpair()
        request = os.memfd_create("command")
        with ours, theirs, open(request, "wb") as file:
            file.write(json.dumps(command).encode())
            file.flush()
            socket.send_fds(self._requests, [b"."], [request, theirs.fileno(), *fds, *kept])
            theirs.close()
            ours.settimeout(limit_s + _LATE_S)
            said = ours.recv(16)
        if not said:
            raise RuntimeError("the process whose copies run the commands has ended")
        return int(said)

    def close(self) -> None:
        """End it, when no copy runs any more."""
        self._requests.close()
        os.waitpid(self.pid, 0)


def pids_of_run(run_id: str) -> Iterator[int]:
    """Yield the processes that a run, or a run within it, has started, and that still live."""
    run = f"{RUN_VARIABLE}={run_id}".encode()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        # Those of other users, and those that end just now.
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            words = file.read().split(b"\0")
            if any(word == run or word.startswith(run + b"/") for word in words):
                yield int(name)


def _end_of(command: _Command, fds: list[int]) -> int:
    """Run it in a copy of this process."""
    importlib.import_module(command.loads)
    pid = os.fork()
    if pid == 0:
        _be(command, fds)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _open_fds() -> list[int]:
    listed = map(int, os.listdir("/proc/self/fd"))
    return [fd for fd in listed if _flags(fd) is not None]  # not that of the listing


def _is_inheritable(fd: int) -> bool:
    flags = _flags(fd)
    return flags is not None and not flags & fcntl.FD_CLOEXEC


def _flags(fd: int) -> int | None:
    """None: it is closed, perhaps by another thread just now."""
    with suppress(OSError):
        return fcntl.fcntl(fd, fcntl.F_GETFD)
    return None


def _serve(requests: socket.socket) -> NoReturn:
    """Fork for each request, and say how the copy has ended; until the parent has ended.

    Then end what it has left: when it was killed, or did not come to the end of its fixtures.
    """
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        for fd in _open_fds():
            if fd > 2 and fd != requests.fileno():
                os.close(fd)
        # As a program has it: what pytest makes errors of is for the tests.
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        _fork_for_each(requests)
        _kill_run(os.environ[RUN_VARIABLE])
    except BaseException:  # noqa: BLE001  nothing of pytest's may go on here
        traceback.print_exc()
    os._exit(0)


def _send_at_parents_end(number: signal.Signals) -> None:
    """Have the kernel send this signal when the parent has ended (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _kill_run(run_id: str) -> None:
    until = time.monotonic() + _KILL_S
    while (pids := [*pids_of_run(run_id)]) and time.monotonic() < until:
        for pid in pids:
            with suppress(OSError):  # it has just ended, or is another user's
                os.kill(pid, signal.SIGKILL)
        time.sleep(_KILL_POLL_S)


def _fork_for_each(requests: socket.socket) -> None:
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    # A terminal's Ctrl-C is pytest's, and we end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    # Beside the end of the socket, which a process that was forked may hold open.
    _send_at_parents_end(signal.SIGTERM)
    replies: dict[int, int] = {}
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if wake.fileno() in ready:
            if signal.SIGTERM in wake.recv(4096):
                return
            _tell_ends(replies)
        if requests.fileno() in ready:
            said, fds, _, _ = socket.recv_fds(requests, 1, _MOST_FDS)
            if not said:
                return
            request, reply, *given = fds
            pid = _forked_for(request, given, (requests, wake, woken))
            replies[pid] = reply
            for fd in (request, *given):
                os.close(fd)


def _tell_ends(replies: dict[int, int]) -> None:
    while replies:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        reply = replies.pop(pid)
        with suppress(OSError):  # nobody waits any more
            os.write(reply, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(reply)


def _forked_for(request: int, given: list[int], ours: Sequence[socket.socket]) -> int:
    """Return the copy's process number; it keeps nothing of `ours`."""
    with open(request, "rb", closefd=False) as file:
        file.seek(0)
        command = _Command(*json.loads(file.read()))
    importlib.import_module(command.module)
    importlib.import_module(command.loads)
    # The copies' collectors need not look through what they share.
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        for end in ours:
            end.detach()
        _be(command, given)
    return pid


def _be(command: _Command, given: list[int]) -> NoReturn:
    """Become the command, as a program that has just been started."""
    status = _BROKEN
    try:
        _send_at_parents_end(signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(command.limit_s)
        _place(given, command.fds)
        os.environ.clear()
        os.environ.update(command.env)
        os.chdir(command.cwd)
        os.umask(command.umask)
        for which, limits in zip(_LIMITS, command.limits, strict=True):
            resource.setrlimit(which, (limits[0], limits[1]))
        # What pytest has put in their places is of its own.
        sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
        try:
            status = sys.modules[command.module].main(command.words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else _BROKEN
        sys.stdout.flush()
    finally:
        # Whatever it was: nothing of pytest's may go on in the copy.
        if status == _BROKEN:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


def _place(given: list[int], numbers: list[int]) -> None:
    """Give each descriptor its number, and close all others."""
    beyond = max(numbers) + 1
    apart = [fcntl.fcntl(fd, fcntl.F_DUPFD, beyond) for fd in given]
    for fd, number in zip(apart, numbers, strict=True):
        os.dup2(fd, number)
    for fd in _open_fds():
        if fd not in numbers:
            os.close(fd)
