# SPDX-License-Identifier: Apache-2.0
"""The memory that arriving data lies in: taken in order, given back in any order."""

from __future__ import annotations

from collections import deque


class _Piece:
    __slots__ = ("end", "free", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.free = False


class Room:
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
        """Where `length` bytes are yours until `give_back`; None: there is no room now."""
        position = self._find(length)
        if position is not None:
            piece = _Piece(position, position + length)
            self._pieces.append(piece)
            self._by_start[position] = piece
            self._head = piece.end
            self.used += length
        return position

    def give_back(self, position: int) -> None:
        piece = self._by_start.pop(position)
        piece.free = True
        self.used -= piece.end - piece.start
        while self._pieces and self._pieces[0].free:
            self._pieces.popleft()

    def _find(self, length: int) -> int | None:
        if not self._pieces:
            return self._start if length <= self._end - self._start else None
        tail = self._pieces[0].start
        if self._head > tail:
            if self._head + length <= self._end:
                return self._head
            # Strictly below: a head that meets the tail would look like an empty ring.
            return self._start if self._start + length < tail else None
        return self._head if self._head + length < tail else None
