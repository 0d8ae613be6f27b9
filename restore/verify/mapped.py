# SPDX-License-Identifier: Apache-2.0
"""Processes that compute digests of an archive's file without copying it: it is mapped.

A file that is cut, or cannot be read, while it is mapped kills the process that touches
the mapping (SIGBUS). So that is done in processes of their own, whose end is harmless:
when one has died, the caller reads and computes the rest itself, and gets the error with
its offset.
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

from vmapipe.restore.archive.digest import extent_digest
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import fork_module
from vmapipe.runtime.syscalls import readable

# Offset and length.
_JOB = struct.Struct("=QI")
# Offset and digest.
_ANSWER = struct.Struct("=Q16s")
# One that a disk holds up ends when the disk lets it go.
_END_WAIT_S = 2.0

Compute = Callable[[int, int], bytes]


class MappedHashers:
    """`count` processes, of which each takes the next job when it is free.

    The process that makes it must have no threads (`can_fork`). `compute`
    (offset, length) does a job here, when no process did. A wait for a
    process, whose disk may hang, ends with Cancelled when that is asked for.
    """

    def __init__(self, fd: int, count: int, compute: Compute, cancel: Cancel) -> None:
        self._compute = compute
        self._cancel = cancel
        self._answers: dict[int, bytes] = {}
        #: Each process: its pid, and a descriptor that is readable when it has ended.
        self._workers: list[tuple[int, int]] = []
        # SEQPACKET keeps messages apart: each read is a whole job.
        self._jobs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for _ in range(count):
                argv = [str(theirs.fileno()), str(fd)]
                pid = fork_module(__name__, argv, [theirs.fileno(), fd])
                self._workers.append((pid, os.pidfd_open(pid)))
        self._poll = select.poll()
        for wanted in (self._jobs.fileno(), cancel.fd, *(end for _, end in self._workers)):
            self._poll.register(wanted, select.POLLIN)

    def submit(self, offset: int, length: int) -> Callable[[], bytes]:
        """Begin it; what is returned waits for the digest, and raises what `compute` raises.

        Offsets are told apart by: none twice at a time.
        """
        with contextlib.suppress(OSError):  # all have ended: there will be no answer
            self._jobs.send(_JOB.pack(offset, length))

        def result() -> bytes:
            while offset not in self._answers and self._workers:
                self._hear()
            answer = self._answers.pop(offset, None)
            return self._compute(offset, length) if answer is None else answer

        return result

    def _hear(self) -> None:
        """The next answer, or the end of them: one has died. Raises Cancelled."""
        try:
            answer = self._jobs.recv(_ANSWER.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # Nothing there, and those that have ended have said all that they had to say.
            ended = [fd for fd, _ in self._poll.poll() if fd != self._jobs.fileno()]
            self._cancel.check()
            if ended:
                self._end_all()
            return
        except OSError:
            answer = b""
        if len(answer) == _ANSWER.size:
            offset, digest = _ANSWER.unpack(answer)
            self._answers[offset] = digest
        else:
            self._end_all()

    def _end_all(self) -> None:
        for pid, _ in self._workers:
            os.kill(pid, signal.SIGKILL)
        for pid, end in self._workers:
            readable([end], _END_WAIT_S)
            os.close(end)
            os.waitpid(pid, os.WNOHANG)
        self._workers = []

    def close(self) -> None:
        """Ends them, also in the middle: nothing of theirs has to be put in order."""
        self._jobs.close()
        self._end_all()


def main(argv: Sequence[str]) -> int:
    """Run one of the processes, until the other end is closed, as it is when its owner dies."""
    jobs = socket.socket(fileno=int(argv[0]))
    fd = int(argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGBUS is expected, and not a bug
    while len(job := jobs.recv(_JOB.size)) == _JOB.size:
        offset, length = _JOB.unpack(job)
        try:
            jobs.send(_ANSWER.pack(offset, _digest(fd, offset, length)))
        except (
            OSError,
            ValueError,
        ):  # the owner has ended; or the file is cut, or cannot be mapped
            break
    return 0


def _digest(fd: int, offset: int, length: int) -> bytes:
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    # An extent at a time: all of it would count as our memory.
    with (
        mmap.mmap(fd, offset - start + length, prot=mmap.PROT_READ, offset=start) as mapping,
        memoryview(mapping) as whole,
        whole[offset - start :] as view,
    ):
        return extent_digest(view)
