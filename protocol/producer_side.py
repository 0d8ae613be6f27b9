# SPDX-License-Identifier: Apache-2.0
"""A producer's half of the dialogue: what it may send, and what an answer means."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from vmapipe.protocol import frames, limits
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.frames import Part
from vmapipe.protocol.messages import (
    Abort,
    Control,
    Done,
    End,
    Fail,
    Grant,
    Hello,
    Ping,
    Pong,
    Refuse,
    Welcome,
)


class State(enum.Enum):
    GREETING = "greeting"
    SENDING = "sending"
    ENDING = "ending"
    CLOSED = "closed"


class ProducerSide:
    """One session. Methods that send return message parts; `receive` takes them."""

    def __init__(
        self, job: bytes, device: str, size_bytes: int, program: str = "", shared: str = ""
    ) -> None:
        self.state = State.GREETING
        self.dev_id = 0
        self.acked = 0
        self.frame_bytes = 0
        self.heartbeat_s = 0
        self.shared = False
        self.sent_frames = 0
        self.sent_clusters = 0
        self._hello = Hello(
            limits.VERSION, job, device, size_bytes, frames.sayable(program), shared
        )
        self._limit = 0
        self._charged = 0

    @property
    def credit(self) -> int:
        """Bytes of charge that may still be sent."""
        return self._limit - self._charged

    def hello(self) -> list[Part]:
        self._must_be(State.GREETING)
        return frames.encode_control(self._hello)

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

    def _account(self, first: int, count: int, masks: bytes, data_bytes: int) -> None:
        self._must_be(State.SENDING)
        fault = frames.run_fault(first, count, masks, data_bytes)
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
        if message.shared and not self._hello.shared:
            raise RemoteProtocolError("malformed", "memory accepted that was not offered")
        self.dev_id = message.dev_id
        self.frame_bytes = message.frame_bytes
        self.heartbeat_s = message.heartbeat_s
        self.shared = message.shared
        self._limit = message.credit
        self.state = State.SENDING

    def _must_be(self, state: State) -> None:
        if self.state is not state:
            raise LocalProtocolError(f"not possible in state {self.state.value}")
