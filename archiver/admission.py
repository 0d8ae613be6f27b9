# SPDX-License-Identifier: Apache-2.0
"""Who belongs to a job: producers that come, that come again, and strangers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vmapipe.archiver.instructions import Notice, Send
from vmapipe.archiver.jobspec import JobSpec
from vmapipe.archiver.peers import Peer, Peers
from vmapipe.clusters.sizes import MAX_DEVICE_BYTES
from vmapipe.protocol.archiver_side import State
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.messages import Hello, Resume

# Strangers that are told of: a log that one of them can fill is no log.
_MAX_TOLD = 100


class Admission:
    """`peers` are those that were taken. Raises RemoteProtocolError for whoever is not."""

    def __init__(self, spec: JobSpec, peers: Peers) -> None:
        self._expected = spec.devices
        self._count = len(spec.devices) or spec.expect
        self._job = spec.job
        self._peers = peers
        #: Messages of those that do not belong here.
        self.refused = 0

    @property
    def complete(self) -> bool:
        """Nobody is missing."""
        return len(self._peers) == self._count

    def missing(self) -> str:
        here = {peer.side.device for peer in self._peers.all}
        missing = [name for name in self._expected if name not in here]
        if missing:
            return "the producer of device " + ", ".join(repr(name) for name in missing)
        return f"{self._count - len(here)} of {self._count} producers"

    def greet(self, at: bytes, newcomer: Peer, hello: Hello, *, gathering: bool) -> list[Send]:
        if self._job is not None and hello.job != self._job:
            raise RemoteProtocolError("unknown-job", "another job is made here")
        before = self._peers.of_session(hello.session, newcomer.client)
        if before is not None:
            return self._greet_again(at, before, hello, newcomer.heard)
        _check_newcomer(hello, self._peers, self._expected, gathering=gathering)
        self._job = hello.job
        self._peers.add(at, newcomer)
        return []

    def _greet_again(self, at: bytes, before: bytes, hello: Hello, now: float) -> list[Send]:
        """Its connection was lost before WELCOME came."""
        moved = self._peers.move(before, at, hello.attempt, now)
        if moved is None:
            return []
        side = moved[0].side
        if (side.device, side.size_bytes) != (hello.device, hello.size):
            raise RemoteProtocolError("sequence", "HELLO again, and it says something else")
        return [] if side.state is State.WAITING else [Send(at, side.welcome_again())]

    def resume(
        self, at: bytes, message: Resume, client: str, now: float, uuid: bytes
    ) -> list[Send | Notice]:
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
        if peer.side.state is State.TOLD:
            answers.append(Send(at, peer.side.done(uuid)))
        back = f"device {peer.side.device!r}: connected again after {silence_s:.0f} s"
        return [*answers, Notice(back)]

    def refuse(self, at: bytes, error: RemoteProtocolError) -> list[Notice]:
        """A stranger was told why; nothing more is heard from it."""
        self._peers.ignore(at)
        self.refused += 1
        notices = []
        if self.refused <= _MAX_TOLD:
            notices.append(Notice(f"refused a stranger: {error}"))
        if self.refused == _MAX_TOLD:
            notices.append(Notice("more strangers are refused without a word"))
        return notices


def _check_newcomer(
    hello: Hello, peers: Peers, expected: Sequence[str], *, gathering: bool
) -> None:
    """Raises RemoteProtocolError for one that the job does not want."""
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
