# SPDX-License-Identifier: Apache-2.0
"""The producers of one job: by their connections, and known again on a new one. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vmapipe.archiver.device import DeviceState
from vmapipe.protocol import limits
from vmapipe.protocol.archiver_side import ArchiverSide, State
from vmapipe.protocol.errors import connection_lost

# Of whom is remembered that nothing more is to be heard: strangers that were
# refused, each once, and connections that a producer has left.
_MAX_IGNORED = 1024


class Lost(NamedTuple):
    """A producer that the job cannot go on without."""

    reason: str


@dataclass(slots=True)
class Peer:
    """One producer. `client`: who it has proved to be; empty: nobody has to."""

    side: ArchiverSide
    heard: float
    client: str
    device: DeviceState | None = None
    #: Its connection's number: an older one is left behind.
    attempt: int = 0
    #: It was said that nothing comes from it.
    missed: bool = False

    def miss(self, silence_s: float, heartbeat_s: int, *, gathering: bool) -> Lost | str:
        """What follows from its silence: the job's end, a line in the log, or nothing (empty)."""
        side = self.side
        # Before WELCOME a producer does not know our limit.
        least_s = limits.GREETING_HEARTBEAT_S if gathering else side.reconnect_s
        limit_s = max(heartbeat_s, least_s)
        if silence_s <= heartbeat_s or side.state is State.CLOSED:
            return ""
        if silence_s > limit_s:
            if side.state is State.TOLD:
                side.state = State.CLOSED
                return f"{connection_lost(side.device, limit_s)}, after all was stored"
            if side.reconnect_s:
                return Lost(connection_lost(side.device, limit_s))
            return Lost(f"the producer of device {side.device!r} has been silent for {limit_s} s")
        if not side.reconnect_s or self.missed:
            return ""
        self.missed = True
        return f"device {side.device!r}: nothing comes; it is waited for, up to {limit_s} s"


class Peers:
    """In the order in which they came."""

    def __init__(self) -> None:
        self._peers: dict[bytes, Peer] = {}
        # In the order of their coming; a dict, because a set has none.
        self._ignored: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[tuple[bytes, Peer]]:
        return iter(self._peers.items())

    @property
    def all(self) -> list[Peer]:
        return list(self._peers.values())

    def get(self, at: bytes) -> Peer | None:
        return self._peers.get(at)

    def add(self, at: bytes, peer: Peer) -> None:
        self._peers[at] = peer

    def of_device(self, name: str) -> Peer | None:
        return next((peer for peer in self.all if peer.side.device == name), None)

    def of_session(self, session: bytes, client: str) -> bytes | None:
        """Where the producer is that began this session, if it was this client."""
        for at, peer in self:
            if session and peer.side.session == session and peer.client == client:
                return at
        return None

    def move(self, old: bytes, new: bytes, attempt: int, now: float) -> tuple[Peer, float] | None:
        """A producer has come over a new connection; what still comes over the old one is ignored.

        Returns it, and for how long it was silent; None when `new` is the older one, and late.
        """
        peer = self._peers[old]
        if attempt <= peer.attempt:
            self.ignore(new)
            return None
        peer.attempt = attempt
        silence_s, peer.heard, peer.missed = now - peer.heard, now, False
        if peer.device:
            peer.device.peer = new
        self._peers = {new if at == old else at: each for at, each in self}
        self.ignore(old)
        return peer, silence_s

    def is_ignored(self, at: bytes) -> bool:
        peer = self._peers.get(at)
        return at in self._ignored or (peer is not None and peer.side.state is State.CLOSED)

    def ignore(self, at: bytes) -> None:
        while len(self._ignored) >= _MAX_IGNORED:
            del self._ignored[next(iter(self._ignored))]
        self._ignored[at] = None
