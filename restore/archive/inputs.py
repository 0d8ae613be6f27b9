# SPDX-License-Identifier: Apache-2.0
"""Bytes in order, out of a descriptor or of a program; a wait ends when a stop is asked for."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from vmapipe.restore.errors import SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.folders import temporary_folder

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# The largest pipe an unprivileged process may make: fewer, larger reads.
_PIPE_BYTES = 1 << 20
# A program that was told to end ends at once; after this it is killed.
_STOP_S = 2.0
# A program's last words, for the one line the user sees.
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
    `halts` asks for a stop. OSError becomes SourceError, with the position.
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
            raise SourceError(
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
    """What a program writes to its standard output. Its failure is ours."""

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

        Raises SourceError when it cannot be started.
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
            raise SourceError(f"cannot start {argv[0]}: {os_error_text(error)}") from error
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
            raise SourceError(self.failed_before)
        if status:
            how = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else (f"ended with exit status {status}")
            )
            raise self._failure(f"{how}{self._last_words()}")

    def _failure(self, how: str) -> Exception:
        return SourceError(f"{self.name} {how}")

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
        words = " ".join(self._words.read(_MAX_WORDS).decode("utf-8", "replace").split())
        return f": {words}" if words else ""

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        stop_program(self._process)
        if self._words is not None:
            self._words.close()


def stop_program(process: subprocess.Popen[bytes]) -> None:
    """End it if it still runs, and wait for it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        import psutil  # here: it takes 10 ms, and is almost never needed

        # A shell waits for its children before it ends: those too.
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
