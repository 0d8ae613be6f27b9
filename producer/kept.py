# SPDX-License-Identifier: Apache-2.0
"""What was sent and is not acknowledged: kept, because a lost connection may have lost it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from vmapipe.protocol.packing import Part


class Kept:
    """Data messages, oldest first. Credit bounds them; their data stays where it is."""

    def __init__(self) -> None:
        self._messages: deque[tuple[int, list[Part]]] = deque()

    def add(self, seq: int, parts: list[Part]) -> None:
        self._messages.append((seq, parts))

    def release(self, acked: int) -> None:
        """Those up to this number are written."""
        while self._messages and self._messages[0][0] <= acked:
            self._messages.popleft()

    def behind(self, received: int) -> Iterator[list[Part]]:
        """Those that have not arrived."""
        for seq, parts in self._messages:
            if seq > received:
                yield parts
