# SPDX-License-Identifier: Apache-2.0
"""Processes that compute digests of an archive's file without copying it: it is mapped.

A file that is cut, or cannot be read, while it is mapped kills who looks at it
(SIGBUS). So it is looked at in processes of their own, whose end is harmless:
what they leave undone is read and computed by whoever wants it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable, Sequence

from vmapipe.restore.archive.inputs import Wait
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.checks.digest import extent_digest, read_digest
from vmapipe.restore.errors import SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.forking import fork_module

# Offset and length; the answer is the digest, or as many bytes that are none.
_JOB = struct.Struct("=QI")
_DIGEST_BYTES = 16
_ANSWER_BYTES = 1 + _DIGEST_BYTES
_DONE, _FAILED = b"+", b"-" + bytes(_DIGEST_BYTES)
# Linux 5.14; Python names it from 3.13 on. Unlike a look, it fails with an error.
_MADV_POPULATE_READ = 22
# One that a disk holds up ends when the disk lets it go.
_END_WAIT_S = 2.0

Compute = Callable[[int, int], bytes]


class MappedHashers:
    """`count` processes. Answers are to be asked for in the order of the jobs.

    The process that makes it must have no threads (`can_fork`). `compute`
    (offset, length) does a job here, when a process did not. A wait for a
    process, whose disk may hang, ends with Cancelled when that is asked for.
    """

    def __init__(self, fd: int, count: int, compute: Compute, cancel: Cancel) -> None:
        self._compute = compute
        self._cancel = cancel
        self._workers: list[tuple[int, socket.socket]] = []
        self._next = 0
        for _ in range(count):
            ours, theirs = socket.socketpair()
            with theirs:
                words = [str(theirs.fileno()), str(fd)]
                pid = fork_module(__name__, words, [theirs.fileno(), fd])
            self._workers.append((pid, ours))

    def submit(self, offset: int, length: int) -> Callable[[], bytes]:
        """Begin it; what is returned waits for the digest, and raises what `compute` raises."""
        _, worker = self._workers[self._next]
        self._next = (self._next + 1) % len(self._workers)
        with contextlib.suppress(OSError):  # it has ended: the answer will tell
            worker.sendall(_JOB.pack(offset, length))

        def result() -> bytes:
            Wait(worker.fileno(), (self._cancel,))()
            answer = b""
            with contextlib.suppress(OSError):
                answer = worker.recv(_ANSWER_BYTES, socket.MSG_WAITALL)
            if len(answer) == _ANSWER_BYTES and answer.startswith(_DONE):
                return answer[1:]
            return self._compute(offset, length)

        return result

    def close(self) -> None:
        """Ends them, also in the middle: nothing of theirs has to be put in order."""
        for pid, worker in self._workers:
            worker.close()
            os.kill(pid, signal.SIGKILL)
        for pid, _ in self._workers:
            pidfd = os.pidfd_open(pid)
            select.select([pidfd], [], [], _END_WAIT_S)
            os.close(pidfd)
            os.waitpid(pid, os.WNOHANG)
        self._workers = []


def main(argv: Sequence[str]) -> int:
    """One of the processes: serves until the other end is closed, as it is when its owner dies."""
    jobs = socket.socket(fileno=int(argv[0]))
    fd = int(argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGBUS may be, and is no bug
    while len(job := jobs.recv(_JOB.size, socket.MSG_WAITALL)) == _JOB.size:
        offset, length = _JOB.unpack(job)
        try:
            answer = _DONE + _digest(fd, offset, length)
        except SourceError:
            answer = _FAILED
        try:
            jobs.sendall(answer)
        except OSError:
            break
    return 0


def _digest(fd: int, offset: int, length: int) -> bytes:
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        # An extent at a time: all of it would count as our memory.
        with mmap.mmap(fd, offset - start + length, prot=mmap.PROT_READ, offset=start) as mapping:
            mapping.madvise(_MADV_POPULATE_READ)
            with memoryview(mapping) as whole, whole[offset - start :] as view:
                return extent_digest(view)
    except (OSError, ValueError):  # cut, unreadable, or no file that can be mapped
        return read_digest(PlainFile("the archive", None, fd, 0).read_into, offset, length)
