# SPDX-License-Identifier: Apache-2.0
"""The log of a service: lines that are written as far as their reader reads, and dropped and counted beyond."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable

from vmapipe.runtime.syscalls import writable

# Held for a reader that is slow; what comes then is counted only.
_MOST_HELD_BYTES = 256 << 10
# A descriptor that is writable takes so much at once without a wait (PIPE_BUF).
_PIECE_BYTES = 4096


class LogStream:
    """Writes lines to `fd` without waiting for its reader.

    `left_out`: the line that tells how many were dropped. Call `flush` from time to time.
    """

    def __init__(self, fd: int, left_out: Callable[[int], str]) -> None:
        self._fd = fd
        self._left_out = left_out
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._dropped = 0

    def write(self, line: str) -> None:
        data = line.encode(errors="backslashreplace")
        if self._held_bytes + len(data) > _MOST_HELD_BYTES:
            self.flush()
        if self._held_bytes + len(data) > _MOST_HELD_BYTES:
            self._dropped += 1
            return
        self._hold(data)
        self.flush()

    def flush(self) -> None:
        """Write what is held, as far as that needs no wait."""
        # A log whose reader is gone is no reason to give up backups.
        try:
            while self._held and writable(self._fd, 0.0):
                self._write_piece()
        except OSError:
            self._held.clear()
            self._held_bytes = 0
        if self._dropped and not self._held:
            count, self._dropped = self._dropped, 0
            self._hold(self._left_out(count).encode())
            self.flush()

    def close(self, timeout_s: float) -> None:
        """Write the last lines, if they are read in time."""
        deadline = time.monotonic() + timeout_s
        self.flush()
        with contextlib.suppress(OSError):
            while self._held and writable(self._fd, max(0.0, deadline - time.monotonic())):
                self.flush()

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)

    def _write_piece(self) -> None:
        data = self._held[0]
        written = os.write(self._fd, data[:_PIECE_BYTES])
        self._held_bytes -= written
        if written == len(data):
            self._held.popleft()
        else:
            self._held[0] = data[written:]
