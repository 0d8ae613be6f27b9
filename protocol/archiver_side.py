# SPDX-License-Identifier: Apache-2.0
"""The archiver's half of the dialogue with one producer: checks order, numbers and credit."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from vmapipe.protocol import frames, limits
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.messages import (
    Abort,
    Bye,
    ClusterFrame,
    Done,
    End,
    Fail,
    Grant,
    Hello,
    Message,
    Ping,
    Pong,
    Refuse,
    Resume,
    Resumed,
    RunFrame,
    Scattered,
    SharedRun,
    Welcome,
)
from vmapipe.protocol.packing import Part


class State(enum.Enum):
    GREETING = "greeting"
    WAITING = "waiting"
    RECEIVING = "receiving"
    ENDED = "ended"
    TOLD = "told"
    CLOSED = "closed"


class ArchiverSide:
    """One session. `receive` raises RemoteProtocolError for what the producer must not send."""

    def __init__(self) -> None:
        self.state = State.GREETING
        self.device = ""
        self.size_bytes = 0
        self.dev_id = 0
        self.received_frames = 0
        self.received_clusters = 0
        self.charged = 0
        #: Where the producer offers to share memory, and whether it was accepted.
        self.shared_at = ""
        self.shared = False
        #: By which the producer is known again; empty: it cannot be.
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
        message = frames.decode(parts)
        match message:
            case ClusterFrame() if self.state is State.RECEIVING:
                self._take(message.seq, message.dev_id, 1, len(message.data))
            case RunFrame() if self.state is State.RECEIVING:
                self._take(message.seq, message.dev_id, message.count, message.payload.nbytes)
            case SharedRun() if self.state is State.RECEIVING and self.shared:
                data_bytes = frames.masked_bytes(message.masks)
                self._take(message.seq, message.dev_id, message.count, data_bytes)
            case Scattered() if self.state is State.RECEIVING and self.shared:
                data_bytes = frames.scattered_bytes(message.clusters)
                self._take(message.seq, message.dev_id, len(message.clusters), data_bytes)
            case Ping():
                pass
            case Hello() if self.state is State.GREETING:
                self._greeted(message)
            case Resume() if self.state is State.GREETING:
                pass
            case Bye() if self.state is State.TOLD:
                self.state = State.CLOSED
            case End() if self.state is State.RECEIVING:
                self._ended(message)
            case Fail():
                self.state = State.CLOSED
            case _:
                name = type(message).__name__
                raise RemoteProtocolError("sequence", f"{name} in state {self.state.value}")
        return message

    def _greeted(self, message: Hello) -> None:
        self.device = message.device
        self.size_bytes = message.size
        self.shared_at = message.shared
        self.session = message.session
        self.state = State.WAITING

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
        self.state = State.ENDED

    def welcome(
        self,
        dev_id: int,
        credit_bytes: int,
        frame_bytes: int,
        heartbeat_s: int,
        *,
        shared: bool = False,
        reconnect_s: int = 0,
    ) -> list[Part]:
        """`reconnect_s` is for a session that can be resumed."""
        self._must_be(State.WAITING, "welcome")
        if frame_bytes < limits.MIN_FRAME_CHARGE:
            raise LocalProtocolError(f"frames of {frame_bytes} bytes do not hold a cluster")
        if shared and not self.shared_at:
            raise LocalProtocolError("the producer offers no memory")
        self.reconnect_s = reconnect_s if self.session else 0
        self._heartbeat_s = heartbeat_s
        parts = self._welcome(dev_id, credit_bytes, frame_bytes, shared=shared)
        self.state = State.RECEIVING
        self.dev_id = dev_id
        self._limit = credit_bytes
        self._frame_bytes = frame_bytes
        self.shared = shared
        return parts

    def _welcome(
        self, dev_id: int, credit_bytes: int, frame_bytes: int, *, shared: bool
    ) -> list[Part]:
        return frames.encode_control(
            Welcome(
                limits.VERSION,
                dev_id,
                credit_bytes,
                frame_bytes,
                self._heartbeat_s,
                shared,
                self.reconnect_s,
                scattered=shared,
            )
        )

    def welcome_again(self) -> list[Part]:
        """To a producer that has not heard the first one, and has sent nothing yet."""
        if self.state is not State.RECEIVING or self.received_frames:
            raise RemoteProtocolError("sequence", "HELLO again in a session that has begun")
        return self._welcome(self.dev_id, self._limit, self._frame_bytes, shared=self.shared)

    def resumed(self) -> list[Part]:
        """The answer to the Resume of this session. Raises RemoteProtocolError."""
        if not self.reconnect_s or self.state not in (State.RECEIVING, State.ENDED, State.TOLD):
            raise RemoteProtocolError("sequence", f"RESUME in state {self.state.value}")
        ended = self.state is not State.RECEIVING
        return frames.encode_control(Resumed(self.received_frames, self._limit, self._acked, ended))

    def grant(self, limit: int, acked: int) -> list[Part] | None:
        """A grant message, or None when it would tell nothing new. A limit never shrinks."""
        if self.state not in (State.RECEIVING, State.ENDED):
            return None
        if acked > self.received_frames:
            raise LocalProtocolError(f"frame {acked} acknowledged, {self.received_frames} received")
        if limit <= self._limit and acked <= self._acked:
            return None
        self._limit = max(limit, self._limit)
        self._acked = max(acked, self._acked)
        return frames.encode_control(Grant(self._limit, self._acked))

    def done(self, uuid: bytes) -> list[Part]:
        """Again, where the first one was lost with its connection."""
        if self.state is not State.TOLD:
            self._must_be(State.ENDED, "done")
        self.state = State.TOLD if self.reconnect_s else State.CLOSED
        return frames.encode_control(Done(uuid))

    def refuse(self, code: str, reason: str) -> list[Part]:
        self.state = State.CLOSED
        return frames.encode_control(Refuse(code, frames.sayable(reason)))

    def abort(self, reason: str) -> list[Part]:
        self.state = State.CLOSED
        return frames.encode_control(Abort(frames.sayable(reason)))

    def pong(self) -> list[Part]:
        return frames.encode_control(Pong())

    def _must_be(self, state: State, what: str) -> None:
        if self.state is not state:
            raise LocalProtocolError(f"{what} in state {self.state.value}")
