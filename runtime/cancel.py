# SPDX-License-Identifier: Apache-2.0
"""Being told to stop: by a signal, by the death of the parent, or by another thread."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Command, LineSplitter, ignore
from vmapipe.runtime.syscalls import writable

# How long a process may take to put things in order after its parent died,
# before it ends at once: removing a partial file takes milliseconds, but a
# hung disk can hold a thread for ever.
GRACE_S = 10.0

# Lists that a person or a script writes, a line a disk: far more than any is.
MAX_AWAITED_BYTES = 4 << 20
_READ_BYTES = 1 << 16
_AWAIT_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class Cancel:
    """A flag with a descriptor: `fd` becomes readable when a stop was asked for."""

    def __init__(self) -> None:
        self.reason = ""
        self.signum = 0
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._lock = threading.Lock()
        self._has_wakeup = False

    @property
    def fd(self) -> int:
        return self._read.fileno()

    @property
    def asked(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str, signum: int = 0) -> None:
        """Ask for a stop; the first reason counts."""
        with self._lock:
            if not self.reason:
                self.reason, self.signum = reason, signum
        try:
            self._write.send(b"!")
        except OSError:
            pass  # full: it is readable already; closed: no thread waits any more

    def check(self) -> None:
        """Raises Cancelled when a stop was asked for."""
        if self.reason:
            raise Cancelled(self.reason, self.signum)

    def on_signals(self, *, has_parent: bool = False) -> None:
        """SIGINT, SIGTERM and SIGHUP ask for a stop. Call it in the main thread.

        With a parent, SIGINT is ignored: Ctrl-C reaches the whole group, and
        the parent stops its children in order.
        """
        # Python runs a handler between two of its instructions: for a signal that comes
        # behind the last one before a wait, that would be after the wait. This wakes it.
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._has_wakeup = True
        signal.signal(signal.SIGTERM, self._handle)
        for signum in (signal.SIGINT, signal.SIGHUP):
            # What is ignored (nohup, a shell's background job) stays ignored.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._handle)
        if has_parent:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # No lock here: the signal may come while the main thread holds it.
        if not self.reason:
            self.signum = signum
            self.reason = f"cancelled by {signal.Signals(signum).name}"
        try:
            self._write.send(b"!")
        except OSError:
            pass

    def close(self) -> None:
        if self._has_wakeup:
            signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()


def awaited_lines(source: str | int, cancel: Cancel) -> Iterator[str]:
    """The lines of a file or pipe, by path or descriptor; a stop ends the wait for its writer.

    Raises OSError, Cancelled, and Failure for more than MAX_AWAITED_BYTES.
    """
    # A FIFO is opened without waiting for its writer, and becomes readable when
    # that has written or left: a stop that comes just before cannot be missed.
    fd = source if isinstance(source, int) else os.open(source, _AWAIT_FLAGS)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(cancel.fd, select.POLLIN)
        left, held = MAX_AWAITED_BYTES, b""
        while True:
            poller.poll()
            cancel.check()
            piece = os.read(fd, _READ_BYTES)
            left -= len(piece)
            if left < 0:
                raise Failure(f"more than {MAX_AWAITED_BYTES} bytes: this is not what was expected")
            *lines, held = (held + piece).split(b"\n")
            yield from (_text(line + b"\n") for line in lines)
            if not piece:
                if held:
                    yield _text(held)
                return
    finally:
        if fd != source:
            os.close(fd)


def _text(line: bytes) -> str:
    return line.decode(errors="surrogateescape").replace("\r\n", "\n")


class ParentConnection:
    """A child's end of the socket to its parent: events go up, commands come down.

    `--parent-fd` names the descriptor. A thread gives the commands to `on_command`; at
    the end of the stream, which is the parent's death, it asks for a stop, and
    ends the process if the stop does not come.
    """

    def __init__(
        self, fd: int, cancel: Cancel, on_command: Callable[[Command], None] = ignore
    ) -> None:
        self._socket = socket.socket(fileno=fd)
        self._cancel = cancel
        self._on_command = on_command
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def send(self, line: bytes, *, droppable: bool = False) -> None:
        """`droppable`: rather lose it than wait for a parent whose reader has stopped reading."""
        with self._lock:
            # Writable means that three quarters of the buffer are free: the line fits.
            if droppable and not writable(self._socket.fileno(), 0):
                return
            try:
                self._socket.sendall(line)
            except OSError:
                self._cancel.ask("the parent process is gone")

    def _watch(self) -> None:
        splitter = LineSplitter()
        try:
            while data := self._socket.recv(4096):
                for command in splitter.feed(data):
                    self._on_command(command)
        except (OSError, ValueError):
            pass  # what is no line of ours does not come from a parent of ours
        self._cancel.ask("the parent process is gone")
        threading.Event().wait(GRACE_S)
        os._exit(1)
