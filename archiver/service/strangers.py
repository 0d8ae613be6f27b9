# SPDX-License-Identifier: Apache-2.0
"""Peers that were refused: each is answered once, and the log is not flooded with them. Pure."""

from __future__ import annotations

from collections.abc import Iterator

# Remembered, so that each is answered once; a peer's name has some ten bytes.
_MAX_REMEMBERED = 4096
# One is logged with its reason only so often; of the others, their number is.
_LOG_S = 60.0


class Strangers:
    """`refused` and `more` give lines for the log."""

    def __init__(self) -> None:
        self.count = 0
        self._peers: dict[bytes, None] = {}
        self._unsaid = 0
        self._said = float("-inf")

    def is_new(self, peer: bytes) -> bool:
        """Whether it was not refused before; from now on it was."""
        if peer in self._peers:
            return False
        if len(self._peers) >= _MAX_REMEMBERED:
            del self._peers[next(iter(self._peers))]
        self._peers[peer] = None
        return True

    def refused(self, client: str, why: str, now: float) -> Iterator[str]:
        self.count += 1
        if now - self._said < _LOG_S:
            self._unsaid += 1
            return
        self._said = now
        who = f" from client {client!r}" if client else ""
        yield f"refused a stranger{who}: {why}"

    def more(self, now: float) -> Iterator[str]:
        if self._unsaid and now - self._said >= _LOG_S:
            count, self._unsaid, self._said = self._unsaid, 0, now
            yield f"{count} more strangers were refused"
