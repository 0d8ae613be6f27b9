# SPDX-License-Identifier: Apache-2.0
"""Hops along the frames and blocks of a zstd file without decompressing.

The library does not tell a file that was cut from one that ended; this does,
and says where. Layout: RFC 8878, section 3.1.
"""

from __future__ import annotations

from vmapipe.restore.errors import CompressionError
from vmapipe.vma.seektable import ZSTD_MAGIC

_SKIPPABLE_LOW, _SKIPPABLE_HIGH = 0x184D2A50, 0x184D2A5F
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_RESERVED_BLOCK, _RLE_BLOCK = 3, 1


def is_zstd(start: bytes) -> bool:
    """Whether a file that begins with these 4 bytes is zstd, skippable frames included."""
    magic = int.from_bytes(start[:4], "little")
    return start[:4] == ZSTD_MAGIC or _SKIPPABLE_LOW <= magic <= _SKIPPABLE_HIGH


class FrameWalk:
    """Feed it the file's bytes; it knows whether the file may end here.

    `error` is set where something stands that is no zstd; nothing is taken
    from there on.
    """

    def __init__(self, name: str, position: int = 0) -> None:
        self.position = position
        self.frames = 0
        self.error: CompressionError | None = None
        self._name = name
        self._skip = 0
        self._held = b""
        self._step = self._magic
        self._need = 4
        self._has_checksum = False

    @property
    def between_frames(self) -> bool:
        return self._step == self._magic and not self._held and not self._skip

    def feed(self, data: bytes | memoryview) -> int:
        """Take what comes next; returns how much of it is sound (all, or up to `error`)."""
        if self.error is not None:
            return 0
        at = 0
        while at < len(data):
            if self._skip:
                hop = min(self._skip, len(data) - at)
                self._skip -= hop
                at += hop
                self.position += hop
                continue
            hop = min(self._need - len(self._held), len(data) - at)
            self._held += data[at : at + hop]
            at += hop
            self.position += hop
            if len(self._held) == self._need:
                held, self._held = self._held, b""
                try:
                    self._step(held, self.position - len(held))
                except CompressionError as error:
                    self.error = error
                    return max(0, at - len(held))
        return at

    def finish(self) -> None:
        """The file has ended. Raises CompressionError where it must not."""
        if self.error is not None:
            raise self.error
        if not self.between_frames:
            raise CompressionError(
                f"{self._name} is cut off inside a zstd frame", file_offset=self.position
            )

    def _bad(self, what: str, position: int) -> CompressionError:
        return CompressionError(f"{self._name}: {what}", file_offset=position)

    def _magic(self, held: bytes, position: int) -> None:
        if held == ZSTD_MAGIC:
            self._step, self._need = self._descriptor, 1
        elif is_zstd(held):
            self._step, self._need = self._skippable, 4
        else:
            what = "garbage after the last zstd frame" if self.frames else "no zstd frame"
            raise self._bad(what, position)

    def _skippable(self, held: bytes, position: int) -> None:
        self._skip = int.from_bytes(held, "little")
        self._frame_ends()

    def _descriptor(self, held: bytes, position: int) -> None:
        flags = held[0]
        single_segment = flags >> 5 & 1
        self._has_checksum = bool(flags & 4)
        if flags & 8:
            raise self._bad("a zstd frame of an unknown kind", position)
        size_flag = flags >> 6
        content_size = _CONTENT_SIZE_BYTES[size_flag] or single_segment
        self._skip = (1 - single_segment) + _DICTIONARY_ID_BYTES[flags & 3] + content_size
        self._step, self._need = self._block, 3

    def _block(self, held: bytes, position: int) -> None:
        head = int.from_bytes(held, "little")
        kind, size = head >> 1 & 3, head >> 3
        if kind == _RESERVED_BLOCK:
            raise self._bad("the zstd data is damaged", position)
        self._skip = 1 if kind == _RLE_BLOCK else size
        if head & 1:
            self._skip += 4 if self._has_checksum else 0
            self._frame_ends()

    def _frame_ends(self) -> None:
        self.frames += 1
        self._step, self._need = self._magic, 4
