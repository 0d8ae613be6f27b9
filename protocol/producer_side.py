# SPDX-License-Identifier: Apache-2.0
"""A producer's half of the dialogue: what it may send, and what an answer means."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from vmapipe.protocol import frames, limits
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.messages import (
    Abort,
    Bye,
    Control,
    Done,
    End,
    Fail,
    Grant,
    Hello,
    Ping,
    Pong,
    Refuse,
    Resume,
    Resumed,
    SharedCluster,
    Welcome,
)
from vmapipe.protocol.packing import Part

# For how long a connection may be lost counts from the last sign of life before the
# loss: that is then at most so old, and the limit comes earlier by no more than that.
_RECONNECT_PING_S = 1.0


class State(enum.Enum):
    GREETING = "greeting"
    SENDING = "sending"
    ENDING = "ending"
    CLOSED = "closed"


class ProducerSide:
    """One session. Methods that send return message parts; `receive` takes them."""

    def __init__(
        self,
        job: bytes,
        device: str,
        size_bytes: int,
        program: str = "",
        shared: str = "",
        session: bytes = b"",
    ) -> None:
        """`session`: 16 random bytes, or empty: a lost connection is the end."""
        self.state = State.GREETING
        self.dev_id = 0
        self.acked = 0
        self.frame_bytes = 0
        self.heartbeat_s = 0
        #: Whether the archiver takes runs, and scattered clusters, in shared memory.
        self.shared = self.scatters = False
        self.sent_frames = 0
        self.sent_clusters = 0
        self._hello = Hello(
            limits.VERSION, job, device, size_bytes, frames.sayable(program), shared, session
        )
        #: So long a lost connection may be; 0: it is the end.
        self.reconnect_s = 0
        self._asked = False
        self._attempts = 0
        self._limit = 0
        self._charged = 0

    @property
    def credit(self) -> int:
        """Bytes of charge that may still be sent."""
        return self._limit - self._charged

    @property
    def ping_s(self) -> float:
        """When nothing was said, or heard, for so long, it is time for a PING."""
        third_s = (self.heartbeat_s or limits.GREETING_HEARTBEAT_S) / 3
        return min(third_s, _RECONNECT_PING_S) if self.reconnect_s else third_s

    def hello(self) -> list[Part]:
        """Again on each new connection, until WELCOME comes."""
        self._must_be(State.GREETING)
        hello = dataclasses.replace(self._hello, attempt=self._attempts)
        self._attempts += 1
        return frames.encode_control(hello)

    def run(self, first: int, count: int, masks: bytes, payload: Part) -> list[Part]:
        """Consecutive clusters (see RunFrame); its charge must be within `credit`.

        Raises LocalProtocolError for what the archiver would refuse.
        """
        self._account(first, count, masks, memoryview(payload).nbytes)
        return frames.encode_run(self.sent_frames, self.dev_id, first, count, masks, payload)

    def shared_run(self, first: int, count: int, masks: bytes, position: int) -> list[Part]:
        """As `run`, with the payload at `position` in the shared memory (see SharedRun)."""
        if not self.shared:
            raise LocalProtocolError("the archiver does not share memory")
        if not masks:
            raise LocalProtocolError("a run of zeroes has no data to share")
        self._account(first, count, masks, frames.masked_bytes(masks))
        return frames.encode_shared_run(
            self.sent_frames, self.dev_id, first, count, masks, position
        )

    def scattered(self, clusters: Sequence[SharedCluster]) -> list[Part]:
        """Clusters in shared memory (see Scattered), where `scatters` says so."""
        if not self.scatters:
            raise LocalProtocolError("the archiver does not take scattered clusters")
        fault = frames.scattered_fault(clusters)
        self._charge(fault, len(clusters), frames.scattered_bytes(clusters))
        return frames.encode_scattered(self.sent_frames, self.dev_id, clusters)

    def _account(self, first: int, count: int, masks: bytes, data_bytes: int) -> None:
        self._charge(frames.run_fault(first, count, masks, data_bytes), count, data_bytes)

    def _charge(self, fault: tuple[str, str] | None, count: int, data_bytes: int) -> None:
        self._must_be(State.SENDING)
        if fault is not None:
            raise LocalProtocolError(fault[1])
        cost = limits.charge(count, data_bytes)
        if cost > self.credit or cost > self.frame_bytes:
            raise LocalProtocolError(f"a frame of {cost} bytes exceeds the credit {self.credit}")
        self._charged += cost
        self.sent_frames += 1
        self.sent_clusters += count

    def end(self) -> list[Part]:
        self._must_be(State.SENDING)
        self.state = State.ENDING
        return frames.encode_control(End(self.sent_frames, self.sent_clusters))

    def fail(self, reason: str) -> list[Part]:
        self.state = State.CLOSED
        return frames.encode_control(Fail(frames.sayable(reason)))

    def end_again(self) -> list[Part]:
        """Where RESUMED says that it was lost."""
        self._must_be(State.ENDING)
        return frames.encode_control(End(self.sent_frames, self.sent_clusters))

    def resume(self) -> list[Part]:
        """The first words on a new connection, once WELCOME has come."""
        if not self.reconnect_s or self.state not in (State.SENDING, State.ENDING):
            raise LocalProtocolError(f"nothing to resume in state {self.state.value}")
        self._asked = True
        hello, attempt = self._hello, self._attempts
        self._attempts += 1
        return frames.encode_control(Resume(limits.VERSION, hello.job, hello.session, attempt))

    def bye(self) -> list[Part]:
        """After DONE, where `reconnect_s` is not 0."""
        self._must_be(State.CLOSED)
        return frames.encode_control(Bye())

    def ping(self) -> list[Part]:
        return frames.encode_control(Ping())

    def receive(self, parts: Sequence[Part]) -> Control:
        """Take an answer. Raises RemoteProtocolError when it does not belong here."""
        message = frames.decode(parts)
        match message:
            case Welcome() if self.state is State.GREETING:
                self._welcomed(message)
            case Grant() if self.state in (State.SENDING, State.ENDING):
                if message.acked > self.sent_frames:
                    raise RemoteProtocolError("sequence", "an acknowledgement of unsent frames")
                self._limit = max(self._limit, message.limit)
                self.acked = max(self.acked, message.acked)
            case Resumed() if self._asked and self.state in (State.SENDING, State.ENDING):
                self._resumed(message)
            case Done() if self.state is State.ENDING:
                self.acked = self.sent_frames
                self.state = State.CLOSED
            case Refuse() | Abort():
                self.state = State.CLOSED
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
        if message.shared and not self._hello.shared:
            raise RemoteProtocolError("malformed", "memory accepted that was not offered")
        self.dev_id = message.dev_id
        self.frame_bytes = message.frame_bytes
        self.heartbeat_s = message.heartbeat_s
        self.shared, self.scatters = message.shared, message.scattered
        self.reconnect_s = message.reconnect_s if self._hello.session else 0
        self._limit = message.credit
        self.state = State.SENDING

    def _resumed(self, message: Resumed) -> None:
        if not self.acked <= message.acked <= message.received <= self.sent_frames:
            raise RemoteProtocolError("sequence", "resumed behind frames that were never sent")
        all_sent = self.state is State.ENDING and message.received == self.sent_frames
        if message.ended and not all_sent:
            raise RemoteProtocolError("sequence", "an end that was never sent")
        self._asked = False
        self._limit = max(self._limit, message.limit)
        self.acked = message.acked

    def _must_be(self, state: State) -> None:
        if self.state is not state:
            raise LocalProtocolError(f"not possible in state {self.state.value}")
