# SPDX-License-Identifier: Apache-2.0
"""Every message in every state of both sides: taken, or refused with the code of the page."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.protocol.messages import EXAMPLES, U64, UUID, encode
from vmapipe.protocol import limits, transfer_state
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.schema import pack
from vmapipe.protocol.transfer import (
    ClusterFrame,
    End,
    Grant,
    Hello,
    Message,
    Resume,
    Resumed,
    RunFrame,
    Scattered,
    SharedCluster,
    SharedRun,
    UnchangedRun,
    Welcome,
)
from vmapipe.protocol.transfer_state import ArchiverSide, ProducerSide

P = transfer_state.ProducerState
A = transfer_state.ArchiverState

# (state, message) -> state after it. All else is refused with "sequence".
ARCHIVER_TAKES = {
    (A.GREETING, "HELLO"): A.WAITING,
    (A.GREETING, "PING"): A.GREETING,
    (A.GREETING, "FAIL"): A.CLOSED,
    (A.GREETING, "RESUME"): A.GREETING,
    (A.WAITING, "PING"): A.WAITING,
    (A.WAITING, "FAIL"): A.CLOSED,
    (A.RECEIVING, "CLUSTER"): A.RECEIVING,
    (A.RECEIVING, "RUN"): A.RECEIVING,
    (A.RECEIVING, "SHARED"): A.RECEIVING,
    (A.RECEIVING, "SCATTERED"): A.RECEIVING,
    (A.RECEIVING, "UNCHANGED"): A.RECEIVING,
    (A.RECEIVING, "WANT"): A.RECEIVING,
    (A.RECEIVING, "PING"): A.RECEIVING,
    (A.RECEIVING, "END"): A.ENDED,
    (A.RECEIVING, "FAIL"): A.CLOSED,
    (A.ENDED, "PING"): A.ENDED,
    (A.ENDED, "FAIL"): A.CLOSED,
    (A.DONE_SENT, "PING"): A.DONE_SENT,
    (A.DONE_SENT, "BYE"): A.CLOSED,
    (A.DONE_SENT, "FAIL"): A.CLOSED,
    # Whoever carries the session should not even ask any more.
    (A.CLOSED, "PING"): A.CLOSED,
    (A.CLOSED, "FAIL"): A.CLOSED,
}
PRODUCER_TAKES = {
    (P.GREETING, "WELCOME"): P.SENDING,
    (P.GREETING, "REFUSE"): P.CLOSED,
    (P.GREETING, "ABORT"): P.CLOSED,
    (P.GREETING, "PONG"): P.GREETING,
    (P.SENDING, "GRANT"): P.SENDING,
    (P.SENDING, "REFUSE"): P.CLOSED,
    (P.SENDING, "ABORT"): P.CLOSED,
    (P.SENDING, "PONG"): P.SENDING,
    (P.SENDING, "RESUMED"): P.SENDING,
    (P.SENDING, "HAVE"): P.SENDING,
    (P.ENDING, "GRANT"): P.ENDING,
    (P.ENDING, "DONE"): P.CLOSED,
    (P.ENDING, "REFUSE"): P.CLOSED,
    (P.ENDING, "ABORT"): P.CLOSED,
    (P.ENDING, "PONG"): P.ENDING,
    (P.ENDING, "RESUMED"): P.ENDING,
    (P.ENDING, "HAVE"): P.ENDING,
    (P.CLOSED, "REFUSE"): P.CLOSED,
    (P.CLOSED, "ABORT"): P.CLOSED,
    (P.CLOSED, "PONG"): P.CLOSED,
}


def archiver_in(state: transfer_state.ArchiverState) -> ArchiverSide:
    side = ArchiverSide()
    if state is A.GREETING:
        return side
    side.receive(encode(EXAMPLES["HELLO"]))
    if state is A.WAITING:
        return side
    side.welcome(1, 1 << 20, 1 << 19, 30, shared=True, reconnect_s=60, base=bytes(32))
    if state is A.RECEIVING:
        return side
    side.receive(encode(End(0, 0)))
    if state is A.ENDED:
        return side
    side.done(UUID)
    if state is A.CLOSED:
        side.receive(encode(EXAMPLES["BYE"]))
    return side


def producer_in(state: transfer_state.ProducerState) -> ProducerSide:
    side = ProducerSide(UUID, "drive-scsi0", 1 << 30, "test", "/proc/7/fd/5", UUID)
    if state is P.GREETING:
        return side
    side.receive(encode(EXAMPLES["WELCOME"]))
    side.resume()  # so that RESUMED belongs there
    if state is P.SENDING:
        return side
    side.end()
    if state is P.CLOSED:
        side.receive(encode(EXAMPLES["DONE"]))
    return side


def code_of(side: ArchiverSide | ProducerSide, message: Message) -> str:
    """The error code with which the message is refused; empty: it was taken."""
    try:
        assert side.receive(encode(message)) == message
    except RemoteProtocolError as error:
        return error.code
    return ""


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("state", A, ids=lambda state: state.value)
def test_the_archiver_in_every_state_takes_or_refuses_every_message(
    state: transfer_state.ArchiverState, name: str
) -> None:
    side = archiver_in(state)
    assert side.state is state
    expected = ARCHIVER_TAKES.get((state, name))
    assert code_of(side, EXAMPLES[name]) == ("" if expected else "sequence")
    assert side.state is (expected or state)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("state", P, ids=lambda state: state.value)
def test_the_producer_in_every_state_takes_or_refuses_every_message(
    state: transfer_state.ProducerState, name: str
) -> None:
    side = producer_in(state)
    assert side.state is state
    expected = PRODUCER_TAKES.get((state, name))
    assert code_of(side, EXAMPLES[name]) == ("" if expected else "sequence")
    assert side.state is (expected or state)


@pytest.mark.parametrize("state", P, ids=lambda state: state.value)
def test_the_producer_sends_only_what_its_state_allows(state: transfer_state.ProducerState) -> None:
    sending = ("run", "shared", "scattered", "unchanged", "want", "end")
    allowed = {"hello": [P.GREETING], **{name: [P.SENDING] for name in sending}}
    moves: dict[str, Callable[[ProducerSide], object]] = {
        "hello": lambda side: side.hello(),
        "run": lambda side: side.run(0, 1, b"", b""),
        "shared": lambda side: side.shared_run(0, 1, b"\0\1", 0),
        "scattered": lambda side: side.scattered([SharedCluster(0, 0, 1)]),
        "unchanged": lambda side: side.unchanged(0, 1),
        "want": lambda side: side.want(0, 1),
        "end": lambda side: side.end(),
    }
    for name, move in moves.items():
        side = producer_in(state)
        if state in allowed[name]:
            move(side)
        else:
            with pytest.raises(LocalProtocolError):
                move(side)
    assert producer_in(state).ping()
    assert producer_in(state).fail("read error")


@pytest.mark.parametrize("state", A, ids=lambda state: state.value)
def test_the_archiver_welcomes_and_ends_only_where_its_state_allows(
    state: transfer_state.ArchiverState,
) -> None:
    allowed = {"welcome": [A.WAITING], "done": [A.ENDED, A.DONE_SENT]}
    moves: dict[str, Callable[[ArchiverSide], object]] = {
        "welcome": lambda side: side.welcome(1, 1 << 20, 1 << 19, 30),
        "done": lambda side: side.done(UUID),
    }
    for name, move in moves.items():
        side = archiver_in(state)
        if state in allowed[name]:
            move(side)
        else:
            with pytest.raises(LocalProtocolError):
                move(side)
    assert archiver_in(state).pong()
    assert archiver_in(state).refuse("busy", "")
    assert archiver_in(state).abort("")


# --- after a lost connection ---


def test_resumed_is_refused_where_nobody_has_asked() -> None:
    side = ProducerSide(UUID, "a", 1 << 30, session=UUID)
    side.receive(encode(Welcome(1, 1, 1 << 20, 1 << 19, 30, reconnect_s=60)))
    assert code_of(side, EXAMPLES["RESUMED"]) == "sequence"
    side.resume()
    assert code_of(side, EXAMPLES["RESUMED"]) == ""
    assert code_of(side, EXAMPLES["RESUMED"]) == "sequence"


@pytest.mark.parametrize("session", [b"", UUID])
@pytest.mark.parametrize("reconnect_s", [0, 60])
def test_a_session_can_be_resumed_only_where_both_sides_said_so(
    session: bytes, reconnect_s: int
) -> None:
    producer = ProducerSide(UUID, "a", 1 << 30, session=session)
    archiver = ArchiverSide()
    archiver.receive(producer.hello())
    producer.receive(archiver.welcome(1, 1 << 20, 1 << 19, 30, reconnect_s=reconnect_s))
    if session and reconnect_s:
        producer.resume()
        producer.receive(archiver.resumed())
    else:
        with pytest.raises(LocalProtocolError):
            producer.resume()
        with pytest.raises(RemoteProtocolError):
            archiver.resumed()
    producer.end()
    archiver.receive(encode(End(0, 0)))
    producer.receive(archiver.done(UUID))
    assert archiver.state is (A.DONE_SENT if session and reconnect_s else A.CLOSED)


@pytest.mark.parametrize(
    ("heartbeat_s", "reconnect_s", "ping_s"),
    [
        (30, 60, 1.0),  # else the last sign of life could be 10 s older than the loss
        (30, 0, 10.0),  # nothing counts but being silent for 30 s
        (1, 60, 1 / 3),
    ],
)
def test_a_producer_that_may_come_back_is_never_silent_for_long(
    heartbeat_s: int, reconnect_s: int, ping_s: float
) -> None:
    side = ProducerSide(UUID, "a", 1 << 30, session=UUID)
    assert side.ping_s == 10.0
    side.receive(encode(Welcome(1, 1, 1 << 20, 1 << 19, heartbeat_s, reconnect_s=reconnect_s)))
    assert side.ping_s == ping_s


@pytest.mark.parametrize(
    "resumed",
    [
        Resumed(3, 1 << 20, 0, ended=False),  # received: more than was sent
        Resumed(1, 1 << 20, 2, ended=False),  # acknowledged and not received
        Resumed(2, 1 << 20, 0, ended=False),  # acknowledged was more before
        Resumed(2, 1 << 20, 2, ended=True),  # nobody said END
    ],
)
def test_a_resumed_that_cannot_be_is_refused(resumed: Resumed) -> None:
    side = ProducerSide(UUID, "a", 1 << 30, session=UUID)
    side.receive(encode(Welcome(1, 1, 1 << 20, 1 << 19, 30, reconnect_s=60)))
    for number in range(2):
        side.run(number, 1, b"", b"")
    side.receive(encode(Grant(1 << 20, 1)))
    side.resume()
    assert code_of(side, resumed) == "sequence"
    assert side.acked == 1


def test_resumed_brings_the_credit_and_the_acknowledgements_that_were_lost() -> None:
    side = ProducerSide(UUID, "a", 1 << 30, session=UUID)
    side.receive(encode(Welcome(1, 1, 1 << 20, 1 << 19, 30, reconnect_s=60)))
    side.run(0, 1, b"", b"")
    side.resume()
    side.receive(encode(Resumed(1, 1 << 22, 1, ended=False)))
    assert (side.credit, side.acked) == ((1 << 22) - limits.charge(1, 0), 1)


# --- right in this state, wrong in itself ---


def frame(seq: int = 1, dev_id: int = 1, clusters: int = 1) -> RunFrame:
    return RunFrame(seq, dev_id, 0, clusters, b"", memoryview(b""))


@pytest.mark.parametrize("seq", [2, 3, U64])
def test_a_gap_in_the_numbers_ends_the_session(seq: int) -> None:
    assert code_of(archiver_in(A.RECEIVING), frame(seq)) == "sequence"


@pytest.mark.parametrize("seq", [1, 2, 4])
def test_a_number_twice_or_skipped_later_ends_the_session(seq: int) -> None:
    side = archiver_in(A.RECEIVING)
    assert [code_of(side, frame(number)) for number in (1, 2)] == ["", ""]
    assert code_of(side, frame(seq)) == "sequence"
    assert side.received_frames == 2


@pytest.mark.parametrize("dev_id", [2, 254])
def test_a_frame_of_another_device_is_refused(dev_id: int) -> None:
    frames: list[Message] = [
        frame(1, dev_id),
        ClusterFrame(1, dev_id, 0, b""),
        SharedRun(1, dev_id, 0, 1, b"\0\1", 0, 4096),
        Scattered(1, dev_id, (SharedCluster(0, 0, 1),)),
        UnchangedRun(1, dev_id, 0, 1),
    ]
    for message in frames:
        assert code_of(archiver_in(A.RECEIVING), message) == "wrong-device"


def receiving(credit: int, frame_bytes: int) -> ArchiverSide:
    side = archiver_in(A.WAITING)
    side.welcome(1, credit, frame_bytes, 30)
    return side


def test_credit_may_be_used_to_the_last_byte_and_not_beyond() -> None:
    cluster = ClusterFrame(1, 1, 0, bytes(65536))
    cost = limits.MIN_FRAME_CHARGE
    assert code_of(receiving(cost, cost), cluster) == ""
    assert code_of(receiving(cost - 1, cost), cluster) == "credit"
    side = receiving(cost, cost)
    side.receive(encode(cluster))
    assert code_of(side, frame(2)) == "credit"
    side.grant(cost + limits.charge(1, 0), 0)
    assert code_of(side, frame(2)) == ""
    assert side.charged == cost + 72


def test_a_frame_above_the_largest_charge_is_refused_whatever_the_credit() -> None:
    most = (limits.MIN_FRAME_CHARGE - 64) // 8
    assert code_of(receiving(U64, limits.MIN_FRAME_CHARGE), frame(clusters=most)) == ""
    assert code_of(receiving(U64, limits.MIN_FRAME_CHARGE), frame(clusters=most + 1)) == "credit"


def test_a_refused_frame_changes_nothing() -> None:
    side = receiving(72, limits.MIN_FRAME_CHARGE)
    for message in (frame(2), frame(1, 9), frame(clusters=2)):
        assert code_of(side, message) != ""
    assert (side.received_frames, side.received_clusters, side.charged) == (0, 0, 0)
    assert code_of(side, frame()) == ""


@pytest.mark.parametrize("end", [End(0, 0), End(1, 5), End(2, 4), End(0, 5), End(1, 4)])
def test_the_end_must_count_what_came(end: End) -> None:
    side = receiving(1 << 20, 1 << 19)
    side.receive(encode(frame(clusters=5)))
    assert code_of(side, end) == ("" if end == End(1, 5) else "counts")


def test_a_run_in_shared_memory_is_refused_where_none_is_shared() -> None:
    assert (
        code_of(receiving(1 << 20, 1 << 19), SharedRun(1, 1, 0, 1, b"\0\1", 0, 4096)) == "sequence"
    )


def test_scattered_clusters_are_refused_where_no_memory_is_shared() -> None:
    message = Scattered(1, 1, (SharedCluster(0, 0, 1),))
    assert code_of(receiving(1 << 20, 1 << 19), message) == "sequence"


def test_scattered_clusters_cost_as_much_as_a_run_of_them() -> None:
    side = archiver_in(A.RECEIVING)
    clusters = (SharedCluster(9, 0, 1), SharedCluster(0, 0, 0), SharedCluster(4, 0, 0xFFFF))
    side.receive(encode(Scattered(1, 1, clusters)))
    assert side.charged == limits.charge(3, 17 * 4096)
    assert (side.received_frames, side.received_clusters) == (1, 3)


def test_a_welcome_for_scattered_clusters_without_shared_memory_is_refused() -> None:
    side = ProducerSide(UUID, "a", 1, shared="/proc/7/fd/5")
    message = Welcome(1, 1, 1 << 24, 1 << 20, 30, scattered=True)
    assert code_of(side, message) == "malformed"
    assert side.state is P.GREETING


def test_a_run_in_shared_memory_costs_as_much_as_one_that_is_sent() -> None:
    side = archiver_in(A.RECEIVING)
    side.receive(encode(SharedRun(1, 1, 0, 2, b"\0\1\0\3", 0, 3 * 4096)))
    assert side.charged == limits.charge(2, 3 * 4096)


def test_an_acknowledgement_of_what_was_not_sent_is_refused() -> None:
    assert code_of(producer_in(P.SENDING), Grant(1, 1)) == "sequence"
    assert code_of(producer_in(P.ENDING), Grant(1, 1)) == "sequence"


def test_a_welcome_whose_frames_hold_no_cluster_is_refused() -> None:
    small = Welcome(1, 1, 1 << 20, limits.MIN_FRAME_CHARGE - 1, 30)
    assert code_of(producer_in(P.GREETING), small) == "malformed"


def test_a_welcome_that_accepts_memory_which_was_not_offered_is_refused() -> None:
    side = ProducerSide(UUID, "a", 1)
    assert code_of(side, EXAMPLES["WELCOME"]) == "malformed"
    assert side.state is P.GREETING


@pytest.mark.parametrize("name", ["HELLO", "WELCOME", "RESUME"])
def test_another_version_is_refused_as_such(name: str) -> None:
    message = EXAMPLES[name]
    assert isinstance(message, Hello | Welcome | Resume)
    other = message._replace(version=2)
    side = producer_in(P.GREETING) if name == "WELCOME" else archiver_in(A.GREETING)
    assert code_of(side, other) == "version"


def test_grants_are_cumulative_and_an_old_one_changes_nothing() -> None:
    side = producer_in(P.SENDING)
    for grant in (Grant(1 << 30, 0), Grant(1, 0), Grant(1 << 29, 0)):
        side.receive(encode(grant))
        assert side.credit == 1 << 30


def test_unchanged_clusters_are_refused_where_there_is_no_base() -> None:
    side = ArchiverSide()
    side.receive(encode(EXAMPLES["HELLO"]))
    side.welcome(1, 1 << 20, 1 << 19, 30)
    assert code_of(side, UnchangedRun(1, 1, 0, 1)) == "sequence"


def test_unchanged_clusters_are_not_sent_to_an_archiver_without_a_base() -> None:
    side = ProducerSide(UUID, "drive-scsi0", 1 << 30)
    side.receive(encode(Welcome(1, 1, 1 << 24, 1 << 20, 30)))
    with pytest.raises(LocalProtocolError, match="has no base"):
        side.unchanged(0, 1)


def test_unchanged_clusters_cost_a_message_whatever_their_number() -> None:
    side, producer = archiver_in(A.RECEIVING), producer_in(P.SENDING)
    before = producer.credit
    side.receive(producer.unchanged(0, 1 << 32))
    assert side.charged == before - producer.credit == limits.CHARGE_PER_FRAME
    assert side.received_clusters == producer.sent_clusters == 1 << 32


def test_unchanged_clusters_need_credit_too() -> None:
    side = ProducerSide(UUID, "drive-scsi0", 1 << 30)
    side.receive(encode(Welcome(1, 1, limits.CHARGE_PER_FRAME - 1, 1 << 20, 30, base=True)))
    with pytest.raises(LocalProtocolError, match="credit"):
        side.unchanged(0, 1)


def test_a_welcome_of_an_archiver_that_knows_no_bases_says_that_there_is_none() -> None:
    old = {"version": 1, "dev_id": 1, "credit": 1 << 24, "frame_bytes": 1 << 20, "heartbeat_s": 30}
    side = ProducerSide(UUID, "drive-scsi0", 1 << 30)
    side.receive([pack(["WELCOME", old])])
    assert not side.has_base
