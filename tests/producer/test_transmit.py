# SPDX-License-Identifier: Apache-2.0
"""One session, with a link and a clock that the test holds in its hands."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from tests.producer.memorydisk import MemoryDisk
from vmapipe.producer import disk_feed as disk_feed_module
from vmapipe.producer import session as session_module
from vmapipe.producer import transmit as transmit_module
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.producer.disk_feed import DiskFeed
from vmapipe.producer.session import RefusedByArchiver, Session
from vmapipe.producer.shared_memory import Ring
from vmapipe.producer.source import DiskSourceError, Segment
from vmapipe.producer.transmit import transmit
from vmapipe.protocol import limits
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import Fail, Hello, Message, Ping
from vmapipe.protocol.transfer_state import ArchiverSide
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import Emit, Event, ignore
from vmapipe.runtime.rate_limit import RateLimiter

JOB = bytes(16)
CLUSTER = 65536


class Archiver:
    """The far end of a link, in memory; time passes only while the producer waits."""

    is_local = False
    is_settled = False
    lost = False

    def __init__(self, *, answers: bool = True, window: int = 1 << 20) -> None:
        self.now = 0.0
        self.heard: list[Message] = []
        self.side = ArchiverSide()
        self._answers = answers
        self._window = window
        self._mail: deque[list[bytes]] = deque()

    def send(self, parts: Sequence[Part]) -> None:
        message = self.side.receive([bytes(part) for part in parts])
        self.heard.append(message)
        if not self._answers:
            return
        match message:
            case Hello():
                frame = max(limits.MIN_FRAME_CHARGE, self._window // 2)
                self.post(self.side.welcome(1, self._window, frame, 9))
            case Ping():
                self.post(self.side.pong())
            case _:
                limit = self.side.charged + self._window
                self.post(self.side.grant(limit, self.side.received_frames))
                if self.side.state.value == "ended":
                    self.post(self.side.done(bytes(16)))

    def post(self, parts: list[Part] | None) -> None:
        if parts is not None:
            self._mail.append([bytes(part) for part in parts])

    def receive(self) -> list[bytes] | None:
        return self._mail.popleft() if self._mail else None

    def wait(self, timeout_s: float) -> None:
        if not self._mail:
            self.now += max(timeout_s, 0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Archiver]:
    """Put the archiver whose clock counts into the list."""
    holder: list[Archiver] = []
    for module in (disk_feed_module, session_module, transmit_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: holder[0].now))
    return holder


class Sender:
    """One disk, and all that sends it to the archiver."""

    def __init__(
        self, disk: MemoryDisk, archiver: Archiver, limiter: RateLimiter, cancel: Cancel
    ) -> None:
        self.ring = Ring()
        connection = cast(ArchiverConnection, archiver)
        self.session = Session("disk", disk.size_bytes, connection, JOB, self.ring, cancel)
        self.feed = DiskFeed(disk, self.ring, self.session, limiter)
        self.cancel = cancel

    def run(self, emit: Emit) -> None:
        try:
            transmit(self.feed, self.session, emit)
        finally:
            self.ring.close()

    @property
    def zero_clusters(self) -> int:
        return self.session.zero_clusters


def sender(
    disk: MemoryDisk, archiver: Archiver, clock: list[Archiver], speed: int = 0
) -> tuple[Sender, Cancel]:
    clock.append(archiver)
    cancel = Cancel()
    return Sender(disk, archiver, RateLimiter(speed, 0.0), cancel), cancel


def test_a_whole_disk_goes_through_the_smallest_window(clock: list[Archiver]) -> None:
    disk = MemoryDisk(b"A" * (40 * CLUSTER) + bytes(9 * CLUSTER) + b"B" * 100)
    archiver = Archiver(window=limits.MIN_WINDOW_BYTES)
    producer, cancel = sender(disk, archiver, clock)
    producer.run(ignore)
    assert archiver.side.received_clusters == 50
    assert producer.zero_clusters == 9
    cancel.close()


def test_a_silent_archiver_ends_the_producer_after_the_limit_and_is_named(
    clock: list[Archiver],
) -> None:
    archiver = Archiver(answers=False)
    producer, cancel = sender(MemoryDisk(b"A"), archiver, clock)
    with pytest.raises(Failure, match=r"'disk': the archiver has been silent for 30 s"):
        producer.run(ignore)
    assert 30 < archiver.now < 41
    assert sum(isinstance(message, Ping) for message in archiver.heard) == 3
    cancel.close()


def test_a_producer_that_sends_all_the_time_asks_an_archiver_that_has_nothing_to_say(
    clock: list[Archiver],
) -> None:
    class Terse(Archiver):
        def post(self, parts: list[Part] | None) -> None:
            # So much credit that there is never a reason for more.
            if parts is not None and (
                self.side.state.value == "closed" or b"GRANT" not in parts[0]
            ):
                super().post(parts)

    archiver = Terse(window=64 << 20)
    # A cluster every two seconds, for two minutes; the limit is nine seconds.
    producer, cancel = sender(MemoryDisk(b"A" * (60 * CLUSTER)), archiver, clock, CLUSTER // 2)
    producer.run(ignore)
    assert archiver.now > 100
    cancel.close()


def test_a_disk_of_zeroes_that_takes_long_to_read_keeps_its_session_alive(
    clock: list[Archiver],
) -> None:
    class Slow(MemoryDisk):
        def read_into(self, buffer: memoryview, offset: int) -> None:
            archiver.now += 2.0
            super().read_into(buffer, offset)

    archiver = Archiver(window=limits.MIN_WINDOW_BYTES)
    # Nothing is to be sent before all is read, two minutes later; the limit is nine seconds.
    producer, cancel = sender(Slow(bytes(60 * CLUSTER)), archiver, clock)
    producer.run(ignore)
    assert archiver.now > 120
    assert sum(isinstance(message, Ping) for message in archiver.heard) > 20
    cancel.close()


def test_waiting_for_other_producers_is_not_taken_for_silence(clock: list[Archiver]) -> None:
    class Late(Archiver):
        def send(self, parts: Sequence[Part]) -> None:
            # HELLO is left without an answer; what comes later is answered.
            self._answers = bool(self.heard)
            super().send(parts)

        def wait(self, timeout_s: float) -> None:
            super().wait(timeout_s)
            if self.now > 300 and self.side.state.value == "waiting":
                self.post(self.side.welcome(1, 1 << 20, 1 << 19, 9))

    archiver = Late()
    producer, cancel = sender(MemoryDisk(b"A"), archiver, clock)
    producer.run(ignore)
    assert archiver.now > 300
    cancel.close()


def test_a_read_error_is_told_to_the_archiver_in_the_same_words(clock: list[Archiver]) -> None:
    class Broken(MemoryDisk):
        def read_into(self, buffer: memoryview, offset: int) -> None:
            if offset >= 20 * CLUSTER:
                raise DiskSourceError(f"disk 'disk': cannot read x at offset {offset}: broken")
            super().read_into(buffer, offset)

    archiver = Archiver()
    producer, cancel = sender(Broken(b"A" * 64 * CLUSTER), archiver, clock)
    with pytest.raises(DiskSourceError, match="broken") as caught:
        producer.run(ignore)
    assert archiver.heard[-1] == Fail(str(caught.value))
    cancel.close()


def test_a_refusal_ends_the_producer_with_the_reason(clock: list[Archiver]) -> None:
    archiver = Archiver(answers=False)
    archiver.post(ArchiverSide().refuse("unknown-device", "no such device"))
    producer, cancel = sender(MemoryDisk(b"A"), archiver, clock)
    with pytest.raises(
        RefusedByArchiver, match=r"refused 'disk': no such device \[unknown-device\]"
    ):
        producer.run(ignore)
    assert not any(isinstance(message, Fail) for message in archiver.heard)
    cancel.close()


def test_a_stop_is_told_to_the_archiver(clock: list[Archiver]) -> None:
    archiver = Archiver()
    producer, cancel = sender(MemoryDisk(b"A" * 64 * CLUSTER), archiver, clock)
    cancel.ask("cancelled by SIGTERM", 15)
    with pytest.raises(Cancelled) as caught:
        producer.run(ignore)
    assert caught.value.exit_code == 143
    assert archiver.heard[-1] == Fail("cancelled by SIGTERM")
    cancel.close()


@pytest.mark.parametrize("speed", [256 << 10, 1 << 20, 8 << 20])
def test_the_speed_limit_holds_within_5_per_cent(clock: list[Archiver], speed: int) -> None:
    archiver = Archiver(window=8 << 20)
    disk = MemoryDisk(b"A" * (5 * speed))
    producer, cancel = sender(disk, archiver, clock, speed)
    producer.run(ignore)
    # The last piece is not waited for.
    assert archiver.now == pytest.approx(5, rel=0.05)
    cancel.close()


def test_a_limit_that_changes_holds_from_then_on(clock: list[Archiver]) -> None:
    """4 s at 1 MiB/s, then 8 MiB/s, then none: the rest goes at once."""
    at = {4: 8 << 20, 6: 0}

    class Timed(Archiver):
        def wait(self, timeout_s: float) -> None:
            super().wait(timeout_s)
            for when in [when for when in at if self.now >= when]:
                read.append(disk.read_bytes)
                limiter.change(at.pop(when))

    class Counted(MemoryDisk):
        read_bytes = 0

        def read_into(self, buffer: memoryview, offset: int) -> None:
            self.read_bytes += len(buffer)
            super().read_into(buffer, offset)

    read: list[int] = []
    disk = Counted(b"A" * (64 << 20))
    archiver = Timed(window=8 << 20)
    clock.append(archiver)
    cancel = Cancel()
    limiter = RateLimiter(1 << 20, 0.0)
    Sender(disk, archiver, limiter, cancel).run(ignore)
    assert read == [
        pytest.approx(4 << 20, rel=0.05),
        pytest.approx((4 << 20) + (16 << 20), rel=0.05),
    ]
    assert archiver.now < 6.5
    cancel.close()


@pytest.mark.parametrize("before", [0, 32 << 20, 1 << 20])
def test_a_much_lower_limit_is_followed_at_once(clock: list[Archiver], before: int) -> None:
    """From the order on no piece of the old size: the next ten seconds have what they may have."""
    slow = 128 << 10

    class Timed(Archiver):
        told_at = 0.0
        read_then = 0

        def wait(self, timeout_s: float) -> None:
            self._tell()
            super().wait(timeout_s)

        def send(self, parts: Sequence[Part]) -> None:
            super().send(parts)
            self._tell()

        def _tell(self) -> None:
            if not self.told_at and disk.read_bytes >= 4 << 20:
                limiter.change(slow)
                self.told_at, self.read_then = self.now + 1e-9, disk.read_bytes
            if self.told_at and self.now >= self.told_at + 10:
                cancel.ask("enough", 15)

    class Counted(MemoryDisk):
        read_bytes = 0

        def segments(self) -> Iterator[Segment]:
            yield Segment(0, self.size_bytes, is_data=True)

        def read_into(self, buffer: memoryview, offset: int) -> None:
            self.read_bytes += len(buffer)
            super().read_into(buffer, offset)

    disk = Counted(b"A" * (32 << 20))
    archiver = Timed(window=16 << 20)
    clock.append(archiver)
    cancel = Cancel()
    limiter = RateLimiter(before, 0.0)
    with contextlib.closing(cancel):
        with pytest.raises(Cancelled):
            Sender(disk, archiver, limiter, cancel).run(ignore)
        # Within 5 per cent, and a piece at the beginning.
        within = 10 * slow * 0.05 + CLUSTER
        assert disk.read_bytes - archiver.read_then == pytest.approx(10 * slow, abs=within)


def test_holes_are_not_counted_against_the_limit(clock: list[Archiver]) -> None:
    archiver = Archiver(window=8 << 20)
    disk = MemoryDisk(b"A" * (100 * CLUSTER), holes=frozenset(range(1, 100)))
    producer, cancel = sender(disk, archiver, clock, CLUSTER)
    producer.run(ignore)
    assert archiver.now < 1
    assert producer.zero_clusters == 99
    cancel.close()


def test_what_was_read_and_sent_is_told_at_the_end_whatever_was_told_before(
    clock: list[Archiver],
) -> None:
    told: list[Event] = []
    disk = MemoryDisk(b"A" * (40 * CLUSTER) + bytes(9 * CLUSTER))
    producer, cancel = sender(disk, Archiver(), clock)
    producer.run(told.append)
    last = {"event": "transfer", "device": "disk", "saved_bytes": 0}
    assert told[-2:] == [
        {**last, "read_bytes": 49 * CLUSTER, "sent_bytes": 40 * CLUSTER},
        {"event": "ending", "device": "disk"},
    ]
    cancel.close()
