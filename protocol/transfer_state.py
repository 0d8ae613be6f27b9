# SPDX-License-Identifier: Apache-2.0
"""The dialogue between a producer and the archiver: both halves, as state machines. Pure.

Each half is told what its own side sends (methods) and what the peer sent (`receive`), and
returns message parts. What a state does not allow raises and changes nothing:
LocalProtocolError for our own side, RemoteProtocolError for the peer.

    producer   waits for, or does         leaves it by                     to
    GREETING   HELLO is sent; WELCOME     WELCOME                          SENDING
    SENDING    frames, within `credit`    end()                            ENDING
    ENDING     END is sent; DONE          DONE                             CLOSED
    CLOSED     nothing but bye()          -

    archiver   waits for, or does         leaves it by                     to
    GREETING   HELLO, or a RESUME that    HELLO                            WAITING
               belongs to another session
    WAITING    the job has all its        welcome()                        RECEIVING
               producers
    RECEIVING  frames, grants credit      END with the right counts        ENDED
    ENDED      writes what is left        done(), cannot be resumed        CLOSED
                                          done(), can be resumed           DONE_SENT
    DONE_SENT  DONE may have been lost:   BYE                              CLOSED
               RESUME, then done() again
    CLOSED     nothing                    -

From any state: a producer's fail() and an archiver's refuse() or abort(), and their arrival,
lead to CLOSED; PING and PONG change nothing. A session that can be resumed (`reconnect_s`
is not 0) keeps its state while its connection is lost: the producer's resume() is answered
by resumed(), which says what has arrived, so that the rest is sent again.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from vmapipe.protocol import limits, transfer
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import (
    Abort,
    Bye,
    ClusterFrame,
    Control,
    Done,
    End,
    Fail,
    Grant,
    Have,
    Hello,
    Message,
    Ping,
    Pong,
    Refuse,
    Resume,
    Resumed,
    RunFrame,
    Scattered,
    SharedCluster,
    SharedRun,
    UnchangedRun,
    Want,
    Welcome,
)

# For how long a connection may be lost counts from the last sign of life before the
# loss: that is then at most so old, and the limit comes earlier by no more than that.
_RECONNECT_PING_S = 1.0


class ProducerState(enum.Enum):
    GREETING = "greeting"
    SENDING = "sending"
    ENDING = "ending"
    CLOSED = "closed"


_WELCOMED = (ProducerState.SENDING, ProducerState.ENDING)


class ProducerSide:
    """A producer's half of one session. Methods that send return message parts; `receive` takes them."""

    def __init__(
        self,
        job: bytes,
        device: str,
        size_bytes: int,
        program: str = "",
        shared: str = "",
        session: bytes = b"",
    ) -> None:
        """`session`: 16 random bytes; empty: a lost connection ends the session."""
        self.state = ProducerState.GREETING
        self.dev_id = 0
        self.acked = 0
        self.frame_bytes = 0
        #: How long the archiver may be silent. After a third of that without a word, said or
        #: heard, it is time for a PING.
        self.heartbeat_s = limits.GREETING_HEARTBEAT_S
        self.ping_s = self.heartbeat_s / 3
        #: True: the archiver takes runs, and scattered clusters, in shared memory.
        self.shared = self.scatters = False
        #: True: the archiver has an earlier archive of the device, and takes `unchanged`.
        self.has_base = False
        #: The key of the digests that `want` asks for; empty: the archiver has none.
        self.digest_key = b""
        self.sent_frames = 0
        self.sent_clusters = 0
        self._hello = Hello(
            limits.VERSION, job, device, size_bytes, transfer.sayable(program), shared, session
        )
        #: How long a connection may be lost; 0: a lost connection ends the session.
        self.reconnect_s = 0
        #: Bytes of charge that may still be sent.
        self.credit = 0
        self._asked = False
        self._attempts = 0
        self._limit = 0

    def hello(self) -> list[Part]:
        """HELLO, sent again on each new connection until WELCOME comes."""
        self._must_be(ProducerState.GREETING)
        hello = self._hello._replace(attempt=self._attempts)
        self._attempts += 1
        return transfer.encode_control(hello)

    def run(self, first: int, count: int, masks: bytes, payload: Part) -> list[Part]:
        """Consecutive clusters (see RunFrame); its charge must be within `credit`.

        Raises LocalProtocolError for what the archiver would refuse.
        """
        data_bytes = memoryview(payload).nbytes
        fault = transfer.run_fault(first, count, masks, data_bytes)
        self._charge(fault or transfer.payload_fault(masks, data_bytes), count, data_bytes)
        return transfer.encode_run(self.sent_frames, self.dev_id, first, count, masks, payload)

    def shared_run(self, first: int, count: int, masks: bytes, position: int) -> list[Part]:
        """As `run`, with the payload at `position` in the shared memory (see SharedRun)."""
        if not self.shared:
            raise LocalProtocolError("the archiver does not share memory")
        if not masks:
            raise LocalProtocolError("a run of zeroes has no data to share")
        data_bytes = transfer.masked_bytes(masks)
        fault = transfer.run_fault(first, count, masks, data_bytes)
        self._charge(fault, count, data_bytes)
        return transfer.encode_shared_run(
            self.sent_frames, self.dev_id, first, count, masks, position
        )

    def scattered(self, clusters: Sequence[SharedCluster]) -> list[Part]:
        """Clusters in shared memory (see Scattered), where `scatters` says so."""
        if not self.scatters:
            raise LocalProtocolError("the archiver does not take scattered clusters")
        fault = transfer.scattered_fault(clusters)
        self._charge(fault, len(clusters), transfer.scattered_bytes(clusters))
        return transfer.encode_scattered(self.sent_frames, self.dev_id, clusters)

    def unchanged(self, first: int, count: int) -> list[Part]:
        """Clusters that are as in the base (see UnchangedRun), where `has_base` says so.

        Their charge is that of a message without clusters and data: CHARGE_PER_FRAME.
        """
        if not self.has_base:
            raise LocalProtocolError("the archiver has no base of this device")
        fault = transfer.unchanged_fault(first, count)
        self._charge(fault, 0, 0)
        self.sent_clusters += count
        return transfer.encode_unchanged(self.sent_frames, self.dev_id, first, count)

    def want(self, first: int, clusters: int) -> list[Part]:
        """Ask for digests of the base's clusters, where there is a `digest_key`."""
        self._must_be(ProducerState.SENDING)
        if not self.digest_key:
            raise LocalProtocolError("the archiver has no digests of this device")
        return transfer.encode_control(Want(first, clusters))

    def _charge(self, fault: tuple[str, str] | None, count: int, data_bytes: int) -> None:
        if self.state is not ProducerState.SENDING:
            raise LocalProtocolError(f"not possible in state {self.state.value}")
        if fault is not None:
            raise LocalProtocolError(fault[1])
        cost = limits.charge(count, data_bytes)
        if cost > self.credit or cost > self.frame_bytes:
            raise LocalProtocolError(f"a frame of {cost} bytes exceeds the credit {self.credit}")
        self.credit -= cost
        self.sent_frames += 1
        self.sent_clusters += count

    def end(self) -> list[Part]:
        self._must_be(ProducerState.SENDING)
        self.state = ProducerState.ENDING
        return transfer.encode_control(End(self.sent_frames, self.sent_clusters))

    def fail(self, reason: str) -> list[Part]:
        self.state = ProducerState.CLOSED
        return transfer.encode_control(Fail(transfer.sayable(reason)))

    def end_again(self) -> list[Part]:
        """END once more, where RESUMED says that it was lost."""
        self._must_be(ProducerState.ENDING)
        return transfer.encode_control(End(self.sent_frames, self.sent_clusters))

    def resume(self) -> list[Part]:
        """RESUME: the first message on a new connection, once WELCOME has come."""
        if not self.reconnect_s or self.state not in _WELCOMED:
            raise LocalProtocolError(f"nothing to resume in state {self.state.value}")
        self._asked = True
        hello, attempt = self._hello, self._attempts
        self._attempts += 1
        return transfer.encode_control(Resume(limits.VERSION, hello.job, hello.session, attempt))

    def bye(self) -> list[Part]:
        """BYE, after DONE, where `reconnect_s` is not 0."""
        self._must_be(ProducerState.CLOSED)
        return transfer.encode_control(Bye())

    def ping(self) -> list[Part]:
        return transfer.encode_control(Ping())

    def receive(self, parts: Sequence[Part]) -> Control:
        """Take an answer. Raises RemoteProtocolError when it does not belong here."""
        message = transfer.decode(parts)
        match message:
            case Welcome() if self.state is ProducerState.GREETING:
                self._welcomed(message)
            case Grant() if self.state in _WELCOMED:
                if message.acked > self.sent_frames:
                    raise RemoteProtocolError("sequence", "an acknowledgement of unsent frames")
                self._extend(message.limit)
                self.acked = max(self.acked, message.acked)
            case Have() if self.digest_key and self.state in _WELCOMED:
                pass
            case Resumed() if self._asked and self.state in _WELCOMED:
                self._resumed(message)
            case Done() if self.state is ProducerState.ENDING:
                self.acked = self.sent_frames
                self.state = ProducerState.CLOSED
            case Refuse() | Abort():
                self.state = ProducerState.CLOSED
            case Pong():
                pass
            case _:
                name = type(message).__name__
                raise RemoteProtocolError("sequence", f"{name} in state {self.state.value}")
        return message

    def _welcomed(self, message: Welcome) -> None:
        if message.frame_bytes < limits.MIN_FRAME_CHARGE:
            raise RemoteProtocolError("malformed", "frames too small for one cluster")
        if message.scattered and not message.shared:
            raise RemoteProtocolError("malformed", "scattered clusters without shared memory")
        if message.digest_key and not message.base:
            raise RemoteProtocolError("malformed", "digests without a base")
        if message.shared and not self._hello.shared:
            raise RemoteProtocolError("malformed", "memory accepted that was not offered")
        self.dev_id = message.dev_id
        self.frame_bytes = message.frame_bytes
        self.heartbeat_s = message.heartbeat_s
        self.shared, self.scatters = message.shared, message.scattered
        self.has_base, self.digest_key = message.base, message.digest_key
        self.reconnect_s = message.reconnect_s if self._hello.session else 0
        self.ping_s = self.heartbeat_s / 3
        if self.reconnect_s:
            self.ping_s = min(self.ping_s, _RECONNECT_PING_S)
        self._extend(message.credit)
        self.state = ProducerState.SENDING

    def _resumed(self, message: Resumed) -> None:
        if not self.acked <= message.acked <= message.received <= self.sent_frames:
            raise RemoteProtocolError("sequence", "resumed behind frames that were never sent")
        all_sent = self.state is ProducerState.ENDING and message.received == self.sent_frames
        if message.ended and not all_sent:
            raise RemoteProtocolError("sequence", "an end that was never sent")
        self._asked = False
        self._extend(message.limit)
        self.acked = message.acked

    def _extend(self, limit: int) -> None:
        """The sum of charges may reach `limit`, which never shrinks."""
        self.credit += max(0, limit - self._limit)
        self._limit = max(limit, self._limit)

    def _must_be(self, state: ProducerState) -> None:
        if self.state is not state:
            raise LocalProtocolError(f"not possible in state {self.state.value}")


class ArchiverState(enum.Enum):
    GREETING = "greeting"
    WAITING = "waiting"
    RECEIVING = "receiving"
    ENDED = "ended"
    DONE_SENT = "told"  # as the page of the wire calls it; a peer sees it in reasons
    CLOSED = "closed"


class ArchiverSide:
    """The archiver's half of one session. `receive` raises RemoteProtocolError for what the producer must not send."""

    def __init__(self) -> None:
        self.state = ArchiverState.GREETING
        self.device = ""
        self.size_bytes = 0
        self.dev_id = 0
        self.received_frames = 0
        self.received_clusters = 0
        self.charged = 0
        #: Where the producer offers to share memory, and whether it was accepted.
        self.shared_at = ""
        self.shared = False
        #: There is an earlier archive of the device: unchanged clusters may come.
        self.has_base = False
        #: The key of the digests of its clusters; empty: there are none.
        self.digest_key = b""
        #: Identifies the producer when it reconnects; empty: it cannot resume.
        self.session = b""
        self.reconnect_s = 0
        self._limit = 0
        self._acked = 0
        self._frame_bytes = 0
        self._heartbeat_s = 0

    def receive(self, parts: Sequence[Part]) -> Message:
        """Take a message: Hello, Resume, a frame, End, Fail, Ping or Bye.

        A Resume is for the job: another object has that session.
        """
        message = transfer.decode(parts)
        match message:
            case ClusterFrame() if self.state is ArchiverState.RECEIVING:
                self._take(message.seq, message.dev_id, 1, len(message.data))
            case RunFrame() if self.state is ArchiverState.RECEIVING:
                self._take(message.seq, message.dev_id, message.count, message.payload.nbytes)
            case SharedRun() if self.state is ArchiverState.RECEIVING and self.shared:
                self._take(message.seq, message.dev_id, message.count, message.data_bytes)
            case Scattered() if self.state is ArchiverState.RECEIVING and self.shared:
                data_bytes = transfer.scattered_bytes(message.clusters)
                self._take(message.seq, message.dev_id, len(message.clusters), data_bytes)
            case UnchangedRun() if self.state is ArchiverState.RECEIVING and self.has_base:
                self._take(message.seq, message.dev_id, 0, 0)
                self.received_clusters += message.count
            case Ping() | Want() if isinstance(message, Ping) or self.digest_key:
                pass
            case Hello() if self.state is ArchiverState.GREETING:
                self._greeted(message)
            case Resume() if self.state is ArchiverState.GREETING:
                pass
            case Bye() if self.state is ArchiverState.DONE_SENT:
                self.state = ArchiverState.CLOSED
            case End() if self.state is ArchiverState.RECEIVING:
                self._ended(message)
            case Fail():
                self.state = ArchiverState.CLOSED
            case _:
                name = type(message).__name__
                raise RemoteProtocolError("sequence", f"{name} in state {self.state.value}")
        return message

    def _greeted(self, message: Hello) -> None:
        self.device = message.device
        self.size_bytes = message.size
        self.shared_at = message.shared
        self.session = message.session
        self.state = ArchiverState.WAITING

    def _take(self, seq: int, dev_id: int, clusters: int, data_bytes: int) -> None:
        if seq != self.received_frames + 1:
            raise RemoteProtocolError(
                "sequence", f"frame {seq} where {self.received_frames + 1} must come"
            )
        if dev_id != self.dev_id:
            raise RemoteProtocolError(
                "wrong-device", f"a frame of device {dev_id} in the session of {self.dev_id}"
            )
        cost = limits.charge(clusters, data_bytes)
        if cost > self._frame_bytes or self.charged + cost > self._limit:
            raise RemoteProtocolError("credit", f"frame {seq} exceeds the credit")
        self.charged += cost
        self.received_frames = seq
        self.received_clusters += clusters

    def _ended(self, message: End) -> None:
        counted = (self.received_frames, self.received_clusters)
        if (message.frames, message.clusters) != counted:
            raise RemoteProtocolError(
                "counts",
                f"{message.frames} frames and {message.clusters} clusters announced, "
                f"{counted[0]} and {counted[1]} received",
            )
        self.state = ArchiverState.ENDED
        self.digest_key = b""  # nothing is left to ask for

    def welcome(
        self,
        dev_id: int,
        credit_bytes: int,
        frame_bytes: int,
        heartbeat_s: int,
        *,
        shared: bool = False,
        reconnect_s: int = 0,
        base: bytes | None = None,
    ) -> list[Part]:
        """`reconnect_s` is for a session that can be resumed.

        `base`: there is an earlier archive, and this is the key of its digests; empty: it has none.
        """
        self._must_be(ArchiverState.WAITING, "welcome")
        if frame_bytes < limits.MIN_FRAME_CHARGE:
            raise LocalProtocolError(f"frames of {frame_bytes} bytes do not hold a cluster")
        if shared and not self.shared_at:
            raise LocalProtocolError("the producer offers no memory")
        self.reconnect_s = reconnect_s if self.session else 0
        self._heartbeat_s = heartbeat_s
        self.has_base, self.digest_key = base is not None, base or b""
        parts = self._welcome(dev_id, credit_bytes, frame_bytes, shared=shared)
        self.state = ArchiverState.RECEIVING
        self.dev_id = dev_id
        self._limit = credit_bytes
        self._frame_bytes = frame_bytes
        self.shared = shared
        return parts

    def _welcome(
        self, dev_id: int, credit_bytes: int, frame_bytes: int, *, shared: bool
    ) -> list[Part]:
        return transfer.encode_control(
            Welcome(
                limits.VERSION,
                dev_id,
                credit_bytes,
                frame_bytes,
                self._heartbeat_s,
                shared,
                self.reconnect_s,
                scattered=shared,
                base=self.has_base,
                digest_key=self.digest_key,
            )
        )

    def welcome_again(self) -> list[Part]:
        """WELCOME once more, to a producer that has not received it and has sent nothing yet."""
        if self.state is not ArchiverState.RECEIVING or self.received_frames:
            raise RemoteProtocolError("sequence", "HELLO again in a session that has begun")
        return self._welcome(self.dev_id, self._limit, self._frame_bytes, shared=self.shared)

    def resumed(self) -> list[Part]:
        """The answer to the Resume of this session. Raises RemoteProtocolError."""
        never = (ArchiverState.GREETING, ArchiverState.WAITING, ArchiverState.CLOSED)
        if not self.reconnect_s or self.state in never:
            raise RemoteProtocolError("sequence", f"RESUME in state {self.state.value}")
        ended = self.state is not ArchiverState.RECEIVING
        return transfer.encode_control(
            Resumed(self.received_frames, self._limit, self._acked, ended)
        )

    def grant(self, limit: int, acked: int) -> list[Part] | None:
        """A grant message, or None when it would tell nothing new. A limit never shrinks."""
        if self.state not in (ArchiverState.RECEIVING, ArchiverState.ENDED):
            return None
        if acked > self.received_frames:
            raise LocalProtocolError(f"frame {acked} acknowledged, {self.received_frames} received")
        if limit <= self._limit and acked <= self._acked:
            return None
        self._limit = max(limit, self._limit)
        self._acked = max(acked, self._acked)
        return transfer.encode_control(Grant(self._limit, self._acked))

    def have(self, first: int, digests: bytes) -> list[Part]:
        """The answer to WANT."""
        return transfer.encode_control(Have(first, digests))

    def done(self, uuid: bytes) -> list[Part]:
        """DONE, or DONE once more where the first was lost with its connection."""
        if self.state is not ArchiverState.DONE_SENT:
            self._must_be(ArchiverState.ENDED, "done")
        self.state = ArchiverState.DONE_SENT if self.reconnect_s else ArchiverState.CLOSED
        return transfer.encode_control(Done(uuid))

    def refuse(self, code: str, reason: str) -> list[Part]:
        self.state = ArchiverState.CLOSED
        return transfer.encode_control(Refuse(code, transfer.sayable(reason)))

    def abort(self, reason: str) -> list[Part]:
        self.state = ArchiverState.CLOSED
        return transfer.encode_control(Abort(transfer.sayable(reason)))

    def pong(self) -> list[Part]:
        return transfer.encode_control(Pong())

    def _must_be(self, state: ArchiverState, what: str) -> None:
        if self.state is not state:
            raise LocalProtocolError(f"{what} in state {self.state.value}")
