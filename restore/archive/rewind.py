# SPDX-License-Identifier: Apache-2.0
"""Compressed bytes in order, of which the last few megabytes can be read a second time."""

from __future__ import annotations

from collections import deque
from typing import Protocol

# Small, so that a message can say where the damage is.
READ_BYTES = 128 << 10
# Behind damage, the search for the next frame begins where the damaged one did, if that is
# not further back than this: twice the frames that we write.
_KEPT_BYTES = 8 << 20


class RawReader(Protocol):
    """An `Input`."""

    def read(self, size: int, /) -> bytes | None:
        """The next bytes; empty at the end. Raises SourceError, Cancelled."""


class Rewindable:
    """Reads `raw` in pieces. `position`: where in the file the next piece begins."""

    def __init__(self, raw: RawReader) -> None:
        self.position = 0
        self._raw = raw
        self._next: deque[bytes] = deque()
        self._past: deque[bytes] = deque()
        self._past_bytes = 0

    def read(self) -> bytes:
        """The next piece; empty at the end. Raises SourceError, Cancelled."""
        piece = self._next.popleft() if self._next else self._raw.read(READ_BYTES) or b""
        if piece:
            self.position += len(piece)
            self._past.append(piece)
            self._past_bytes += len(piece)
            while self._past_bytes - len(self._past[0]) >= _KEPT_BYTES:
                self._past_bytes -= len(self._past.popleft())
        return piece

    def at_least(self, length: int) -> bytes:
        """The next piece, of `length` bytes or more, fewer only at the end."""
        piece = self.read()
        while len(piece) < length:
            more = self.read()
            if not more:
                break
            # The past must stay as it was read: both pieces are in it.
            piece += more
        return piece

    def rewind(self, position: int) -> int:
        """Go back to `position`, or to the earliest byte that is kept; returns where that is."""
        while self.position > position and self._past:
            piece = self._past.pop()
            self._past_bytes -= len(piece)
            self.position -= len(piece)
            skip = max(0, position - self.position)
            if skip:
                self._past.append(piece[:skip])
                self._past_bytes += skip
                self.position += skip
            self._next.appendleft(piece[skip:])
        return self.position
