# SPDX-License-Identifier: Apache-2.0
"""The shared memory that data waits in until the archiver acknowledges it: a ring, and its allocator.

Before the ring lie two places for one piece each. A piece goes there whenever one
is free: as long as the archiver keeps up, the same few megabytes are used again and
again, and stay in the processor's cache. The ring is for when it does not.

It lies in a memory file, so that an archiver on the same host can map it and
write straight from it: the data is then copied once out of the disk and once
into the archive. Over a network the same memory is sent.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque

from vmapipe.protocol import limits

# An archiver's open extent may hold on to 58 clusters (3.6 MiB) without
# acknowledging them, and to half a megabyte of acknowledgements; rounded up.
_HELD_BACK_BYTES = 9 << 19
# Beside that there must be room for a piece that reaches into the open extent,
# for the next one, and for the end of the ring that it did not fit into.
_PIECES = 3
# One is read into while the other one is written.
_HOT_PLACES = 2
_HOT_BYTES = _HOT_PLACES * limits.MAX_PAYLOAD_BYTES
RING_BYTES = _HOT_BYTES + _HELD_BACK_BYTES + _PIECES * limits.MAX_PAYLOAD_BYTES


class _Piece:
    __slots__ = ("end", "free", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.free = False


class RingAllocator:
    """Bytes [start, start + size) of some memory, as a ring. Pure.

    Data leaves almost in the order in which it came, so a ring wastes next to
    nothing; and what came together lies together, and makes one frame.
    """

    def __init__(self, start: int, size: int) -> None:
        self._start = self._head = start
        self._end = start + size
        # Oldest first; a piece that was given back stays until all before it are.
        self._pieces: deque[_Piece] = deque()
        self._by_start: dict[int, _Piece] = {}
        #: Bytes that are taken.
        self.used = 0

    def take(self, length: int) -> int | None:
        """Return where `length` bytes are held until `give_back`; None: there is no room now."""
        position = self.find(length)
        if position is not None:
            self.hold(position, length)
        return position

    def hold(self, position: int, length: int) -> None:
        """Hold `length` bytes of what `find` has just found."""
        piece = _Piece(position, position + length)
        self._pieces.append(piece)
        self._by_start[position] = piece
        self._head = piece.end
        self.used += length

    def resize(self, size: int) -> None:
        """Take no more beyond `size` bytes; what is held there already stays."""
        self._end = self._start + size

    def give_back(self, position: int) -> None:
        piece = self._by_start.pop(position)
        piece.free = True
        self.used -= piece.end - piece.start
        while self._pieces and self._pieces[0].free:
            self._pieces.popleft()

    def find(self, length: int) -> int | None:
        """Return where `length` bytes are free, or None."""
        if not self._pieces:
            return self._start if length <= self._end - self._start else None
        tail = self._pieces[0].start
        if self._head > tail:
            if self._head + length <= self._end:
                return self._head
            # Strictly below: a head that meets the tail would look like an empty ring.
            return self._start if self._start + length < tail else None
        return self._head if self._head + length < tail else None


class PieceAllocator:
    """Places for the pieces of a disk: the hot ones, and the ring behind them. Pure."""

    def __init__(self, hot_places: int = _HOT_PLACES) -> None:
        self._allocator = RingAllocator(_HOT_BYTES, RING_BYTES - _HOT_BYTES)
        self._hot_held = [False] * hot_places

    def fit(self, piece_bytes: int) -> None:
        """Use only as much as pieces of this size need: what is touched is memory, and cache."""
        self._allocator.resize(
            min(RING_BYTES - _HOT_BYTES, _HELD_BACK_BYTES + _PIECES * piece_bytes)
        )

    def take(self, length: int) -> int | None:
        """Return where `length` bytes are free, or None. Nothing is held until `hold`."""
        for place, held in enumerate(self._hot_held):
            if not held:
                return place * limits.MAX_PAYLOAD_BYTES
        return self._allocator.find(length)

    def hold(self, position: int, length: int) -> None:
        """Hold what `take` has found, or less of it, until `free`."""
        if position < _HOT_BYTES:
            self._hot_held[position // limits.MAX_PAYLOAD_BYTES] = True
        else:
            self._allocator.hold(position, length)

    def free(self, position: int) -> None:
        if position < _HOT_BYTES:
            self._hot_held[position // limits.MAX_PAYLOAD_BYTES] = False
        else:
            self._allocator.give_back(position)


class Ring(PieceAllocator):
    """Memory for the pieces of a disk; `take` returns None when no piece is free.

    `beside_bytes` of the same memory lie behind the ring, for others to use.
    """

    def __init__(self, beside_bytes: int = 0) -> None:
        super().__init__()
        size = RING_BYTES + beside_bytes
        self._fd = _sealed_memory(size)
        self._map = mmap.mmap(-1 if self._fd is None else self._fd, size)
        self.view = memoryview(self._map)

    @property
    def shared_at(self) -> str:
        """The path by which a process of the same user on this host can open it; empty: none."""
        return "" if self._fd is None else f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def fd(self) -> int | None:
        """The memory file; None where there is none."""
        return self._fd

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        # The mapping lives on while a message that is still being sent needs it.


def _sealed_memory(size: int) -> int | None:
    """A memory file; None where none is to be had (a limit on file sizes)."""
    fd = os.memfd_create("vmapipe-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # The archiver that maps it must be able to trust its length: a shorter
        # file would kill it by SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(fd)
        return None
    return fd
