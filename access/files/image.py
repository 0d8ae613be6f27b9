# SPDX-License-Identifier: Apache-2.0
"""A volume as The Sleuth Kit reads it: with the blocks of its journal, and up to damage."""

from __future__ import annotations

from collections.abc import Iterator

import pytsk3

from vmapipe.access.files import ext
from vmapipe.access.files.messages import MAX_READ_BYTES
from vmapipe.access.files.sources import ByteSource

# How exactly a damaged place is found: a block of most file systems.
_STEP_BYTES = 4096


class ParserImage(pytsk3.Img_Info):  # type: ignore[misc]
    """A volume, with blocks that a journal holds in place of the volume's."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._replayed: ext.Replayed | None = None
        self._block_bytes = 0
        self._journal: list[int] = []
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def use(self, replayed: ext.Replayed, journal: list[int], block_bytes: int) -> None:
        """`journal`: the file system's blocks that the journal is in."""
        self._replayed, self._journal, self._block_bytes = replayed, journal, block_bytes

    def get_size(self) -> int:
        return self._source.size_bytes

    def close(self) -> None:
        """There is nothing to close."""

    def read(self, offset: int, length: int) -> bytes:
        """Called by the parser, too. Raises OSError."""
        length = max(0, min(length, self._source.size_bytes - offset))
        raw = b"".join(self._pieces(offset, length))
        if self._replayed is None or not self._replayed.blocks:
            return raw
        size, data = self._block_bytes, bytearray(raw)
        for block in range(offset // size, (offset + len(raw) - 1) // size + 1):
            place = self._replayed.blocks.get(block)
            if place is None or place >= len(self._journal):
                continue
            start = self._journal[place] * size
            new = self._replayed.content(block, b"".join(self._pieces(start, size)))
            low, high = max(offset, block * size), min(offset + len(raw), (block + 1) * size)
            data[low - offset : high - offset] = new[low - block * size : high - block * size]
        return bytes(data)

    def _pieces(self, offset: int, length: int) -> Iterator[bytes]:
        """What is there up to the end, or up to a damaged place. Raises OSError for that itself.

        The parser reads ahead, 64 KiB at a time: damage behind what it needs must not cost it that.
        """
        done = 0
        while done < length:
            at, size = offset + done, min(length - done, MAX_READ_BYTES)
            try:
                piece = self._source.read(at, size)
            except OSError:
                piece = self._before_damage(at, size)
                if not piece and not done:
                    raise
                yield piece
                return
            if not piece:
                return
            yield piece
            done += len(piece)

    def _before_damage(self, at: int, size: int) -> bytes:
        found = b""
        try:
            while len(found) < size:
                step = _STEP_BYTES - (at + len(found)) % _STEP_BYTES
                found += self._source.read(at + len(found), min(step, size - len(found)))
        except OSError:
            pass
        return found
