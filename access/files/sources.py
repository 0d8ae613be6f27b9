# SPDX-License-Identifier: Apache-2.0
"""Bytes that a file system may lie in: a disk, a part of one, or what is mapped onto several."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

#: Offset and length to bytes; fewer at the end. Raises OSError where they cannot be read.
Read = Callable[[int, int], bytes]


class ByteSource(NamedTuple):
    """Readable bytes of a known size."""

    read: Read
    size_bytes: int


class Piece(NamedTuple):
    """`length` bytes at `start` of a mapped volume: striped over `targets`, source and offset.

    `stripe_bytes` go to one target, then the next; with one target they do not matter.
    """

    start: int
    length: int
    targets: tuple[tuple[ByteSource, int], ...]
    stripe_bytes: int = 0


def part_of(source: ByteSource, offset: int, size_bytes: int) -> ByteSource:
    """A part, cut off where the whole ends."""
    size_bytes = max(0, min(size_bytes, source.size_bytes - offset))

    def read(at: int, length: int) -> bytes:
        length = min(length, size_bytes - at)
        return source.read(offset + at, length) if length > 0 else b""

    return ByteSource(read, size_bytes)


def mapped(pieces: Sequence[Piece]) -> ByteSource:
    """One source of pieces that follow each other without a gap."""
    starts = [piece.start for piece in pieces]
    size_bytes = pieces[-1].start + pieces[-1].length if pieces else 0

    def read(offset: int, length: int) -> bytes:
        found, end = [], min(offset + length, size_bytes)
        while offset < end:
            piece = pieces[bisect.bisect_right(starts, offset) - 1]
            high = min(end, piece.start + piece.length)
            found += list(_piece_bytes(piece, offset - piece.start, high - piece.start))
            offset = high
        return b"".join(found)

    return ByteSource(read, size_bytes)


def _piece_bytes(piece: Piece, low: int, high: int) -> Iterator[bytes]:
    while low < high:
        if len(piece.targets) == 1:
            (source, base), at, length = piece.targets[0], low, high - low
        else:
            stripe, within = divmod(low, piece.stripe_bytes)
            row, column = divmod(stripe, len(piece.targets))
            source, base = piece.targets[column]
            at = row * piece.stripe_bytes + within
            length = min(high - low, piece.stripe_bytes - within)
        data = source.read(base + at, length)
        if len(data) < length:
            # Anything shorter would move what follows.
            raise OSError("it is mapped to a place behind the end of a disk")
        yield data
        low += length


def joined(stretches: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Stretches (start, end), those that touch as one. Raises OSError where they are not in order."""
    last_start = last_end = 0
    for start, end in stretches:
        if start < last_end:
            raise OSError("its extents overlap, or are not in order")
        if start > last_end:
            if last_end > last_start:
                yield last_start, last_end
            last_start = start
        last_end = max(end, start)
    if last_end > last_start:
        yield last_start, last_end
