# SPDX-License-Identifier: Apache-2.0
"""A job and its producers over connections that a test breaks: real cores, no sockets, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tests.archiver.job.world import JOB
from tests.vma.archives import disk_image, read_whole, scan
from vmapipe.archiver.job.device import FrameMark
from vmapipe.archiver.job.job import Job
from vmapipe.archiver.job.spec import (
    AbandonArchive,
    ArchiveStored,
    BeginArchive,
    ExtentWritten,
    FinishArchive,
    JobInstruction,
    LogNotice,
    MessageReceived,
    Send,
    StoreExtent,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.session import UnackedFrames
from vmapipe.protocol import limits
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import Done, Message, Resumed
from vmapipe.protocol.transfer_state import ProducerSide, ProducerState
from vmapipe.vma.packer import PackedExtent


class Producer:
    """As producer/session.py does it: frames are kept until they are acknowledged."""

    def __init__(self, name: str, data: bytes, session: bytes) -> None:
        self.name = name
        self.data = data
        self.side = ProducerSide(JOB, name, len(data), session=session)
        self.kept = UnackedFrames()
        self.away = False
        self.cluster = 0
        self.to_archiver: deque[list[bytes]] = deque()
        self.from_archiver: deque[list[bytes]] = deque()
        self.connection = b""
        self.heard: Message | None = None

    def connect(self, connection: bytes) -> None:
        """A new one: what was under way in both directions is lost."""
        self.connection = connection
        self.to_archiver.clear()
        self.from_archiver.clear()
        if self.side.state is ProducerState.GREETING:
            self.say(self.side.hello())
        elif self.side.state is not ProducerState.CLOSED:
            self.away = False
            self.say(self.side.resume())
            self.away = True

    def say(self, parts: list[Part]) -> None:
        if not self.away:
            self.to_archiver.append([bytes(part) for part in parts])

    def step(self) -> bool:
        """Send the next thing; whether there was one."""
        if self.side.state is not ProducerState.SENDING or self.away:
            return False
        at = self.cluster * CLUSTER_BYTES
        if at >= len(self.data):
            self.say(self.side.end())
            return True
        data = self.data[at : at + CLUSTER_BYTES]
        data += bytes(-len(data) % 4096)
        masks = ((1 << len(data) // 4096) - 1).to_bytes(2, "big") if any(data) else b""
        if self.side.credit < limits.charge(1, len(data)):
            return False
        parts = self.side.run(self.cluster, 1, masks, data if masks else b"")
        self.kept.add(self.side.sent_frames, parts)
        self.say(parts)
        self.cluster += 1
        return True

    def hear(self) -> None:
        message = self.side.receive(self.from_archiver.popleft())
        match message:
            case Resumed(received, _, _, ended):
                self.away = False
                for parts in self.kept.behind(received):
                    self.say(parts)
                if self.side.state is ProducerState.ENDING and not ended:
                    self.say(self.side.end_again())
            case Done():
                self.say(self.side.bye())
        self.kept.acknowledge(self.side.acked)
        self.heard = message


class World:
    """One job, its store, and the connections between."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.producers: list[Producer] = []
        self.archive = bytearray()
        self.queue: deque[PackedExtent[FrameMark]] = deque()
        self.notices: list[str] = []
        self.finished = self.abandoned = False
        self.replies: dict[bytes, deque[list[bytes]]] = {}
        self._connections = 0

    def connect(self, producer: Producer) -> None:
        self._connections += 1
        producer.connect(b"%d" % self._connections)

    def carry_out(self, instructions: Iterable[JobInstruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send(peer, parts):
                    message = [bytes(part) for part in parts]
                    self.replies.setdefault(peer, deque()).append(message)
                    for producer in self.producers:
                        if producer.connection == peer:
                            producer.from_archiver.append(message)
                case BeginArchive(_, raw_header):
                    self.archive += raw_header
                case StoreExtent(extent):
                    self.queue.append(extent)
                case FinishArchive():
                    self.finished = True
                case AbandonArchive():
                    self.abandoned = True
                case LogNotice(text):
                    self.notices.append(text)

    def deliver(self, peer: bytes, parts: list[bytes], now: float = 0.0, client: str = "") -> None:
        self.carry_out(self.job.handle(MessageReceived(peer, parts, now, client)))

    def write(self) -> None:
        extent = self.queue.popleft()
        self.archive += b"".join(bytes(part) for part in extent.buffers)
        self.carry_out(
            self.job.handle(ExtentWritten(extent.notes, {each[0] for each in extent.clusters}))
        )
        self.store_if_ready()

    def store_if_ready(self) -> None:
        if self.finished and not self.queue:
            self.carry_out(self.job.handle(ArchiveStored()))

    def images(self) -> dict[str, bytes]:
        raw = bytes(self.archive)
        events = scan(raw)
        return {d.name: disk_image(d, events) for d in read_whole(raw).devices}
