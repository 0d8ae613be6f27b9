# SPDX-License-Identifier: Apache-2.0
"""What a console has said: a window to search in, and a beginning and an end to keep. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from vmapipe.access.drill.signs import plain

# A boot's messages are some 100 KiB; a guest may write for ever.
_HEAD_BYTES, _TAIL_BYTES = 512 << 10, 512 << 10
# So much is searched at a time: what a pattern looks for is shorter, and one of somebody's
# who writes quickly is not passed over.
_WINDOW_CHARS, _PIECE_BYTES = 8192, 4096


class Transcript:
    """One console. `window`: its latest text, without colours and cursor movements."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0
        self._raw = ""
        self.window = ""
        self.total_bytes = 0

    def feed(self, data: bytes) -> Iterator[str]:
        """Take what has come; yield the window after each piece of it."""
        self.total_bytes += len(data)
        room = _HEAD_BYTES - len(self._head)
        self._head += data[:room] if room > 0 else b""
        self._tail += data[max(0, room) :]
        surplus = len(self._tail) - _TAIL_BYTES
        if surplus > 0:
            del self._tail[:surplus]
            self._left_out += surplus
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES].decode(errors="replace")
            self._raw = (self._raw + piece)[-_WINDOW_CHARS:]
            self.window = plain(self._raw)
            yield self.window

    def forget(self) -> None:
        """What was said so far is not searched any more: the machine has started anew."""
        self._raw = self.window = ""

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.window.splitlines()]
        return next((line for line in reversed(lines) if line), "")

    def kept(self) -> bytes:
        """Return all of it, or its beginning and its end."""
        if not self._left_out:
            return bytes(self._head + self._tail)
        note = f"\n[{self._left_out} bytes are left out here]\n".encode()
        return bytes(self._head) + note + bytes(self._tail)
