# SPDX-License-Identifier: Apache-2.0
"""What is sent and does not come out as messages is bounded, however busy the socket's process is."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machine import LIMIT_S
from vmapipe.archiver.listener.socket import ListeningSocket
from vmapipe.protocol import unfinished
from vmapipe.protocol.unfinished import (
    TOLD_BYTES,
    WINDOW_BYTES,
    AllUnfinished,
    MessageLedger,
    Unfinished,
)

MIB = 1 << 20
MOST = 48 * MIB
TOGETHER = 128 * MIB
#: What one read of a connection may take, beyond what may be read.
PIECE = MIB // 2
GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
# A frame of 1 MiB, with more to come.
PART = b"\x03" + MIB.to_bytes(8, "big") + bytes(MIB)


class Both:
    """A relay and the socket behind it, with what is told and answered in between."""

    def __init__(self, count: int) -> None:
        self.together = AllUnfinished(TOGETHER)
        self.relayed = {each: Unfinished(self.together) for each in range(count)}
        self.ledger = MessageLedger(MOST, TOGETHER)
        self.sent_bytes = dict.fromkeys(self.relayed, 0)
        self.out_bytes = dict.fromkeys(self.relayed, 0)
        for each in self.relayed:
            self.ledger.open(each)

    @property
    def held_bytes(self) -> int:
        return sum(self.sent_bytes[each] - self.out_bytes[each] for each in self.relayed)

    def send(self, each: int, count: int) -> bool:
        """As a relay does, a piece at a time; False where it has to wait."""
        if each not in self.relayed or not self.relayed[each].may_send:
            return False
        self.sent_bytes[each] += min(count, PIECE)
        self.relayed[each].sent(self.sent_bytes[each])
        return True

    def come_out(self, each: int, now: float) -> None:
        if each in self.relayed:
            self.ledger.came_out(each, self.sent_bytes[each] - self.out_bytes[each], now)
            self.out_bytes[each] = self.sent_bytes[each]

    def look(self, now: float) -> list[int]:
        """What the socket's process does when it has the time."""
        for each, relayed in self.relayed.items():
            if relayed.is_due or relayed.is_open:
                told = relayed.tell()
                relayed.answered(told, self.ledger.came_in(each, told, now))
        ended = self.ledger.to_end(now)
        for each in ended:
            self.ledger.close(each)
            self.relayed.pop(each).close()
        return ended


_STEPS = st.lists(
    st.tuples(st.sampled_from("ssssol"), st.integers(0, 7), st.integers(1, PIECE)), max_size=60
)


@given(_STEPS, st.integers(1, 60))
def test_no_order_of_events_lets_in_more_than_the_bounds(
    steps: list[tuple[str, int, int]], times: int
) -> None:
    both = Both(8)
    for number, (what, each, count) in enumerate(steps):
        if what == "s":
            for _ in range(times):
                both.send(each, count)
        elif what == "o":
            both.come_out(each, float(number))
        else:
            both.look(float(number))
        open_bytes = sum(both.sent_bytes[e] - both.out_bytes[e] for e in both.relayed)
        assert open_bytes <= TOGETHER + PIECE
        for e in both.relayed:
            assert both.sent_bytes[e] - both.out_bytes[e] <= MOST + WINDOW_BYTES + PIECE
    for relayed in both.relayed.values():
        relayed.close()
    assert both.together.open_bytes == 0


def test_a_connection_is_read_no_further_than_is_answered_while_nobody_looks() -> None:
    both = Both(1)
    while both.send(0, PIECE):
        pass
    assert both.held_bytes <= WINDOW_BYTES + PIECE
    both.look(1.0)
    assert both.send(0, PIECE)


def test_a_message_without_an_end_ends_its_connection() -> None:
    both, ended = Both(2), []
    for second in range(100):
        for _ in range(40):
            both.send(0, PIECE)
        ended += both.look(float(second))
    assert ended == [0]
    assert both.together.open_bytes == 0


def test_the_sum_of_many_ends_those_that_say_nothing_and_leaves_the_honest_one() -> None:
    both, ended, honest_bytes = Both(20), [], 0
    for tenth in range(200):
        now = tenth / 10
        for each in range(1, 20):
            for _ in range(4):
                if both.sent_bytes[each] < 30 * MIB:
                    both.send(each, PIECE)
        if both.send(0, PIECE):
            honest_bytes += PIECE
        both.come_out(0, now)
        ended += both.look(now)
        assert both.held_bytes - sum(both.sent_bytes[each] for each in ended) <= TOGETHER + PIECE
    assert 0 not in ended
    assert len(ended) >= 10
    # Nothing comes in while all is full, at most for some seconds.
    assert honest_bytes > 50 * PIECE


def test_honest_connections_are_only_slowed_down() -> None:
    both = Both(40)
    for tenth in range(300):
        now = tenth / 10
        for number in range(40):
            each = (number + 7 * tenth) % 40  # in no order
            # ZeroMQ reads no further while eight messages wait to be taken.
            while both.sent_bytes[each] - both.out_bytes[each] < 8 * 4 * MIB:
                if not both.send(each, PIECE):
                    break
        # The socket takes messages of one in ten of them between two looks.
        for each in range(tenth % 10, 40, 10):
            both.come_out(each, now)
        assert both.look(now) == []
    assert min(both.out_bytes.values()) > 16 * MIB


def test_an_answer_that_comes_twice_or_late_changes_nothing() -> None:
    together = AllUnfinished(TOGETHER)
    one = Unfinished(together)
    one.sent(6 * MIB)
    one.answered(6 * MIB, 5 * MIB)
    one.answered(TOLD_BYTES, TOLD_BYTES)
    one.answered(1 << 60, 1 << 60)
    assert together.open_bytes == 0
    one.sent(7 * MIB)
    assert together.open_bytes == MIB


# --- with real processes ---


@contextlib.contextmanager
def endless(listening: ListeningSocket, count: int) -> Iterator[list[socket.socket]]:
    """So many peers that are in, and have begun a message."""
    host, port = listening.endpoint.removeprefix("tcp://").split(":")
    with contextlib.ExitStack() as stack:
        peers = []
        for _ in range(count):
            peer = stack.enter_context(socket.create_connection((host, int(port)), LIMIT_S))
            peer.sendall(GREETING + READY)
            said = b""
            while b"READY" not in said:
                said += peer.recv(1000)
            peer.setblocking(False)
            peers.append(peer)
        yield peers


#: Nothing was taken for so long: nothing is taken any more.
QUIET_S = 0.4


def pour(peers: list[socket.socket], listening: ListeningSocket | None) -> int:
    """Send parts until nothing is taken any more; return how much was. `listening`: looks meanwhile."""
    left = {peer: memoryview(b"") for peer in peers}
    sent_bytes, quiet_at = 0, time.monotonic() + QUIET_S
    while left and time.monotonic() < quiet_at:
        for peer in [*left]:
            try:
                piece = left[peer] or memoryview(PART)
                count = peer.send(piece)
            except BlockingIOError:
                continue
            except OSError:
                del left[peer]  # its connection was ended
                continue
            left[peer] = piece[count:]
            sent_bytes += count
            quiet_at = time.monotonic() + QUIET_S
        if listening is None:
            time.sleep(0.001)  # not a wait for anything: the others need the processor, too
        else:
            listening.wait(0.001)
    return sent_bytes


def most_in_between() -> int:
    """What the kernel may hold of one connection, whoever reads or not: both its buffers."""
    sizes = (Path(f"/proc/sys/net/ipv4/tcp_{name}").read_text() for name in ("rmem", "wmem"))
    return sum(int(line.split()[2]) for line in sizes)


def test_while_the_socket_is_busy_little_of_an_endless_message_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfinished, "MOST_TOGETHER_BYTES", 24 * MIB)
    monkeypatch.setattr(unfinished, "_SILENT_S", 0.2)
    listening = ListeningSocket("tcp://127.0.0.1:*", None, receive_mark=8)
    try:
        with endless(listening, 1) as peers:
            # Nobody looks: the socket's own thread would take all that comes.
            assert pour(peers, None) <= WINDOW_BYTES + PIECE + most_in_between()
        with endless(listening, 6) as peers:
            assert pour(peers, None) <= 24 * MIB + PIECE + 6 * most_in_between()
            # And who looks again ends those that say nothing, one after the other.
            assert listening.take_message() is None
            deadline = time.monotonic() + LIMIT_S
            notices: list[str] = []
            while not any("no end" in text for text in notices):
                assert time.monotonic() < deadline
                listening.wait(0.05)
                notices += listening.take_notices()
    finally:
        listening.close()
