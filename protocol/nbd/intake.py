# SPDX-License-Identifier: Apache-2.0
"""Gathers one structure of known length after the other from pieces of any length."""

from __future__ import annotations


class Intake:
    """Its memory grows with what has come, not with what was announced."""

    def __init__(self, count: int) -> None:
        #: Bytes that the structure still lacks.
        self.missing_bytes = count
        self._keep = True
        self._held = bytearray()

    def expect(self, count: int, *, keep: bool = True) -> None:
        """The next structure has `count` bytes; without `keep` they are dropped as they come."""
        self.missing_bytes = count
        self._keep = keep

    def add(self, piece: memoryview) -> memoryview:
        """Take what belongs to the structure; returns what is left of the piece."""
        taken = min(self.missing_bytes, len(piece))
        if self._keep:
            self._held += piece[:taken]
        self.missing_bytes -= taken
        return piece[taken:]

    def take(self) -> bytes:
        """The structure, when nothing is missing any more; empty if it was not kept."""
        whole = bytes(self._held)
        self._held.clear()
        return whole
