# SPDX-License-Identifier: Apache-2.0
"""The interface and common parts of all outputs that take an archive."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.text import human_bytes

Buffers = Sequence[bytes | memoryview]


class Output(Protocol):
    """Takes the bytes of one archive. One thread writes and commits.

    Errors are `Failure`s whose text is the line for the user. After the first
    one only `abandon` makes sense. `abandon` alone may be called from any
    thread, while a write or a commit is under way too.
    """

    @property
    def description(self) -> str:
        """The target as the user named it; it stands in every message."""

    @property
    def is_stream(self) -> bool:
        """True when bytes are gone once written: no name, and nothing to roll back."""

    @property
    def written_bytes(self) -> int:
        """Bytes that have left for the target so far. Any thread may read it."""

    def write(self, buffers: Buffers) -> None:
        """Write all of the buffers, in order; wait as long as that takes.

        When it returns, the buffers are not used any more: their memory may
        be used again.
        """

    def commit(self) -> None:
        """Bring everything to its place: on disk and under its name, or to the far end."""

    def abandon(self) -> None:
        """Leave nothing behind. Quick; never raises; after a commit it does nothing.

        A write or commit that waits in another thread ends with a Failure.
        Where the kernel will not let go of it (a dead disk, a tape), this
        returns all the same, within `ending.ABANDON_WAIT_S`.
        """


_WAY_OUT = {
    errno.ENOSPC: "free space or choose another folder",
    errno.EDQUOT: "free space, raise the quota or choose another folder",
    errno.EFBIG: "the file system or a limit (ulimit -f) allows no larger file",
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another folder or mend its permissions",
    errno.ENAMETOOLONG: "choose a shorter name: .partial is added while it is written",
    errno.EIO: "the device is failing: look at the kernel's log",
}
# The reader of a stream has closed it. ECONNRESET comes from sockets.
_READER_GONE = (errno.EPIPE, errno.ECONNRESET)


class OutputFailure(Failure):
    """An output cannot take the archive.

    `target` is the output's description, `written_bytes` how much it had taken,
    `errno` the system's reason (0: it was not the system).
    """

    def __init__(
        self, text: str, *, target: str = "", written_bytes: int = 0, errno: int = 0
    ) -> None:
        super().__init__(text)
        self.target = target
        self.written_bytes = written_bytes
        self.errno = errno


def write_failure(target: str, written_bytes: int, error: OSError) -> OutputFailure:
    """For an error in the middle of the archive."""
    number = error.errno or 0
    after = f"after {human_bytes(written_bytes)}"
    if number in _READER_GONE:
        text = f"cannot write {target}: whoever read the archive has closed it, {after}"
    else:
        text = f"cannot write {target}: {os_error_text(error)} {after}{_way_out(number)}"
    return OutputFailure(text, target=target, written_bytes=written_bytes, errno=number)


def open_failure(verb: str, target: str, error: OSError) -> OutputFailure:
    """For an error before the first byte: "cannot `verb` `target`: ..."."""
    number = error.errno or 0
    text = f"cannot {verb} {target}: {os_error_text(error)}{_way_out(number)}"
    return OutputFailure(text, target=target, errno=number)


def _way_out(number: int) -> str:
    return f"; {_WAY_OUT[number]}" if number in _WAY_OUT else ""


class Interrupt:
    """Waits that another thread can end."""

    def __init__(self, cancel: Cancel | None = None) -> None:
        self.abandoned = False
        self._cancel = cancel
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ask(self) -> None:
        """End the wait under way and all later ones."""
        # The lock: a closed descriptor's number may have been given to another file.
        with self._lock:
            self.abandoned = True
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    os.eventfd_write(self._fd, 1)

    def check(self) -> None:
        """Raises OutputFailure or Cancelled when the work is to end."""
        if self._cancel is not None:
            self._cancel.check()
        if self.abandoned:
            raise OutputFailure("the archive was abandoned")

    def wait(self, timeout_s: float | None, fd: int = -1, events: int = select.POLLIN) -> bool:
        """Wait until `fd` (if any) has one of `events`; False when the time is over.

        Raises like `check`.
        """
        self.check()
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if self._cancel is not None:
            poll.register(self._cancel.fd, select.POLLIN)
        if fd >= 0:
            poll.register(fd, events)
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        self.check()
        return any(number == fd for number, _ in ready)

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


# How long `abandon` waits for the thread that writes. A call that can be
# interrupted ends within milliseconds; one that cannot (a dead disk) may last
# for ever, and a process that is told to stop has 10 s in all. Longer than
# what a command gets to end by itself.
ABANDON_WAIT_S = 3.0


class AbortableOutput:
    """The common part of all outputs that a thread writes to and another one may abandon.

    One lock is held during each write and during the commit. Whoever holds it
    while the output is abandoned tidies up when it is through, so that nothing
    is closed under a running call (for a descriptor the kernel does not mind,
    and the number may mean another file the next moment).
    """

    def __init__(self, description: str, cancel: Cancel | None) -> None:
        self.description = description
        self.written_bytes = 0
        self._lock = threading.Lock()
        self._over = False
        self._interrupt = Interrupt(cancel)

    def abandon(self) -> None:
        self._before_abort()
        self._interrupt.ask()
        if not self._lock.acquire(timeout=ABANDON_WAIT_S):
            self._abort_without_lock()
            return
        try:
            self._rollback_once()
        finally:
            self._lock.release()

    # --- what the kinds differ in ---

    #: What the target itself raises, which `_failure` puts into words.
    _errors: type[Exception] = OSError

    def _failure(self, error: Any) -> OutputFailure:
        return write_failure(self.description, self.written_bytes, error)

    def _before_abort(self) -> None:
        """First of all, before the thread that writes knows of it. Must not raise."""

    def _rollback(self) -> None:
        """Take back what can be, and let go of everything. The lock is held. Must not raise."""

    def _abort_without_lock(self) -> None:
        """As `_rollback`, for a call that does not return: without the lock, and without closing."""

    # --- the rest ---

    def _exclusively(self, work: Callable[..., None], *args: Any) -> None:
        """Do each write and the commit. Raises OutputFailure when there is nothing to write."""
        try:
            with self._lock:
                if self._over:
                    raise OutputFailure(
                        f"{self.description} takes no more: it is complete or given up"
                    )
                try:
                    work(*args)
                finally:
                    if self._interrupt.abandoned:
                        self._rollback_once()
        except self._errors as error:
            raise self._failure(error) from error

    def _rollback_once(self) -> None:
        if not self._over:
            self._over = True
            self._rollback()


# Measured with 2 GiB into new files: with these two numbers the write took
# 1.1 s together with its fsync and seldom more; left to the kernel 1.4 to 3.1 s,
# of which 0.4 to 0.7 s were the fsync. Pages that are given back are taken
# again for what follows, and pages that were used before are quicker than new
# ones. Steps of 8 MiB, or no second look, lost half of it.
STEP_BYTES = 32 << 20
# How far behind pages may still be on their way to the disk. A disk that is
# slower than that loses nothing: its pages stay in memory as usual.
LAG_BYTES = 256 << 20


class WriteBehind:
    """Brings a file to the disk while it is written; the archive begins at `start` in it, in bytes."""

    def __init__(self, fd: int, start: int = 0) -> None:
        self._fd = fd
        self._start = start
        self._next = start + STEP_BYTES
        self._works = True

    def reached(self, written_bytes: int) -> None:
        """So much of the archive is written."""
        position = self._start + written_bytes
        if position < self._next or not self._works:
            return
        self._next = position + STEP_BYTES
        begin = max(self._start, position - LAG_BYTES)
        try:
            # DONTNEED starts writing dirty pages and drops clean ones. The
            # guests' page cache is worth more than that of an archive.
            os.posix_fadvise(self._fd, begin, position - begin, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._works = False  # a file system without it: only slower


# Of threads that compress: more only take memory, 4 MiB in and 4 MiB out for each.
MAX_THREADS = 64
# More buffers in one call are refused (EINVAL); Linux has had this number for ever.
IOV_MAX = 1024


class DescriptorOutput(AbortableOutput):
    """The common part of all outputs that are descriptors."""

    is_stream = True

    def __init__(self, fd: int, description: str, cancel: Cancel | None = None) -> None:
        super().__init__(description, cancel)
        self._fd = fd
        #: What the kinds differ in, too.
        self._send: Callable[[list[bytes | memoryview]], int] = self._writev
        #: Of a file.
        self._write_behind: WriteBehind | None = None

    def write(self, buffers: Buffers) -> None:
        self._exclusively(self._write_all, buffers)

    def commit(self) -> None:
        self._exclusively(self._complete_and_close)

    # --- what the kinds differ in ---

    def _complete(self) -> None:
        """Do what a commit does, except for closing. May raise OSError or Failure."""

    def _discard(self) -> None:
        """Take back what can be taken back. The lock is held. May raise OSError."""

    # --- the rest ---

    def _complete_and_close(self) -> None:
        self._complete()
        if self._interrupt.abandoned:
            self._interrupt.check()
        self._close()
        self._over = True

    def _write_all(self, buffers: Buffers) -> None:
        todo = list(buffers)
        at = 0
        while at < len(todo):
            self._interrupt.check()
            batch = todo[at : at + IOV_MAX]
            try:
                count = self._send(batch)
            except BlockingIOError:
                self._wait_writable()
                continue
            self.written_bytes += count
            for buffer in batch:
                if count < len(buffer):
                    break
                count -= len(buffer)
                at += 1
            if count:
                todo[at] = memoryview(todo[at])[count:]
        if self._write_behind is not None:
            self._write_behind.reached(self.written_bytes)

    def _writev(self, buffers: list[bytes | memoryview]) -> int:
        return os.writev(self._fd, buffers)

    def _wait_writable(self) -> None:
        """For descriptors that do not block; the others never get here."""
        self._interrupt.wait(None, self._fd, select.POLLOUT)

    def _rollback(self) -> None:
        with contextlib.suppress(OSError):
            self._discard()
        with contextlib.suppress(OSError):
            self._close()

    def _close(self) -> None:
        """May raise OSError: on network file systems a close reports lost writes."""
        self._interrupt.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class OutputWrapper:
    """Passes on to the inner output all that a subclass does not change."""

    def __init__(self, inner: Output) -> None:
        self._inner = inner

    @property
    def description(self) -> str:
        return self._inner.description

    @property
    def is_stream(self) -> bool:
        return self._inner.is_stream

    @property
    def written_bytes(self) -> int:
        return self._inner.written_bytes
