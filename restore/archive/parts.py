# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of files of independent parts: zstd's frames, gzip's members.

The last few megabytes of compressed bytes can be read a second time (`Rewindable`).

A part that is damaged is told by a `CompressionError`, behind which reading goes on with the
next part that can be found. A restore or verify ends at the first error; a salvage goes on.
"""

from __future__ import annotations

import io
from collections import deque
from typing import TYPE_CHECKING, Protocol

from vmapipe.restore.archive.errors import CompressionError
from vmapipe.restore.archive.input import Input

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Small, so that a message can say where the damage is.
READ_BYTES = 128 << 10
# Behind damage, the search for the next frame begins where the damaged one did, if that is
# not further back than this: twice the frames that we write.
_KEPT_BYTES = 8 << 20


class RawReader(Protocol):
    """An `Input`."""

    def read(self, size: int, /) -> bytes | None:
        """The next bytes; empty at the end. Raises InputError, Cancelled."""


class Rewindable:
    """Reads `raw` in pieces. `position`: where in the file the next piece begins."""

    def __init__(self, raw: RawReader) -> None:
        self.position = 0
        self._raw = raw
        self._next: deque[bytes] = deque()
        self._past: deque[bytes] = deque()
        self._past_bytes = 0

    def read(self) -> bytes:
        """The next piece; empty at the end. Raises InputError, Cancelled."""
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


class Proof:
    """Counts of what the checksums of a compressed file have proved so far.

    `proven_bytes`: the plain bytes before this position came out of parts whose checksum was
    right. `parts`, `parts_with`: of those that have ended, how many there were, and how many
    had a checksum.
    """

    def __init__(self) -> None:
        self.proven_bytes = 0
        self.parts = self.parts_with = 0

    def ended(self, plain_at: int, *, has_checksum: bool) -> None:
        """A part has ended well, at this plain position."""
        self.parts += 1
        if has_checksum:
            self.parts_with += 1
            self.proven_bytes = plain_at


class Part(Protocol):
    """A part that is being read. `plain_bytes`: announced length of its content; None: not announced."""

    has_checksum: bool
    plain_bytes: int | None

    def readinto(self, view: memoryview) -> int:
        """0: the part has ended, and the source stands behind it. Raises CompressionError."""


class PartFormat(Protocol):
    """A format of independent parts."""

    def begin(self, source: Rewindable, name: str) -> Part | None:
        """The part that begins here; None at the end of the file.

        Raises CompressionError where none does, InputError for one that may not be read.
        """

    def find(self, data: bytes, start: int) -> int:
        """Return where in `data`, from `start` on, a part may begin; -1: nowhere."""

    @property
    def magic_bytes(self) -> int:
        """Number of bytes that `find` needs to recognise a part."""


class PartStream(io.RawIOBase):
    """Reads a whole compressed file in order; owns `raw`."""

    def __init__(self, name: str, raw: Input, kind: PartFormat) -> None:
        super().__init__()
        self.proof = Proof()
        self._name = name
        self._raw = raw
        self._kind = kind
        self._source = Rewindable(raw)
        self._part: Part | None = None
        self._part_at = 0  # where in the file it begins
        self._plain_at = 0
        self._part_plain_at = 0
        self._searching = self._is_over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self._part is None and not self._begin():
                return 0
            part = self._part
            if part is None:
                raise RuntimeError("a part was begun")
            try:
                got = part.readinto(view)
            except CompressionError as error:
                raise self._damaged(error, part) from error
            self._plain_at += got
            if got or not len(view):
                return got
            self.proof.ended(self._plain_at, has_checksum=part.has_checksum)
            self._part = None

    def _begin(self) -> bool:
        """Begin the next part; return False where there is none."""
        if self._is_over or (self._searching and not self._search()):
            return False
        self._part_at = self._source.position
        self._part_plain_at = self._plain_at
        try:
            self._part = self._kind.begin(self._source, self._name)
        except CompressionError as error:
            raise self._damaged(error, None) from error
        return self._part is not None

    def _damaged(self, error: CompressionError, part: Part | None) -> CompressionError:
        """The error as it is told: with what it costs, and with a way on."""
        error.unproven_from = self._part_plain_at
        done = self._plain_at - self._part_plain_at
        if part is not None and part.plain_bytes is not None and part.plain_bytes >= done:
            error.lost_bytes = part.plain_bytes - done
            self._plain_at += error.lost_bytes
        # Behind a cut there is nothing; what looks like a part inside this one is chance.
        error.resumes = self._searching = not error.cut
        self._is_over = error.cut
        self._part = None
        return error

    def _search(self) -> bool:
        """Go to where the next part may begin, behind the beginning of the damaged one."""
        self._searching = False
        reach = self._kind.magic_bytes - 1
        base = self._source.rewind(self._part_at + 1)
        held = b""
        while True:
            piece = self._source.read()
            held += piece
            found = self._kind.find(held, 0)
            if found >= 0:
                self._source.rewind(base + found)
                return True
            if not piece:
                return False
            keep = min(reach, len(held))
            base += len(held) - keep
            held = held[len(held) - keep :]

    def close(self) -> None:
        self._raw.close()
        super().close()
