# SPDX-License-Identifier: Apache-2.0
"""Bytes in order, out of a descriptor, a program or jobs in threads; every wait ends when a stop is
asked for."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Generic, TypeVar

from vmapipe.restore.archive.errors import InputError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.folders import temporary_folder
from vmapipe.runtime.threads import DaemonPool

if TYPE_CHECKING:
    from concurrent.futures import Future

    import psutil
    from _typeshed import WriteableBuffer

#: Reads (length, offset) of a stored archive: fewer bytes only at its end. Raises InputError.
Pread = Callable[[int, int], bytes]

# The largest pipe an unprivileged process may make: fewer, larger reads.
_PIPE_BYTES = 1 << 20
# A program that was told to end ends at once; after this it is killed.
_STOP_S = 2.0
# A read from a disk ends in time; one from a disk or a store that hangs is left behind.
_END_WAIT_S = 2.0
# Characters of a program's last error output, for the one line that the user sees.
_MAX_WORDS = 300


class Wait:
    """Call it to wait until `fd` has data or has ended; Cancelled when a stop is asked for first."""

    def __init__(self, fd: int, halts: Sequence[Cancel]) -> None:
        self.halts: list[Cancel] = []
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        for halt in halts:
            self.add(halt)

    def add(self, halt: Cancel) -> None:
        self._poll.register(halt.fd, select.POLLIN)
        self.halts.append(halt)

    def __call__(self) -> None:
        # A regular file is always ready: one system call, a microsecond.
        self._poll.poll()
        for halt in self.halts:
            halt.check()


class Input(io.RawIOBase):
    """Reads `fd` (which it owns) to its end. `position` counts the bytes handed out.

    Where `fd` may make us wait, the wait ends with Cancelled when one of
    `halts` asks for a stop. OSError becomes InputError, with the position.
    """

    def __init__(self, name: str, fd: int, halts: Sequence[Cancel]) -> None:
        super().__init__()
        self.name = name
        self.position = 0
        self._fd = fd
        self._wait = Wait(fd, halts)
        self._start = b""
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def readable(self) -> bool:
        return True

    def also_halt(self, halt: Cancel) -> None:
        """From now on this one, too, ends a wait."""
        self._wait.add(halt)

    def peek_start(self, length: int) -> bytes:
        """The first bytes, fewer only where there are no more. Before anything is read."""
        while len(self._start) < length:
            piece = bytearray(length - len(self._start))
            got = self._read_fd(memoryview(piece))
            if not got:
                break
            self._start += piece[:got]
        return self._start

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        if self._start:
            got = min(len(view), len(self._start))
            view[:got] = self._start[:got]
            self._start = self._start[got:]
        else:
            got = self._read_fd(view)
        self.position += got
        return got

    def _read_fd(self, view: memoryview) -> int:
        self._wait()
        try:
            got = os.readv(self._fd, [view])
        except OSError as error:
            raise InputError(
                f"cannot read {self.name} at offset {self.position}: {os_error_text(error)}"
            ) from error
        if not got and len(view):
            self._ended()
        return got

    def _ended(self) -> None:
        """The end was met: raise if it is not to be trusted."""

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


class ProgramInput(Input):
    """Standard output of a program, whose failure ends the reading with an error."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        halts: Sequence[Cancel],
        *,
        stdin: int = subprocess.DEVNULL,
        keep_words: bool = False,
    ) -> None:
        """`keep_words`: its stderr goes into our error instead of to the terminal.

        Raises InputError when it cannot be started.
        """
        self._words: IO[bytes] | None = None
        if keep_words:
            self._words = tempfile.TemporaryFile(dir=temporary_folder())  # noqa: SIM115  closed by close()
        try:
            self._process = subprocess.Popen(
                list(argv), stdin=stdin, stdout=subprocess.PIPE, stderr=self._words
            )
        except OSError as error:
            if self._words is not None:
                self._words.close()
            raise InputError(f"cannot start {argv[0]}: {os_error_text(error)}") from error
        stdout = self._process.stdout
        if stdout is None:
            raise RuntimeError("a pipe was asked for")
        fd = os.dup(stdout.fileno())
        stdout.close()
        self.failed_before = ""
        super().__init__(name, fd, halts)

    def _ended(self) -> None:
        self._wait_exit()
        status = self._process.returncode
        if self.failed_before:
            raise InputError(self.failed_before)
        if status:
            how = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else (f"ended with exit status {status}")
            )
            raise self._failure(f"{how}{self._last_words()}")

    def _failure(self, how: str) -> Exception:
        return InputError(f"{self.name} {how}")

    def _wait_exit(self) -> None:
        if self._process.poll() is None:
            pidfd = os.pidfd_open(self._process.pid)
            try:
                Wait(pidfd, self._wait.halts)()
            finally:
                os.close(pidfd)
            self._process.wait()

    def _last_words(self) -> str:
        if self._words is None:
            return ""
        self._words.seek(0)
        text = " ".join(self._words.read(_MAX_WORDS).decode("utf-8", "replace").split())
        return f": {text}" if text else ""

    def close(self) -> None:
        if self.closed:
            return
        # Before its output closes, of which it could die at once: restic leaves its repository
        # locked then, and at SIGTERM, too.
        _interrupt(self._process)
        super().close()
        stop_program(self._process)
        if self._words is not None:
            self._words.close()


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end as Ctrl-C at a terminal would, if it still runs, and give it a moment.

    In a pipeline each waits for the one before it: whoever loses its reader dies at once.
    """
    if process.poll() is not None:
        return
    deadline_s = time.monotonic() + _STOP_S
    # Here and below: most restores end no program, and start 10 ms sooner without.
    import psutil

    for program in _sources_first(process.pid):
        with contextlib.suppress(psutil.Error):
            program.send_signal(signal.SIGINT)
            program.wait(max(0, deadline_s - time.monotonic()))
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0, deadline_s - time.monotonic()))


def _sources_first(pid: int) -> Iterator[psutil.Process]:
    """What a process started, in the order of its start, each behind what itself has started.

    A shell starts a pipeline from the left, and waits for its children before it ends.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children()
        for child in sorted(children, key=lambda child: (child.create_time(), child.pid)):
            yield from _sources_first(child.pid)
            yield child


def stop_program(process: subprocess.Popen[bytes]) -> None:
    """End it if it still runs, and wait for it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        import psutil

        for program in _sources_first(process.pid):
            with contextlib.suppress(psutil.Error):
                program.kill()
        process.kill()
        process.wait()


def interruptible(job: Callable[[], bytes], halts: Sequence[Cancel]) -> bytes:
    """Return the job's result; it is done in another thread, so that a stop ends the wait for it."""
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    ahead = ReadAhead(iter([job]), 1, 1, wake_fd, Wait(wake_fd, halts))
    try:
        return ahead.next() or b""
    finally:
        ahead.close()
        os.close(wake_fd)


_Result = TypeVar("_Result")


class ReadAhead(Generic[_Result]):
    """Does `jobs` in `threads` threads and gives their results in order.

    The first is done alone, in a thread that ends with it: many readers want no more than an archive's
    header, and a process without threads can be copied. From the second on, the number of those ahead
    doubles up to `limit`.
    `wait` ends when `wake_fd`, an eventfd of the owner's, was written to, or raises.
    """

    def __init__(
        self,
        jobs: Iterator[Callable[[], _Result]],
        threads: int,
        limit: int,
        wake_fd: int,
        wait: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._limit = limit
        self._most = 1
        self._wake_fd = wake_fd
        self._wait = wait
        self._threads = threads
        self._ahead: deque[Future[_Result]] = deque()
        # After its owner has closed the descriptor nothing may be written to it.
        self._waking = threading.Lock()
        self._closed = False
        self._pool: DaemonPool | None = None

    def next(self) -> _Result | None:
        """The next result, or its error; None at the end. Raises what `wait` raises."""
        self._look_ahead()
        if not self._ahead:
            return None
        future = self._ahead[0]
        while not future.done():
            self._wait()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        self._ahead.popleft()
        if self._most > 1:
            self._look_ahead()
        elif self._pool is not None:
            self._pool.close(_END_WAIT_S)
            self._pool = None
        self._most = min(2 * self._most, self._limit)
        return future.result()

    def close(self) -> bool:
        """Return whether all threads have ended; if not, what they use must stay open."""
        with self._waking:
            self._closed = True
        self._ahead.clear()
        return self._pool is None or self._pool.close(_END_WAIT_S)

    def _look_ahead(self) -> None:
        while len(self._ahead) < self._most:
            job = next(self._jobs, None)
            if job is None:
                return
            if self._pool is None:
                self._pool = DaemonPool(self._threads if self._most > 1 else 1, "ahead")
            future = self._pool.submit(job)
            self._ahead.append(future)
            future.add_done_callback(self._wake)

    def _wake(self, _: Future[_Result]) -> None:
        with self._waking:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)
