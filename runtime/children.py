# SPDX-License-Identifier: Apache-2.0
"""Starting child processes, hearing their events, and leaving none behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmapipe.runtime.events import Event, LineSplitter, encode_line
from vmapipe.runtime.forking import can_fork, fork_module
from vmapipe.runtime.waiting import readable

if TYPE_CHECKING:
    import subprocess

# A child that was told to stop removes its partial file and ends: milliseconds
# on a healthy machine. After this it is killed.
STOP_S = 10.0
_RECEIVE_BYTES = 1 << 16


class Child:
    """One process of ours, `python -m MODULE ARGS --parent-fd N`.

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
            words = [*args, "--parent-fd", str(theirs.fileno())]
            fds = [*pass_fds, theirs.fileno()]
            if fork and can_fork():
                self.pid = fork_module(module, words, fds)
            else:
                # Imported here: a backup's children are copies.
                import subprocess

                self._program = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, *words],
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
        """What it said since, and whether it has closed its end (it is ending)."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return [], False
        except OSError:
            data = b""
        if not data:
            return [], True
        events = self._splitter.feed(data)
        for event in events:
            if event.get("event") == "error" and not self.error:
                self.error = str(event.get("text", ""))
        return events, False

    def tell(self, order: Event) -> None:
        """Down to the child. Lost where it has ended, or has not listened for thousands of them."""
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
        """Nothing happens to one that has ended."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def verdict(self) -> str:
        """Why it ended, in words, or an empty string when all was well."""
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
        """Readable when `wait` has something to tell, for those who wait for other things, too."""
        return self._selector.fileno()

    def watch(self, fd: int) -> None:
        """Also wake up when `fd` (a Cancel's) becomes readable; -1 is none."""
        if fd >= 0:
            self._selector.register(fd, selectors.EVENT_READ, None)

    def unwatch(self, fd: int) -> None:
        """Not any more, if it was: a descriptor whose other end is gone stays readable."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def pids(self) -> list[tuple[str, int]]:
        """Of those that run, each by its name."""
        return [(child.name, child.pid) for child in self.all if child.running]

    def wait(self, timeout_s: float) -> list[tuple[Child, Event | None]]:
        """What happened within `timeout_s`: (child, event), or (child, None) when one has ended."""
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
        """End all that still run: ask, wait, kill. Returns when none is left."""
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
        """The child itself, and with SIGKILL whatever it started (an exec: command)."""
        import psutil

        try:
            process = psutil.Process(child.pid)
            family = process.children(recursive=True) if signum == signal.SIGKILL else []
            for member in [process, *family]:
                member.send_signal(signum)
        except psutil.Error:
            pass  # it has ended meanwhile
