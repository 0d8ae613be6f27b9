# SPDX-License-Identifier: Apache-2.0
"""exec:COMMAND: a shell command reads the archive, and its exit status counts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess

from vmapipe.archiver.outputs.base import DescriptorOutput, OutputFailure, open_failure
from vmapipe.archiver.outputs.stream import PIPE_BYTES
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import human_bytes

# After the last byte the command may still have much to do: flush a cache to
# a slow disk, or finish an upload. An hour is far above what was seen; without
# any bound a far end that hangs would hang the backup.
END_WAIT_S = 3600.0
# A command that closed its input is about to end; its exit status tells more
# than "broken pipe".
STATUS_WAIT_S = 5.0
# What a command gets between SIGINT and SIGTERM, and between that and SIGKILL, for instance to
# abort an upload or to remove its lock. SIGINT first, as if at a terminal: Debian's restic
# leaves its repository locked at SIGTERM. Short: a process that is told to stop has 10 s in all.
INT_WAIT_S = 2.0
TERM_WAIT_S = 2.0
_SUCCESS = "ended with exit status 0"


class CommandOutput(DescriptorOutput):
    """The archive is the standard input of `/bin/sh -c COMMAND`.

    Its standard output goes to our standard error, since ours may be in use.
    It gets a session of its own, so that all of a pipeline can be ended, and so
    that Ctrl-C reaches it through us, in order.
    """

    def __init__(
        self, command: str, *, cancel: Cancel | None = None, end_wait_s: float = END_WAIT_S
    ) -> None:
        if not command.strip():
            raise UsageError("exec: needs a command")
        self._end_wait_s = end_wait_s
        self._pidfd = -1
        self._is_interrupted = False
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        super().__init__(ours, f"exec:{command}", cancel)
        # Only our end of a pipe: each end has a flag of its own.
        os.set_blocking(ours, False)
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command], stdin=theirs, stdout=2, start_new_session=True
            )
        except (OSError, ValueError) as error:
            self._close()
            if isinstance(error, OSError):
                raise open_failure("start", self.description, error) from error
            raise UsageError(f"{self.description!r}: {error}") from error  # a NUL in it
        finally:
            os.close(theirs)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._send = self._send_while_it_runs

    def _send_while_it_runs(self, buffers: list[bytes | memoryview]) -> int:
        # Part of a pipeline may live on and read; what it does counts no more.
        if self._has_ended(0):
            raise self._early_end()
        return self._writev(buffers)

    def _failure(self, error: OSError) -> OutputFailure:
        if error.errno != errno.EPIPE:
            return super()._failure(error)
        if self._has_ended(STATUS_WAIT_S):
            return self._early_end()
        after = human_bytes(self.written_bytes)
        text = f"{self.description} has closed its standard input after {after}"
        return self._failed(text, errno.EPIPE)

    def _complete(self) -> None:
        # This tells the command that the archive is complete.
        fd, self._fd = self._fd, -1
        os.close(fd)
        if not self._interrupt.wait(self._end_wait_s, self._pidfd):
            text = (
                f"{self.description} has not ended {self._end_wait_s:g} s after the end of the "
                f"archive; it was killed"
            )
            raise self._failed(text)
        if (result := self._end_text()) != _SUCCESS:
            raise self._failed(f"{self.description} {result}")
        self._process.wait()

    def _early_end(self) -> OutputFailure:
        after = human_bytes(self.written_bytes)
        text = f"{self.description} {self._end_text()} after {after}, before the archive's end"
        return self._failed(text)

    def _end_text(self) -> str:
        """How it ended, which it has. It is not reaped: its group keeps its number."""
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
        if result is None or result.si_code == os.CLD_EXITED:
            return f"ended with exit status {result.si_status if result else '?'}"
        return f"was killed by {signal.Signals(result.si_status).name}"

    def _failed(self, text: str, number: int = 0) -> OutputFailure:
        return OutputFailure(
            text, target=self.description, written_bytes=self.written_bytes, errno=number
        )

    def _has_ended(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _before_abort(self) -> None:
        # Before anything else: a command that sees the end of its input first
        # would take half an archive for a whole one.
        self._interrupt_group()

    def _discard(self) -> None:
        self._interrupt_group()
        self._has_ended(INT_WAIT_S)
        self._signal_group(signal.SIGTERM)
        self._has_ended(TERM_WAIT_S)
        self._signal_group(signal.SIGKILL)
        if self._has_ended(TERM_WAIT_S):
            self._process.wait()

    def _interrupt_group(self) -> None:
        """Once: a second one would break off what the command does at the first."""
        if not self._is_interrupted:
            self._is_interrupted = True
            self._signal_group(signal.SIGINT)

    def _abort_without_lock(self) -> None:
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, signum: int) -> None:
        # Not reaped yet, so the number cannot be another group's.
        with contextlib.suppress(OSError):
            if self._process.returncode is None:
                os.killpg(self._process.pid, signum)

    def _close(self) -> None:
        if self._pidfd >= 0:
            pidfd, self._pidfd = self._pidfd, -1
            os.close(pidfd)
        super()._close()
