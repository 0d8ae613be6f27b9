# SPDX-License-Identifier: Apache-2.0
"""A fuzzer's bytes as choices."""

from __future__ import annotations


class Bytes:
    """Bytes as a source of choices; when they are used up, of zeroes."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        piece = bytes(self._data[self._at : self._at + count])
        self._at += count
        return piece

    def number(self, width: int = 1) -> int:
        return int.from_bytes(self.take(width), "little")
