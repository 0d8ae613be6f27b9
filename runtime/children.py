# SPDX-License-Identifier: Apache-2.0
"""Child processes: starting them, receiving their events, and leaving none behind.

A child is a program of its own, or a copy of this process by fork(2): ready in milliseconds,
its modules imported already. Why, and when not: docs/decisions/0012-forked-children.md.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Collection, Sequence
from typing import NoReturn

from vmapipe.runtime.events import Command, Event, LineSplitter, encode_line
from vmapipe.runtime.logs import DEBUG, Trace, shown
from vmapipe.runtime.process import leave
from vmapipe.runtime.syscalls import readable

_log = Trace(__name__)

# What a process of ours handles; the copy starts without its parent's handlers.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def can_fork() -> bool:
    """Return whether a copy would be complete: it would lack all threads but this one."""
    return len(os.listdir("/proc/self/task")) == 1


def fork_module(module: str, args: Sequence[str], fds: Collection[int]) -> int:
    """Run `module.main(args)` in a copy of this process; return its pid.

    If the module has a function `prepare`, that is called with the arguments before.
    Of all descriptors it keeps `fds`, standard output and standard error;
    standard input only if 0 is among `fds`.
    """
    # Here and not in the copy: the next copy has it, too.
    imported = importlib.import_module(module)
    main = imported.main
    if prepare := getattr(imported, "prepare", None):
        prepare(args)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or both of us would write what waits in it
    # A signal that came in between would run our handlers in the copy.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
        if not pid:
            _become(module, main, args, fds, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _become(
    module: str,
    main: object,
    args: Sequence[str],
    fds: Collection[int],
    mask: Collection[signal.Signals | int],
) -> NoReturn:
    """Run in the copy; never returns, because the rest of the stack belongs to the parent."""

    def work() -> object:
        # Nothing of the parent's is ever collected here: its sockets and files
        # would close numbers that are ours by then.
        gc.freeze()
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _close_all_but({1, 2, *fds})
        if 0 not in fds:
            os.open(os.devnull, os.O_RDONLY)  # the lowest free number: 0
        _name([module, *args])
        return main(args) if callable(main) else 1

    leave(module, work)


def _close_all_but(fds: Collection[int]) -> None:
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in fds:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)


def _name(argv: Sequence[str]) -> None:
    """Change what `ps` shows: our command line is overwritten, at most up to its length."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/stat", "rb") as status:
            # proc(5); the fields behind the name in brackets, which may hold anything.
            fields = status.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
        text = b"\0".join(os.fsencode(word) for word in argv)[: end - start - 1]
        fd = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, text.ljust(end - start, b"\0"), start)
        finally:
            os.close(fd)


# A child that was told to stop removes its partial file and ends: milliseconds
# on a healthy machine. After this it is killed.
STOP_S = 10.0
_RECEIVE_BYTES = 1 << 16


class Child:
    """A child process, `python -m MODULE ARGS --parent-fd N`.

    `fork`: as a copy of this process if that can be, else with an interpreter of its own.
    """

    def __init__(
        self,
        name: str,
        module: str,
        args: Sequence[str],
        pass_fds: Sequence[int] = (),
        *,
        fork: bool = False,
    ) -> None:
        self.name = name
        self.exit_code: int | None = None
        self.error = ""
        self.peak_rss_bytes = 0
        self.cpu_s = 0.0
        self._splitter = LineSplitter()
        self.socket, theirs = socket.socketpair()
        self._program: subprocess.Popen[bytes] | None = None
        with theirs:
            argv = [*args, "--parent-fd", str(theirs.fileno())]
            fds = [*pass_fds, theirs.fileno()]
            if fork and can_fork():
                self.pid = fork_module(module, argv, fds)
            else:
                # Imported here: where all are copies nobody needs it.
                import subprocess

                self._program = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, *argv],
                    pass_fds=fds,
                    stdin=None if 0 in fds else subprocess.DEVNULL,
                )
                self.pid = self._program.pid
        self._pidfd = os.pidfd_open(self.pid)
        self.socket.setblocking(False)

    @property
    def running(self) -> bool:
        return self.exit_code is None

    def read_events(self) -> tuple[list[Event], bool]:
        """Return its new events, and whether it has closed its end (it is ending)."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return [], False
        except OSError:
            data = b""
        if not data:
            return [], True
        # Taken for what it should be: the child is this program.
        events: list[Event] = self._splitter.feed(data)
        for event in events:
            if event.get("event") == "error" and not self.error:
                self.error = str(event.get("text", ""))
        return events, False

    def tell(self, order: Command) -> None:
        """Send a command to the child; dropped if it has exited or its buffer is full."""
        if _log.has(DEBUG):
            _log.debug("command to child %d %s", self.pid, shown(order))
        with contextlib.suppress(OSError):
            self.socket.send(encode_line(order))

    def reap(self, timeout_s: float) -> bool:
        """Wait for its end; False when it has not come in time."""
        if self.exit_code is not None:
            return True
        if not readable([self._pidfd], timeout_s):
            return False
        # wait4, because it alone tells the child's peak memory.
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self._pidfd)
        self.exit_code = os.waitstatus_to_exitcode(status)
        if self._program is not None:
            self._program.returncode = self.exit_code
        self.peak_rss_bytes = usage.ru_maxrss * 1024
        self.cpu_s = usage.ru_utime + usage.ru_stime
        self.socket.close()
        return True

    def send_signal(self, signum: int) -> None:
        """Send a signal; a child that has ended is left alone."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def verdict(self) -> str:
        """Return why it failed as a sentence; empty: it ended well."""
        if self.exit_code == 0:
            return ""
        if self.error:
            return self.error
        if self.exit_code is not None and self.exit_code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.exit_code).name}"
        return f"{self.name} ended with exit code {self.exit_code}"


class Children:
    """The children of one job: their events as they come, and an end to all of them.

    `fork`: see Child.
    """

    def __init__(self, *, fork: bool = False) -> None:
        self._fork = fork
        self.all: list[Child] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._selector.close()

    def start(
        self, name: str, module: str, args: Sequence[str], pass_fds: Sequence[int] = ()
    ) -> Child:
        child = Child(name, module, args, pass_fds, fork=self._fork)
        self.all.append(child)
        self._selector.register(child.socket, selectors.EVENT_READ, child)
        return child

    @property
    def fd(self) -> int:
        """A descriptor that is readable when `wait` would return something."""
        return self._selector.fileno()

    def watch(self, fd: int) -> None:
        """End `wait` also when `fd` (a Cancel's) becomes readable; -1: nothing to watch."""
        if fd >= 0:
            self._selector.register(fd, selectors.EVENT_READ, None)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`: a descriptor whose other end is gone would stay readable."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def pids(self) -> list[tuple[str, int]]:
        """Return (name, pid) of each running child."""
        return [(child.name, child.pid) for child in self.all if child.running]

    def wait(self, timeout_s: float) -> list[tuple[Child, Event | None]]:
        """Return what happened within `timeout_s`: (child, event), or (child, None) for its end."""
        happened: list[tuple[Child, Event | None]] = []
        for key, _ in self._selector.select(timeout_s):
            child = key.data
            if child is None:
                continue
            events, ending = child.read_events()
            happened += [(child, event) for event in events]
            if ending:
                self._selector.unregister(child.socket)
                if not child.reap(STOP_S):
                    child.send_signal(signal.SIGKILL)
                    child.reap(STOP_S)
                happened.append((child, None))
        return happened

    def stop(self) -> None:
        """Terminate all running children (ask, wait, kill); returns when none is left."""
        running = [child for child in self.all if child.running]
        for child in running:
            self._signal_tree(child, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for child in running:
            if not child.reap(max(0.0, deadline - time.monotonic())):
                self._signal_tree(child, signal.SIGKILL)
                child.reap(STOP_S)

    @staticmethod
    def _signal_tree(child: Child, signum: int) -> None:
        """Signal the child, and with SIGKILL also what it started (an exec: command)."""
        # Imported here: a backup that ends well starts sooner without.
        import psutil

        try:
            process = psutil.Process(child.pid)
            family = process.children(recursive=True) if signum == signal.SIGKILL else []
            for member in [process, *family]:
                member.send_signal(signum)
        except psutil.Error:
            pass  # it has ended meanwhile
