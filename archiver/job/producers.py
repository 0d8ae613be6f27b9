# SPDX-License-Identifier: Apache-2.0
"""The producers of one job: by their connections, and known again on a new one. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmapipe.archiver.job.device import DeviceState
from vmapipe.archiver.job.spec import JobSpec, LogNotice, Send
from vmapipe.clusters.sizes import MAX_DEVICE_BYTES
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError, connection_lost
from vmapipe.protocol.transfer import Hello, Resume
from vmapipe.protocol.transfer_state import ArchiverSide, ArchiverState

# How many ignored connections are remembered: refused peers, each answered once, and
# connections that a producer has replaced by a new one.
_MAX_IGNORED = 1024


class Lost(NamedTuple):
    """A producer that the job cannot go on without."""

    reason: str


class JobProducer:
    """One producer. `client`: the name that its key has proved; empty: no keys are asked for."""

    __slots__ = ("attempt", "client", "device", "heard", "missed", "side")

    def __init__(self, side: ArchiverSide, heard: float, client: str, attempt: int) -> None:
        self.side = side
        self.heard = heard
        self.client = client
        self.device: DeviceState | None = None
        #: Its connection's number: an older one is left behind.
        self.attempt = attempt
        #: It was said that nothing comes from it.
        self.missed = False

    def check_silence(self, silence_s: float, heartbeat_s: int, *, gathering: bool) -> Lost | str:
        """Return what follows from its silence: the job's end, a line in the log, or nothing (empty)."""
        side = self.side
        # Before WELCOME a producer does not know our limit.
        least_s = limits.GREETING_HEARTBEAT_S if gathering else side.reconnect_s
        limit_s = max(heartbeat_s, least_s)
        if silence_s <= heartbeat_s or side.state is ArchiverState.CLOSED:
            return ""
        if silence_s > limit_s:
            if side.state is ArchiverState.DONE_SENT:
                side.state = ArchiverState.CLOSED
                return f"{connection_lost(side.device, limit_s)}, after all was stored"
            if side.reconnect_s:
                return Lost(connection_lost(side.device, limit_s))
            return Lost(f"the producer of device {side.device!r} has been silent for {limit_s} s")
        if not side.reconnect_s or self.missed:
            return ""
        self.missed = True
        return f"device {side.device!r}: nothing comes; it is waited for, up to {limit_s} s"


class JobProducers:
    """All that were accepted, and which connections are not listened to any more."""

    def __init__(self) -> None:
        #: In the order in which they came.
        self.by_connection: dict[bytes, JobProducer] = {}
        # In the order of their coming; a dict, because a set has none.
        self._ignored: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self.by_connection)

    def __iter__(self) -> Iterator[tuple[bytes, JobProducer]]:
        return iter(self.by_connection.items())

    @property
    def all(self) -> list[JobProducer]:
        return list(self.by_connection.values())

    def of_device(self, name: str) -> JobProducer | None:
        return next((peer for peer in self.all if peer.side.device == name), None)

    def of_session(self, session: bytes, client: str) -> bytes | None:
        """The connection of the producer that began this session, if it was this client."""
        for at, peer in self:
            if session and peer.side.session == session and peer.client == client:
                return at
        return None

    def move(
        self, old: bytes, new: bytes, attempt: int, now: float
    ) -> tuple[JobProducer, float] | None:
        """A producer has come over a new connection; what still comes over the old one is ignored.

        Returns it, and for how long it was silent; None when `new` is the older one, and late.
        """
        peer = self.by_connection[old]
        if attempt <= peer.attempt:
            self.ignore(new)
            return None
        peer.attempt = attempt
        silence_s, peer.heard, peer.missed = now - peer.heard, now, False
        if peer.device:
            peer.device.peer = new
        self.by_connection = {new if at == old else at: each for at, each in self}
        self.ignore(old)
        return peer, silence_s

    def is_ignored(self, at: bytes) -> bool:
        """True for a connection that was refused, or that a producer has replaced."""
        return at in self._ignored

    def ignore(self, at: bytes) -> None:
        while len(self._ignored) >= _MAX_IGNORED:
            del self._ignored[next(iter(self._ignored))]
        self._ignored[at] = None


# How many refused peers are logged: no peer may fill the log.
_MAX_TOLD = 100


class Admission:
    """Decides which peers belong to the job. `peers` are the accepted producers."""

    def __init__(self, spec: JobSpec, peers: JobProducers) -> None:
        self._expected = spec.devices
        self._count = len(spec.devices) or spec.expect
        self._job = spec.job
        self._peers = peers
        #: How many messages of other peers were refused.
        self.refused = 0

    @property
    def complete(self) -> bool:
        """All producers have come."""
        return len(self._peers) == self._count

    def missing(self) -> str:
        here = {peer.side.device for peer in self._peers.all}
        missing = [name for name in self._expected if name not in here]
        if missing:
            return "the producer of device " + ", ".join(repr(name) for name in missing)
        return f"{self._count - len(here)} of {self._count} producers"

    def greet(
        self, at: bytes, newcomer: JobProducer, hello: Hello, *, gathering: bool
    ) -> list[Send]:
        if self._job is not None and hello.job != self._job:
            raise RemoteProtocolError("unknown-job", "another job is made here")
        before = self._peers.of_session(hello.session, newcomer.client)
        if before is not None:
            return self._greet_again(at, before, hello, newcomer.heard)
        _check_newcomer(hello, self._peers, self._expected, gathering=gathering)
        self._job = hello.job
        self._peers.by_connection[at] = newcomer
        return []

    def _greet_again(self, at: bytes, before: bytes, hello: Hello, now: float) -> list[Send]:
        """Its connection was lost before WELCOME came."""
        moved = self._peers.move(before, at, hello.attempt, now)
        if moved is None:
            return []
        side = moved[0].side
        if (side.device, side.size_bytes) != (hello.device, hello.size):
            raise RemoteProtocolError("sequence", "HELLO again, and it says something else")
        return [] if side.state is ArchiverState.WAITING else [Send(at, side.welcome_again())]

    def resume(
        self, at: bytes, message: Resume, client: str, now: float, uuid: bytes
    ) -> list[Send | LogNotice]:
        """`uuid` is the archive's, for one that has to hear again that it is stored."""
        before = self._peers.of_session(message.session, client)
        if before is None or message.job != self._job:
            raise RemoteProtocolError(
                "unknown-session",
                "this archiver has no such session; if it was started again, what it had "
                "received is lost: begin the backup anew",
            )
        moved = self._peers.move(before, at, message.attempt, now)
        if moved is None:
            return []
        peer, silence_s = moved
        answers = [Send(at, peer.side.resumed())]
        if peer.side.state is ArchiverState.DONE_SENT:
            answers.append(Send(at, peer.side.done(uuid)))
        back = f"device {peer.side.device!r}: connected again after {silence_s:.0f} s"
        return [*answers, LogNotice(back)]

    def refuse(self, at: bytes, error: RemoteProtocolError) -> list[LogNotice]:
        """Ignore a peer that was refused, and log it."""
        self._peers.ignore(at)
        self.refused += 1
        notices = []
        if self.refused <= _MAX_TOLD:
            notices.append(LogNotice(f"refused a stranger: {error}"))
        if self.refused == _MAX_TOLD:
            notices.append(LogNotice("more strangers are refused without a word"))
        return notices


def _check_newcomer(
    hello: Hello, peers: JobProducers, expected: Sequence[str], *, gathering: bool
) -> None:
    """Raises RemoteProtocolError for a producer that the job does not expect."""
    twin = peers.of_device(hello.device)
    if twin and not gathering:
        raise RemoteProtocolError(
            "restarted",
            f"{hello.device!r} is being received already; a producer that was started again "
            "cannot go on: begin the backup anew",
        )
    if not gathering:
        raise RemoteProtocolError("busy", "the job has all its devices")
    if expected and hello.device not in expected:
        raise RemoteProtocolError("unknown-device", f"the job has no device {hello.device!r}")
    if twin:
        raise RemoteProtocolError("duplicate-device", f"{hello.device!r} is here already")
    if not 1 <= hello.size <= MAX_DEVICE_BYTES:
        raise RemoteProtocolError("bad-size", f"a device of {hello.size} bytes")
