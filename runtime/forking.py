# SPDX-License-Identifier: Apache-2.0
"""A child of ours as a copy of this process: ready in milliseconds, its modules imported already.

Why, and when not: docs/decisions/0012-forked-children.md.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from vmapipe.runtime.process import leave

# What a process of ours handles; the copy starts without its parent's handlers.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def can_fork() -> bool:
    """Whether a copy would be whole: with threads, Python's or a library's, it would lack them."""
    return len(os.listdir("/proc/self/task")) == 1


def fork_module(module: str, args: Sequence[str], fds: Collection[int]) -> int:
    """Run `module.main(args)` in a copy of this process; return its pid.

    Of all descriptors it keeps `fds`, standard output and standard error;
    standard input only if 0 is among `fds`.
    """
    # Here and not in the copy: the next copy has it, too.
    main = importlib.import_module(module).main
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
    """In the copy. It never returns: what lies below on the stack is the parent's."""

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

    leave(work)


def _close_all_but(fds: Collection[int]) -> None:
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in fds:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)


def _name(words: Sequence[str]) -> None:
    """What `ps` shows: in place of our command line, and no longer than that was."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/stat", "rb") as status:
            # proc(5); the fields behind the name in brackets, which may hold anything.
            fields = status.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
        text = b"\0".join(os.fsencode(word) for word in words)[: end - start - 1]
        fd = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, text.ljust(end - start, b"\0"), start)
        finally:
            os.close(fd)
