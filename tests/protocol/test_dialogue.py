# SPDX-License-Identifier: Apache-2.0
"""Both halves of the dialogue talk to each other, in any interleaving that a network can make."""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.protocol.messages import UUID
from vmapipe.protocol import limits, transfer_state
from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import (
    Ping,
    RunFrame,
    Scattered,
    SharedCluster,
    SharedRun,
    UnchangedRun,
)
from vmapipe.protocol.transfer_state import ArchiverSide, ProducerSide

P = transfer_state.ProducerState
A = transfer_state.ArchiverState
# What the states of both are when nothing is under way any more.
AGREED = {
    (P.GREETING, A.GREETING),
    (P.GREETING, A.WAITING),
    (P.SENDING, A.RECEIVING),
    (P.ENDING, A.ENDED),
    (P.CLOSED, A.CLOSED),
}


class Sent(NamedTuple):
    """A frame's contents; `place`: its payload, or where that lies in shared memory."""

    first: int
    clusters: int
    masks: bytes
    place: bytes | int
    #: Not as a run, but cluster by cluster.
    scattered: bool = False
    #: As in the base, without data.
    unchanged: bool = False


def clusters_of(frame: Sent) -> list[SharedCluster]:
    assert isinstance(frame.place, int)
    masks = struct.unpack(f">{frame.clusters}H", frame.masks)
    return [
        SharedCluster(frame.first + index, frame.place + index, mask)
        for index, mask in enumerate(masks)
    ]


class Dialogue(RuleBasedStateMachine):
    """One producer, one archiver, and a network that keeps the order in each direction."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = ProducerSide(UUID, "drive-scsi0", 1 << 30, "test", "/proc/1/fd/3")
        self.archiver = ArchiverSide()
        self.up: deque[list[Part]] = deque()
        self.down: deque[list[Part]] = deque()
        self.sent: list[Sent] = []
        self.received: list[Sent] = []
        self.charges: list[int] = []
        self.window = 0
        self.limit = 0
        self.acked = 0
        self.greeted = False

    # --- the producer's moves ---

    @precondition(lambda self: not self.greeted)
    @rule()
    def hello(self) -> None:
        self.up.append(self.producer.hello())
        self.greeted = True

    @precondition(lambda self: self.producer.state is P.SENDING)
    @rule(
        count=st.integers(1, 40),
        mask=st.sampled_from([b"\0\0", b"\0\1", b"\xff\xff"]),
        share=st.booleans(),
        scatter=st.booleans(),
    )
    def send_run(self, count: int, mask: bytes, share: bool, scatter: bool) -> None:
        masks = mask * count if any(mask) else b""
        data_bytes = 4096 * int.from_bytes(masks, "big").bit_count()
        share = share and self.producer.shared and masks != b""
        before = (self.producer.credit, self.producer.sent_frames, self.producer.sent_clusters)
        place = 4096 if share else bytes(data_bytes)
        frame = Sent(len(self.sent), count, masks, place, share and scatter)
        try:
            if frame.scattered:
                parts = self.producer.scattered(clusters_of(frame))
            elif isinstance(frame.place, int):
                parts = self.producer.shared_run(*frame[:3], frame.place)
            else:
                parts = self.producer.run(*frame[:3], frame.place)
        except LocalProtocolError:
            cost = limits.charge(count, data_bytes)
            assert cost > min(before[0], self.producer.frame_bytes) or data_bytes > 1 << 20
            assert before == (
                self.producer.credit,
                self.producer.sent_frames,
                self.producer.sent_clusters,
            )
            return
        self.up.append(parts)
        self.sent.append(frame)
        self.charges.append(before[0] - self.producer.credit)

    @precondition(lambda self: self.producer.state is P.SENDING and self.producer.has_base)
    @rule(count=st.integers(1, 1 << 20))
    def send_unchanged(self, count: int) -> None:
        before = self.producer.credit
        try:
            parts = self.producer.unchanged(len(self.sent), count)
        except LocalProtocolError:
            assert before < limits.CHARGE_PER_FRAME
            return
        self.up.append(parts)
        self.sent.append(Sent(len(self.sent), count, b"", b"", unchanged=True))
        self.charges.append(before - self.producer.credit)

    @precondition(lambda self: self.greeted and self.producer.state is not P.CLOSED)
    @rule()
    def ping(self) -> None:
        self.up.append(self.producer.ping())

    @precondition(lambda self: self.producer.state is P.SENDING)
    @rule()
    def end(self) -> None:
        self.up.append(self.producer.end())

    @precondition(lambda self: self.greeted and self.producer.state is not P.CLOSED)
    @rule(often=st.integers(0, 9))
    def fail(self, often: int) -> None:
        if often == 7:
            self.up.append(self.producer.fail("read error"))

    # --- the archiver's moves ---

    @precondition(lambda self: self.archiver.state is A.WAITING)
    @rule(
        window=st.integers(limits.MIN_WINDOW_BYTES, 8 << 20),
        first=st.booleans(),
        shared=st.booleans(),
        base=st.booleans(),
    )
    def welcome(self, window: int, first: bool, shared: bool, base: bool) -> None:
        self.window = window
        self.limit = window if first else 0
        parts = self.archiver.welcome(
            1, self.limit, window // 2, 30, shared=shared, base=b"" if base else None
        )
        self.down.append(parts)

    @precondition(lambda self: self.archiver.state in (A.RECEIVING, A.ENDED))
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        disposed = data.draw(st.integers(0, len(self.received)))
        acked = data.draw(st.integers(0, disposed))
        self.give(self.window + sum(self.charges[:disposed]), acked)

    def give(self, limit: int, acked: int) -> None:
        news = limit > self.limit or acked > self.acked
        parts = self.archiver.grant(limit, acked)
        assert (parts is not None) == news
        if parts is not None:
            self.limit = max(self.limit, limit)
            self.acked = max(self.acked, acked)
            self.down.append(parts)

    @precondition(lambda self: self.archiver.state is A.ENDED)
    @rule()
    def done(self) -> None:
        self.down.append(self.archiver.done(UUID))

    @precondition(lambda self: self.archiver.state not in (A.GREETING, A.CLOSED))
    @rule(often=st.integers(0, 9))
    def abort(self, often: int) -> None:
        if often == 7:
            self.down.append(self.archiver.abort("cancelled"))

    @precondition(lambda self: self.archiver.state not in (A.GREETING, A.CLOSED))
    @rule(often=st.integers(0, 9))
    def refuse(self, often: int) -> None:
        if often == 7:
            self.down.append(self.archiver.refuse("coverage", "cluster 7 comes a second time"))

    # --- the network ---

    @precondition(lambda self: self.up)
    @rule()
    def deliver_up(self) -> None:
        parts = self.up.popleft()
        if self.archiver.state is A.CLOSED:
            return
        match self.archiver.receive(parts):
            case RunFrame(_, dev_id, first, count, masks, payload):
                assert dev_id == 1
                self.received.append(Sent(first, count, masks, bytes(payload)))
            case SharedRun(_, dev_id, first, count, masks, position, _):
                assert dev_id == 1
                self.received.append(Sent(first, count, masks, position))
            case Scattered(_, dev_id, clusters):
                assert dev_id == 1
                masks = b"".join(cluster.mask.to_bytes(2, "big") for cluster in clusters)
                first, position, _ = clusters[0]
                self.received.append(Sent(first, len(clusters), masks, position, True))
                assert list(clusters) == clusters_of(self.received[-1])
            case UnchangedRun(_, dev_id, first, count):
                assert dev_id == 1
                self.received.append(Sent(first, count, b"", b"", unchanged=True))
            case Ping():
                self.down.append(self.archiver.pong())

    @precondition(lambda self: self.down)
    @rule()
    def deliver_down(self) -> None:
        parts = self.down.popleft()
        if self.producer.state is not P.CLOSED:
            self.producer.receive(parts)

    @precondition(lambda self: not self.up and not self.down)
    @rule()
    def nothing_happens(self) -> None:
        """A session that is over stays over."""

    def deliver_all(self) -> None:
        while self.up or self.down:
            if self.up:
                self.deliver_up()
            if self.down:
                self.deliver_down()

    # --- what always holds ---

    @invariant()
    def credit_is_never_exceeded(self) -> None:
        assert self.producer.credit >= 0
        assert sum(self.charges) <= self.limit
        assert self.archiver.charged <= self.limit

    @invariant()
    def no_frame_is_lost_or_double(self) -> None:
        assert self.received == self.sent[: len(self.received)]
        assert self.archiver.received_frames == len(self.received)
        assert self.archiver.received_clusters == sum(frame.clusters for frame in self.received)
        assert self.archiver.charged == sum(self.charges[: len(self.received)])
        assert self.producer.acked <= len(self.sent)

    def teardown(self) -> None:
        """From wherever they are, the two agree, and the session can be brought to its end."""
        self.deliver_all()
        states = (self.producer.state, self.archiver.state)
        assert states in AGREED
        if states == (P.CLOSED, A.CLOSED):
            return
        assert self.received == self.sent
        if not self.greeted:
            self.hello()
            self.deliver_all()
        if self.archiver.state is A.WAITING:
            self.welcome(limits.MIN_WINDOW_BYTES, True, False, False)
            self.deliver_all()
        if self.producer.state is P.SENDING:
            self.give(self.window + sum(self.charges), len(self.sent))
            self.deliver_all()
            assert self.producer.credit >= self.producer.frame_bytes >= limits.MIN_FRAME_CHARGE
            self.send_run(1, b"\xff\xff", False, False)
            self.end()
            self.deliver_all()
        assert (self.producer.state, self.archiver.state) == (P.ENDING, A.ENDED)
        self.done()
        self.deliver_all()
        assert (self.producer.state, self.archiver.state) == (P.CLOSED, A.CLOSED)
        assert self.producer.acked == len(self.sent)


TestAnyInterleavingOfAnHonestSession = Dialogue.TestCase
TestAnyInterleavingOfAnHonestSession.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)


# --- this side's own mistakes ---


def receiving() -> tuple[ProducerSide, ArchiverSide]:
    producer, archiver = ProducerSide(UUID, "a", 1 << 30), ArchiverSide()
    archiver.receive(producer.hello())
    producer.receive(archiver.welcome(1, limits.MIN_WINDOW_BYTES, limits.MIN_FRAME_CHARGE, 30))
    return producer, archiver


@pytest.mark.parametrize(
    ("first", "count", "masks", "data_bytes"),
    [
        pytest.param(0, 0, b"", 0, id="no cluster"),
        pytest.param(-1, 1, b"", 0, id="a negative cluster"),
        pytest.param((1 << 32) - 1, 2, b"", 0, id="clusters of 33 bits"),
        pytest.param(0, (1 << 20) + 1, b"", 0, id="too many clusters"),
        pytest.param(0, 1, b"\0\1\0\1", 8192, id="too many masks"),
        pytest.param(0, 1, b"\0\1", 4095, id="data that the masks deny"),
        pytest.param(0, 1, b"", 4096, id="data without masks"),
        pytest.param(0, 32769, bytes(65538), 0, id="masks beyond the limit"),
        pytest.param(0, 2, b"\xff" * 4, 131072, id="more than the largest frame"),
        pytest.param(0, 8200, b"", 0, id="more zeroes than the largest frame"),
    ],
)
def test_a_run_that_the_archiver_would_refuse_is_not_sent(
    first: int, count: int, masks: bytes, data_bytes: int
) -> None:
    producer, archiver = receiving()
    with pytest.raises(LocalProtocolError):
        producer.run(first, count, masks, bytes(data_bytes))
    archiver.receive(producer.run(0, 1, b"\xff\xff", bytes(65536)))
    archiver.receive(producer.end())


def test_shared_memory_that_was_not_agreed_on_is_not_used() -> None:
    producer, _ = receiving()
    with pytest.raises(LocalProtocolError, match="does not share"):
        producer.shared_run(0, 1, b"\0\1", 0)


def test_shared_memory_that_was_not_offered_is_not_accepted() -> None:
    archiver = ArchiverSide()
    archiver.receive(ProducerSide(UUID, "a", 1).hello())
    with pytest.raises(LocalProtocolError, match="offers no memory"):
        archiver.welcome(1, 0, limits.MIN_FRAME_CHARGE, 30, shared=True)


def test_a_run_of_zeroes_is_not_shared() -> None:
    producer, archiver = ProducerSide(UUID, "a", 1, "", "/proc/1/fd/1"), ArchiverSide()
    archiver.receive(producer.hello())
    producer.receive(archiver.welcome(1, 1 << 20, 1 << 19, 30, shared=True))
    with pytest.raises(LocalProtocolError, match="no data to share"):
        producer.shared_run(0, 1, b"", 0)


def test_scattered_clusters_that_the_archiver_would_refuse_are_not_sent() -> None:
    producer, archiver = ProducerSide(UUID, "a", 1, "", "/proc/1/fd/1"), ArchiverSide()
    archiver.receive(producer.hello())
    producer.receive(archiver.welcome(1, 8 << 20, 6 << 20, 30, shared=True))
    full = SharedCluster(0, 0, 0xFFFF)
    for clusters in ([], [SharedCluster(0, 0, 0)] * 257, [full] * 65):
        with pytest.raises(LocalProtocolError):
            producer.scattered(clusters)
    archiver.receive(producer.scattered([full] * 64))
    with pytest.raises(LocalProtocolError, match="exceeds the credit"):
        producer.scattered([full] * 64)


def test_scattered_clusters_are_not_sent_to_an_archiver_that_does_not_take_them() -> None:
    producer, _ = receiving()
    with pytest.raises(LocalProtocolError, match="does not take scattered"):
        producer.scattered([SharedCluster(0, 0, 1)])


def test_a_payload_counts_in_bytes_whatever_its_items_are() -> None:
    producer, archiver = receiving()
    before = producer.credit
    archiver.receive(producer.run(0, 1, b"\0\1", memoryview(bytes(4096)).cast("Q")))
    assert before - producer.credit == 64 + 8 + 4096 == archiver.charged


def test_the_producer_may_use_its_credit_to_the_last_byte() -> None:
    producer, archiver = ProducerSide(UUID, "a", 1 << 30), ArchiverSide()
    archiver.receive(producer.hello())
    cost = limits.MIN_FRAME_CHARGE
    producer.receive(archiver.welcome(1, cost, cost, 30))
    archiver.receive(producer.run(0, 1, b"\xff\xff", bytes(65536)))
    assert producer.credit == 0
    with pytest.raises(LocalProtocolError, match="exceeds the credit 0"):
        producer.run(1, 1, b"", b"")


def test_frames_that_hold_no_cluster_are_not_offered() -> None:
    archiver = ArchiverSide()
    archiver.receive(ProducerSide(UUID, "a", 1).hello())
    with pytest.raises(LocalProtocolError, match="do not hold a cluster"):
        archiver.welcome(1, 1 << 20, limits.MIN_FRAME_CHARGE - 1, 30)


@pytest.mark.parametrize(("dev_id", "credit", "heartbeat_s"), [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_a_welcome_that_makes_no_sense_is_not_sent(
    dev_id: int, credit: int, heartbeat_s: int
) -> None:
    archiver = ArchiverSide()
    archiver.receive(ProducerSide(UUID, "a", 1).hello())
    with pytest.raises(LocalProtocolError):
        archiver.welcome(dev_id, credit, 1 << 20, heartbeat_s)
    assert archiver.state is A.WAITING
    archiver.welcome(1, 1, 1 << 20, 1)


def test_frames_that_did_not_come_are_not_acknowledged() -> None:
    _, archiver = receiving()
    with pytest.raises(LocalProtocolError, match="frame 1 acknowledged"):
        archiver.grant(1 << 30, 1)


def test_an_archive_is_not_done_before_its_device_has_ended() -> None:
    producer, archiver = receiving()
    with pytest.raises(LocalProtocolError, match="done in state receiving"):
        archiver.done(UUID)
    archiver.receive(producer.end())
    archiver.done(UUID)
    with pytest.raises(LocalProtocolError, match="done in state closed"):
        archiver.done(UUID)


def test_a_limit_never_shrinks() -> None:
    producer, archiver = receiving()
    before = producer.credit
    assert archiver.grant(before - 1, 0) is None
    parts = archiver.grant(before + 5, 0)
    assert parts is not None
    producer.receive(parts)
    assert producer.credit == before + 5


def test_after_its_end_a_session_grants_nothing() -> None:
    _, archiver = receiving()
    archiver.abort("cancelled")
    assert archiver.grant(1 << 40, 0) is None


@pytest.mark.parametrize("reason", ["x" * 10_000, "caf\udce9", ""])
def test_any_reason_can_be_told(reason: str) -> None:
    producer, archiver = receiving()
    archiver.receive(producer.fail(reason))
    producer.receive(archiver.refuse("malformed", reason))
    producer.receive(archiver.abort(reason))
