# SPDX-License-Identifier: Apache-2.0
"""Peers that belong to no job: how many of them there may be, and how much each is told. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

# Refusals that one connection hears; then it is closed. An honest client needs one.
MAX_REFUSALS = 16
# Lines of a client's in the log at once, and one more in so many seconds: a log that
# one client can fill is no log.
_LINES = 10
_LINE_S = 10.0
# Clients that are counted; more than any service has.
_MAX_CLIENTS = 4096


class Visitors:
    """`most`: of all clients together; one client may have a quarter of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        # In the order of their coming.
        self._clients: dict[bytes, str] = {}
        self._refusals: Counter[bytes] = Counter()

    def met(self, peer: bytes, client: str) -> bytes | None:
        """It has spoken, and belongs to no job; returns who has to go for it."""
        if peer in self._clients:
            return None
        self._clients[peer] = client
        counts = Counter(self._clients.values())
        most_own = max(1, self._most // 4) if client else self._most
        if counts[client] > most_own:
            crowd = client
        elif len(self._clients) > self._most:
            crowd = counts.most_common(1)[0][0]
        else:
            return None
        oldest = next(other for other, its in self._clients.items() if its == crowd)
        self.left(oldest)
        return oldest

    def left(self, peer: bytes) -> None:
        """It is gone, or belongs to a job now."""
        self._clients.pop(peer, None)
        self._refusals.pop(peer, None)

    def of(self, client: str) -> list[bytes]:
        return [peer for peer, its in self._clients.items() if its == client]

    def may_hear(self, peer: bytes) -> bool:
        """Whether one more refusal may be sent to it: it may not be reading them."""
        self._refusals[peer] += 1
        if len(self._refusals) > _MAX_CLIENTS:
            del self._refusals[next(iter(self._refusals))]
        return self._refusals[peer] <= MAX_REFUSALS


class LogLimit:
    """For each client, how many lines of its making come into the log."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}
        self._at: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def may_say(self, client: str, now: float) -> bool:
        left = self._left.get(client, float(_LINES))
        left = min(float(_LINES), left + (now - self._at.get(client, now)) / _LINE_S)
        self._at[client] = now
        self._left[client] = left
        if left < 1.0:
            self._unsaid[client] += 1
            return False
        self._left[client] = left - 1.0
        if len(self._at) > _MAX_CLIENTS:
            oldest = next(iter(self._at))
            del self._at[oldest], self._left[oldest]
        return True

    def more(self, now: float) -> Iterator[str]:
        """What was left out, when there is room for a line about it."""
        for client in list(self._unsaid):
            if now - self._at[client] < _LINE_S and self._left[client] < 0.5:
                continue
            count = self._unsaid.pop(client)
            who = f"client {client!r}" if client else "clients"
            yield f"{count} more lines about {who} were left out"
