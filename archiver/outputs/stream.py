# SPDX-License-Identifier: Apache-2.0
"""Streams: pipes, sockets, character devices, and descriptors that we inherit.

Pipes and sockets are written without blocking, so that an `abandon` from
another thread gets through while a reader is asleep. O_NONBLOCK belongs to
the open file, though, which we share with whoever gave us the descriptor: a
pipe is therefore opened anew, and a socket told so in each call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable

from vmapipe.archiver.outputs.base import (
    DescriptorOutput,
    Interrupt,
    OutputFailure,
    WriteBehind,
    open_failure,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError

# The reader of a FIFO is started just before or after us. Less than the 30 s
# after which waiting producers take a silent archiver for dead.
READER_WAIT_S = 20.0
# A tenth of a second at the start of a backup is not noticed.
_POLL_S = 0.1
# As large as the kernel allows anyone by default: a sixteenth of the wake-ups
# of its usual 64 KiB.
PIPE_BYTES = 1 << 20


class StreamOutput(DescriptorOutput):
    """Any descriptor without a name of its own. It owns `fd`, and closes `also_close` with it."""

    def __init__(
        self, fd: int, description: str, cancel: Cancel | None = None, *, also_close: int = -1
    ) -> None:
        super().__init__(fd, description, cancel)
        self._also_close = also_close
        self._socket: socket.socket | None = None
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFSOCK:
            self._socket = socket.socket(fileno=os.dup(fd))
            self._send = self._sendmsg
        elif kind == stat.S_IFIFO:
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def _sendmsg(self, buffers: list[bytes | memoryview]) -> int:
        if self._socket is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._socket.sendmsg(buffers, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _complete(self) -> None:
        if self._socket is not None:
            # The far end sees the end of the archive although others may hold
            # this socket, too.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._also_close >= 0:
            also_close, self._also_close = self._also_close, -1
            os.close(also_close)
        super()._close()


class OpenFileOutput(StreamOutput):
    """A regular file that was opened by the parent: a shell's `> FILE`, or libvirt's descriptor."""

    def __init__(
        self, fd: int, description: str, cancel: Cancel | None = None, *, also_close: int = -1
    ) -> None:
        super().__init__(fd, description, cancel, also_close=also_close)
        appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        self._start = os.lseek(fd, 0, os.SEEK_END if appends else os.SEEK_CUR)
        self._write_behind = WriteBehind(fd, self._start)

    def _complete(self) -> None:
        os.fsync(self._fd)

    def _discard(self) -> None:
        # Half an archive must not look like one. If the file has grown by
        # more than ours, another process writes it too, and we must not cut it.
        if os.fstat(self._fd).st_size == self._start + self.written_bytes:
            os.ftruncate(self._fd, self._start)
            os.lseek(self._fd, self._start, os.SEEK_SET)


def open_inherited(
    number: int, description: str, cancel: Cancel | None = None, *, close: bool = True
) -> DescriptorOutput:
    """Write to descriptor `number`, and close it at the end if `close`.

    Raises UsageError when no archive can go there.
    """
    try:
        status = os.fstat(number)
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, OverflowError) as error:
        raise UsageError(f"{description}: descriptor {number} is not open") from error
    if mode == os.O_RDONLY:
        raise UsageError(f"{description}: descriptor {number} is open for reading only")
    check_kind(status.st_mode, description)
    refuse_terminal(number, description)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFSOCK:
        refuse_datagrams(number, description)
    fd = (_open_anew(number) if kind == stat.S_IFIFO else None) or _duplicate(number)
    also_close = -1
    if close:
        also_close = number
        os.set_inheritable(number, False)
    output = OpenFileOutput if kind == stat.S_IFREG else StreamOutput
    return output(fd, description, cancel, also_close=also_close)


def _open_anew(number: int) -> int | None:
    """Our own way into a pipe; None where that is not allowed (a pipe of another user)."""
    try:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{number}", flags)
    except OSError:
        return None


def _duplicate(number: int) -> int:
    return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)


def open_fifo(
    path: str, cancel: Cancel | None = None, wait_s: float = READER_WAIT_S
) -> StreamOutput:
    """Open a FIFO as soon as it has a reader. Raises OutputFailure when none comes in time."""

    def attempt() -> int:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.close(fd)
            raise OutputFailure(f"{path} was a FIFO a moment ago and is none now", target=path)
        return fd

    fd = _retry(attempt, errno.ENXIO, cancel, wait_s)
    if fd is None:
        text = f"nobody reads the FIFO {path}: waited {wait_s:g} s; start its reader first"
        raise OutputFailure(text, target=path, errno=errno.ENXIO)
    return StreamOutput(fd, path, cancel)


def connect(path: str, cancel: Cancel | None = None, wait_s: float = READER_WAIT_S) -> StreamOutput:
    """Connect to the listener at a Unix socket. Raises OutputFailure."""

    def attempt() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.setblocking(False)
            end.connect(path)
            return end.detach()

    # EAGAIN: the listener's backlog is full of connections that came before us.
    try:
        fd = _retry(attempt, errno.EAGAIN, cancel, wait_s)
    except ConnectionRefusedError as error:
        text = f"nobody listens at the socket {path}; start its reader first"
        raise OutputFailure(text, target=path, errno=error.errno or 0) from error
    if fd is None:
        text = f"whoever listens at the socket {path} took no connection for {wait_s:g} s"
        raise OutputFailure(text, target=path, errno=errno.EAGAIN)
    return StreamOutput(fd, path, cancel)


def open_device(path: str, cancel: Cancel | None = None) -> StreamOutput:
    """Open a character device: /dev/null, a tape."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise open_failure("open", path, error) from error
    try:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            raise OutputFailure(f"{path} was a device a moment ago and is none now", target=path)
        refuse_terminal(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return StreamOutput(fd, path, cancel)


def _retry(
    attempt: Callable[[], int], expected: int, cancel: Cancel | None, wait_s: float
) -> int | None:
    """The descriptor that `attempt` gives; None when it failed with errno `expected` for so long.

    Raises Cancelled when the process is to stop meanwhile, and any other OSError.
    """
    deadline = time.monotonic() + wait_s
    interrupt = Interrupt(cancel)
    try:
        while True:
            try:
                return attempt()
            except OSError as error:
                if error.errno != expected:
                    raise
            if time.monotonic() >= deadline:
                return None
            interrupt.wait(_POLL_S)
    finally:
        interrupt.close()


def check_kind(mode: int, description: str) -> None:
    """Raise UsageError for a file of a kind that an archive cannot be written to."""
    if stat.S_ISDIR(mode):
        raise UsageError(f"{description} is a folder; name a file in it")
    if stat.S_ISBLK(mode):
        raise UsageError(
            f"{description} is a block device: an archive would overwrite what is on it, and no "
            f"reader could tell where it ends; name a file"
        )


def refuse_terminal(fd: int, description: str) -> None:
    if os.isatty(fd):
        raise UsageError(f"{description} is a terminal: send it to a file or a program instead")


def refuse_datagrams(number: int, description: str) -> None:
    with socket.socket(fileno=os.dup(number)) as end:
        if end.type != socket.SOCK_STREAM:
            raise UsageError(
                f"{description}: a socket that is not a stream cannot carry an archive"
            )
