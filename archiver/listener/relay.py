# SPDX-License-Identifier: Apache-2.0
"""One direction of a relayed connection: from one socket to another, with a small buffer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket

# Enough that a wake-up is worth its cost, and little for each of thousands.
_PIECE_BYTES = 64 << 10
# What a pipe holds for a connection with much data. The system may allow less, and
# does where one user has many.
_PIPE_BYTES = 512 << 10
_SPLICE_FLAGS = getattr(os, "SPLICE_F_MOVE", 1) | getattr(os, "SPLICE_F_NONBLOCK", 2)


class PipeStock:
    """How many further pipes may be made."""

    def __init__(self, left: int) -> None:
        self.left = left


class Relay:
    """`take` reads from `source`, `give` writes to `sink`.

    A connection with much data gets a pipe, through which the kernel moves pages
    instead of copying them: a third of the processor time.
    """

    def __init__(self, source: socket.socket, sink: socket.socket, pipes: PipeStock | None) -> None:
        self.source = source
        self.sink = sink
        #: Nothing more comes.
        self.ended = False
        #: Nothing more is taken; what was held is thrown away.
        self.lost = False
        self._pipes = pipes if hasattr(os, "splice") else None
        self._held = b""
        self._pipe: tuple[int, int] | None = None
        self._piped_bytes = 0
        #: In all, since the handshake.
        self.taken_bytes = 0
        # A pipe has places for pieces, however small: it may be full before its bytes are.
        self._is_full = False

    @property
    def is_empty(self) -> bool:
        return not self._held and not self._piped_bytes

    @property
    def has_room(self) -> bool:
        may_take = not self._is_full and self._piped_bytes < _PIPE_BYTES // 2
        return not self.ended and not self.lost and not self._held and may_take

    def put(self, data: bytes) -> None:
        """Send `data` before what is read from `source`."""
        self._held += data

    def take(self) -> None:
        """Read what has come, up to a limit. An error counts as the end."""
        try:
            if self._pipe is not None:
                size = os.splice(
                    self.source.fileno(), self._pipe[1], _PIPE_BYTES, flags=_SPLICE_FLAGS
                )
                self._piped_bytes += size
            else:
                data = self.source.recv(_PIECE_BYTES)
                size = len(data)
                self._held += data
                if size == _PIECE_BYTES and self._pipes is not None and self._pipes.left > 0:
                    self._make_pipe(self._pipes)
        except BlockingIOError:
            self._is_full = self._piped_bytes > 0
            return
        except OSError:
            size = 0
        self.taken_bytes += size
        self.ended = not size

    def give(self) -> None:
        """Write as much as `sink` takes."""
        try:
            while self._held:
                self._held = self._held[self.sink.send(self._held) :]
            while self._piped_bytes and self._pipe is not None:
                self._piped_bytes -= os.splice(
                    self._pipe[0], self.sink.fileno(), self._piped_bytes, flags=_SPLICE_FLAGS
                )
                self._is_full = False
        except BlockingIOError:
            return
        except OSError:
            self.lost = True
            self._held, self._piped_bytes = b"", 0

    def close(self) -> None:
        for fd in self._pipe or ():
            os.close(fd)
        if self._pipe is not None and self._pipes is not None:
            self._pipes.left += 1
        self._pipe = None

    def _make_pipe(self, pipes: PipeStock) -> None:
        with contextlib.suppress(OSError):  # it goes without
            self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            pipes.left -= 1
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
