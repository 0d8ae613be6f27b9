# SPDX-License-Identifier: Apache-2.0
"""How much of what connections have sent has not come out as messages: bounded for each, and for all. Pure.

ZeroMQ holds the parts of a message until the last one has come, however many they are, and
messages until they are taken. At an archiver's port the process that relays connections sees how
much goes in, the one with the socket how much comes out (archiver/listener/acceptor.py and socket.py). The
first one reads no further than the other has answered, so that the bounds hold however busy that one is.
"""

from __future__ import annotations

# The other process hears so often how much a connection has sent ...
TOLD_BYTES = 4 << 20
# ... and a connection is read so much further than it has answered: two of these, so that honest
# ones do not wait for an answer.
WINDOW_BYTES = 2 * TOLD_BYTES
# A connection with more than this is ended: more than a producer may have under way,
# which is its credit, 16 MiB, once more over a new connection, and a message that is incomplete.
MOST_BYTES = 48 << 20
# No connection is read any further while all of them together have so much.
MOST_TOGETHER_BYTES = 512 << 20
# Of each part: its frame's head and what encryption adds.
PART_BYTES = 42
# Heartbeats, which never come out.
_HEARTBEAT_BYTES_S = 64
# With so much of what all may have, connections without a message for so long are ended, the largest
# first. Honest ones come out in some tenths of a second there, and resume after an end.
_CROWDED = 0.75
_SILENT_S = 2.0


class AllUnfinished:
    """The unanswered data of all relayed connections, `most_bytes` at most."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.open_bytes = 0

    @property
    def is_full(self) -> bool:
        return self.open_bytes >= self.most_bytes

    @property
    def is_half_full(self) -> bool:
        """Return whether connections that have sent little should be told about, too."""
        return 2 * self.open_bytes >= self.most_bytes


class Unfinished:
    """The data that one relayed connection has sent, and how much of it was answered."""

    def __init__(self, together: AllUnfinished) -> None:
        self._together = together
        self._sent_bytes = 0
        self._told_bytes = 0
        self._answered_bytes = 0
        self._finished_bytes = 0

    @property
    def may_send(self) -> bool:
        within_window = self._sent_bytes - self._answered_bytes < WINDOW_BYTES
        return within_window and not self._together.is_full

    @property
    def is_due(self) -> bool:
        """Return whether so much was sent that the other process should hear of it."""
        return self._sent_bytes - self._told_bytes >= TOLD_BYTES

    @property
    def is_open(self) -> bool:
        return self._sent_bytes > self._finished_bytes

    def sent(self, sent_bytes: int) -> None:
        """Note how much was sent in all."""
        self._together.open_bytes += sent_bytes - self._sent_bytes
        self._sent_bytes = sent_bytes

    def tell(self) -> int:
        """Return how much was sent in all, to be told to the other process."""
        self._told_bytes = self._sent_bytes
        return self._sent_bytes

    def answered(self, sent_bytes: int, finished_bytes: int) -> None:
        """Note the answer: of `sent_bytes` so many came out as messages."""
        self._answered_bytes = min(max(sent_bytes, self._answered_bytes), self._sent_bytes)
        finished_bytes = min(max(finished_bytes, self._finished_bytes), self._sent_bytes)
        self._together.open_bytes -= finished_bytes - self._finished_bytes
        self._finished_bytes = finished_bytes

    def close(self) -> None:
        """The connection has ended, and what it had sent is thrown away."""
        self._together.open_bytes -= self._sent_bytes - self._finished_bytes
        self._finished_bytes = self._sent_bytes


class _Came:
    """Bytes that came in over a connection, and that came out of it as messages. `since`: when the first was told."""

    __slots__ = ("in_before_message_bytes", "in_bytes", "message_at", "out_bytes", "since")

    def __init__(self) -> None:
        self.in_bytes = 0
        self.out_bytes = 0
        self.since = 0.0
        #: At the last message: what had come in by then.
        self.message_at = 0.0
        self.in_before_message_bytes = 0

    def unfinished_bytes(self, now: float) -> int:
        beats = int(_HEARTBEAT_BYTES_S * (now - self.since)) if self.since else 0
        return max(0, self.in_bytes - self.out_bytes - beats)


class MessageLedger:
    """Counts bytes into and messages out of a ZeroMQ socket, by connection, and which connections to end for it."""

    def __init__(self, most_bytes: int, most_together_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._crowded_bytes = _CROWDED * most_together_bytes
        self._came: dict[int, _Came] = {}

    def open(self, connection: int) -> None:
        self._came[connection] = _Came()

    def close(self, connection: int) -> None:
        self._came.pop(connection, None)

    def came_in(self, connection: int, in_bytes: int, now: float) -> int:
        """Return how many of the `in_bytes` that a connection has sent in all have come out."""
        came = self._came[connection]
        if not came.since:
            came.since = came.message_at = now
        came.in_bytes = in_bytes
        # What came out was counted with a little too much: that is not credit.
        came.out_bytes = min(came.out_bytes, in_bytes)
        return in_bytes - came.unfinished_bytes(now)

    def came_out(self, connection: int, out_bytes: int, now: float) -> None:
        """Note a message that came out."""
        came = self._came.get(connection)
        if came is not None:
            came.out_bytes += out_bytes
            came.message_at = now
            came.in_before_message_bytes = came.in_bytes

    def to_end(self, now: float) -> list[int]:
        """Return the connections that send messages without an end."""
        unfinished = {each: came.unfinished_bytes(now) for each, came in self._came.items()}
        excessive = [each for each, count in unfinished.items() if count > self._most_bytes]
        if excessive or sum(unfinished.values()) < self._crowded_bytes:
            return excessive

        def since_message_bytes(each: int) -> int:
            return self._came[each].in_bytes - self._came[each].in_before_message_bytes

        silent = [
            each
            for each, count in unfinished.items()
            if count and now - self._came[each].message_at >= _SILENT_S
        ]
        return [max(silent, key=since_message_bytes)] if silent else []
