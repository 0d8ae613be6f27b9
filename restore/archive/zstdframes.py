# SPDX-License-Identifier: Apache-2.0
"""A zstd frame's header, and its blocks hopped along without decompressing. Pure.

The library does not tell a file that was cut from one that ended, nor how much memory a
frame wants before it refuses; this does both. Layout: RFC 8878, section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.restore.archive.errors import CompressionError
from vmapipe.vma.seektable import ZSTD_MAGIC

_SKIPPABLE_LOW, _SKIPPABLE_HIGH = 0x184D2A50, 0x184D2A5F
SKIPPABLE_HEADER_BYTES = 8
# Magic, descriptor, window, dictionary id, content size.
MAX_HEADER_BYTES = 4 + 1 + 1 + 4 + 8
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_RESERVED_BLOCK, _RLE_BLOCK = 3, 1
_MAX_BLOCK_BYTES = 128 << 10


class FrameHeader(NamedTuple):
    """`window_bytes`: what a decoder must hold; `plain_bytes`: None where it is not announced."""

    header_bytes: int
    window_bytes: int
    plain_bytes: int | None
    dictionary_id: int
    has_checksum: bool


def is_zstd(start: bytes) -> bool:
    """Whether a file that begins with these 4 bytes is zstd, skippable frames included."""
    return start[:4] == ZSTD_MAGIC or is_skippable(start)


def is_skippable(start: bytes) -> bool:
    """Whether these bytes begin a frame that decoders skip."""
    return len(start) >= 4 and (
        _SKIPPABLE_LOW <= int.from_bytes(start[:4], "little") <= _SKIPPABLE_HIGH
    )


def frame_header(start: bytes) -> FrameHeader | None:
    """The header of a frame that begins so; None where more bytes are needed.

    Raises ValueError where it cannot be one.
    """
    if start[:4] != ZSTD_MAGIC[: len(start)]:
        raise ValueError("not a zstd frame")
    if len(start) < 5:
        return None
    flags = start[4]
    if flags & 8:
        raise ValueError("a zstd frame of an unknown kind")
    single_segment = flags >> 5 & 1
    size_flag = flags >> 6
    size_length = _CONTENT_SIZE_BYTES[size_flag] or single_segment
    id_length = _DICTIONARY_ID_BYTES[flags & 3]
    at = 5 + (1 - single_segment)
    end = at + id_length + size_length
    if len(start) < end:
        return None
    plain_bytes: int | None = None
    if size_length:
        plain_bytes = int.from_bytes(start[at + id_length : end], "little")
        plain_bytes += 256 if size_length == 2 else 0
    window_bytes = plain_bytes or 0
    if not single_segment:
        base = 1 << 10 + (start[5] >> 3)
        window_bytes = base + base // 8 * (start[5] & 7)
    dictionary_id = int.from_bytes(start[at : at + id_length], "little")
    return FrameHeader(end, window_bytes, plain_bytes, dictionary_id, bool(flags & 4))


class FrameWalk:
    """Feed it one frame's bytes from its header on; `ended` when it has had all of them."""

    def __init__(self, name: str, header: FrameHeader, position: int) -> None:
        """`position`: where in the file the frame begins."""
        self.ended = False
        self._name = name
        self._checksum_bytes = 4 if header.has_checksum else 0
        self._position = position
        self._skip = header.header_bytes
        self._held = b""
        self._is_last = False

    def feed(self, data: bytes | memoryview) -> int:
        """Take what comes next; returns how much of it is the frame's.

        Raises CompressionError, with `sound_bytes` of `data`, where something stands that
        cannot be in a frame.
        """
        at = 0
        while at < len(data) and not self.ended:
            if self._skip:
                hop = min(self._skip, len(data) - at)
                self._skip -= hop
                at += hop
                self.ended = self._is_last and not self._skip
                continue
            hop = min(3 - len(self._held), len(data) - at)
            self._held += data[at : at + hop]
            at += hop
            if len(self._held) == 3:
                held, self._held = self._held, b""
                self._block(int.from_bytes(held, "little"), max(0, at - 3), self._position + at - 3)
        self._position += at
        return at

    def _block(self, head: int, sound_bytes: int, position: int) -> None:
        kind, size = head >> 1 & 3, head >> 3
        if kind == _RESERVED_BLOCK or (kind != _RLE_BLOCK and size > _MAX_BLOCK_BYTES):
            error = CompressionError(
                f"{self._name}: the zstd data is damaged", file_offset=position
            )
            error.sound_bytes = sound_bytes
            raise error
        self._skip = 1 if kind == _RLE_BLOCK else size
        if head & 1:
            self._is_last = True
            self._skip += self._checksum_bytes
            self.ended = not self._skip
