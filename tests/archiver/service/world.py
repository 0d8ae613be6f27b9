# SPDX-License-Identifier: Apache-2.0
"""A service's core with a world around it that does what it is told, and keeps count."""

from __future__ import annotations

from typing import Any

from vmapipe.archiver.service import jobs as core
from vmapipe.archiver.service.admission import FreeSpace, ServiceLimits
from vmapipe.archiver.service.front import (
    ArchiverEnded,
    ArchiverEvent,
    Front,
    FrontEvent,
    PeerMessage,
    ServiceTicked,
)
from vmapipe.archiver.service.jobs import ArchivePlace
from vmapipe.protocol import limits, service, transfer
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import Hello, Message
from vmapipe.runtime.event_types import BackupProgressEvent, BegunDevice, StoredEvent

MANY = 1 << 40
HEARTBEAT_S = 20
BOUNDS = ServiceLimits(
    max_jobs=3, min_free_bytes=1000, min_memory_bytes=1000, heartbeat_s=HEARTBEAT_S
)


class World:
    """Facts, clock and processes. `said` is what peers were sent, decoded."""

    def __init__(self, bounds: ServiceLimits) -> None:
        self.now = 0.0
        self.front = Front(bounds, self, self.now)
        self.room_left = FreeSpace(MANY, MANY)
        self.stored: set[str] = set()
        self.client_jobs = 0
        self.opened = 0
        self.quota_bytes = 0
        self.used: dict[str, int] = {}
        #: Jobs whose archiver runs, and those that were asked to stop.
        self.archivers: set[bytes] = set()
        self.stopping: set[bytes] = set()
        self.unreleased: set[bytes] = set()
        self.attached: dict[bytes, bytes] = {}
        self.forwarded: list[bytes] = []
        self.dropped: list[bytes] = []
        #: Clients that are listed.
        self.others: set[str] = set()
        self.said: list[tuple[bytes, object]] = []
        self.log: list[Any] = []

    # --- facts ---

    def place(self, client: str, request: service.Open) -> ArchivePlace:
        if request.name == "refused":
            raise RemoteProtocolError("bad-contents", "such a thing cannot be archived")
        path = f"/{client}/{request.name}"
        return ArchivePlace(
            path,
            exists=path in self.stored,
            max_jobs=self.client_jobs,
            quota_bytes=self.quota_bytes,
            used_bytes=self.used.get(client, 0),
            others=frozenset(self.others - {client}),
        )

    def room(self) -> FreeSpace:
        return self.room_left

    def used_bytes(self, client: str) -> int:
        return self.used.get(client, 0)

    # --- what happens ---

    def say(self, peer: bytes, client: str, parts: list[Part]) -> None:
        self.handle(PeerMessage(peer, client, parts, self.now))

    def open(self, peer: bytes, client: str, name: str, job: bytes | None = None) -> bytes:
        # Counted, not drawn: the same steps must be the same again.
        self.opened += 1
        job = job or self.opened.to_bytes(16, "big")
        request = service.Open(limits.VERSION, job, name, ("a", "b"))
        self.say(peer, client, service.encode(request))
        return job

    def hello(self, peer: bytes, client: str, job: bytes) -> None:
        hello = Hello(limits.VERSION, job, "a", 65536)
        self.say(peer, client, transfer.encode_control(hello))

    def ready(self, job: bytes) -> None:
        self.handle(ArchiverEvent(job, {"event": "listening", "endpoint": "ipc:///x"}))

    def begin(self, job: bytes, *sizes: int) -> None:
        """The job's archiver has its devices, and the archive's header is written."""
        devices: list[BegunDevice] = [
            {"dev_id": index, "name": f"d{index}", "bytes": size}
            for index, size in enumerate(sizes, 1)
        ]
        self.handle(ArchiverEvent(job, {"event": "begun", "uuid": "00" * 16, "devices": devices}))

    def progress(self, job: bytes, *done: int) -> None:
        """The job's archiver has so many bytes of each device."""
        event: BackupProgressEvent = {
            "event": "progress",
            "stored_bytes": 0,
            "plain_bytes": 0,
            "devices": [
                {"name": f"d{index}", "bytes": count, "done_bytes": count, "zero_bytes": 0}
                for index, count in enumerate(done, 1)
            ],
        }
        self.handle(ArchiverEvent(job, event))

    def store(self, job: bytes) -> None:
        """The job's archiver ends well."""
        self.tell_stored(job)
        self.end(job, "")

    def tell_stored(self, job: bytes) -> None:
        """It has stored the archive, and lives on."""
        self.stored.add(self.front.jobs[job].place.path)
        uuid_hex = job.hex()
        event: StoredEvent = {
            "event": "stored",
            "archive": "x",
            "uuid": uuid_hex,
            "stored_bytes": 1,
            "plain_bytes": 1,
        }
        self.handle(ArchiverEvent(job, event))

    def end(self, job: bytes, words: str) -> None:
        self.archivers.remove(job)
        self.handle(ArchiverEnded(job, words, {}, self.now))

    def pass_time(self, seconds: float) -> None:
        """In steps, as the loop does; a longer one would look like a stopped machine."""
        while seconds > 0:
            self.now += min(seconds, 1.0)
            seconds -= 1.0
            self.handle(ServiceTicked(self.now))

    def handle(self, event: FrontEvent) -> None:
        for instruction in self.front.handle(event):
            match instruction:
                case core.StartArchiver(job):
                    assert job not in self.unreleased
                    self.archivers.add(job)
                    self.unreleased.add(job)
                case core.StopArchiver(job) | core.KillArchiver(job):
                    assert job in self.archivers
                    self.stopping.add(job)
                case core.ReleaseJob(job):
                    assert job not in self.archivers
                    self.unreleased.remove(job)
                case core.AttachProducer(peer, job):
                    assert peer not in self.attached
                    self.attached[peer] = job
                case core.DetachProducer(peer):
                    del self.attached[peer]
                case core.ForwardMessage(peer):
                    assert peer in self.attached
                    self.forwarded.append(peer)
                case core.DropPeer(peer):
                    self.dropped.append(peer)
                case core.SendAnswer(peer, parts):
                    self.said.append((peer, read(parts)))
                case core.LogEvent(line):
                    self.log.append(line)

    def heard_by(self, peer: bytes) -> list[object]:
        """What it was sent since this was asked last."""
        heard = [message for other, message in self.said if other == peer]
        self.said = [item for item in self.said if item[0] != peer]
        return heard


def read(parts: list[Part]) -> service.FromService | Message:
    try:
        return service.decode_of_service(parts)
    except RemoteProtocolError:
        return transfer.decode(parts)


def refusal(world: World, peer: bytes) -> str:
    heard = world.heard_by(peer)
    assert len(heard) == 1
    assert isinstance(heard[0], service.JobRefused)
    return heard[0].code


def beat(world: World, peer: bytes, job: bytes, client: str = "") -> None:
    world.say(peer, client, service.encode(service.Beat(job)))
