# SPDX-License-Identifier: Apache-2.0
"""A job's core with producers and a store that exist only here."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Iterable

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
    JobSpec,
    JobStarted,
    LogNotice,
    MessageReceived,
    Send,
    StoreExtent,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.runs import piece_bytes
from vmapipe.producer.session import UnackedFrames
from vmapipe.producer.shared_memory import PieceAllocator
from vmapipe.protocol import limits
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import Abort, Done, Refuse, Welcome
from vmapipe.protocol.transfer_state import ProducerSide, ProducerState
from vmapipe.vma.packer import PackedExtent

JOB = bytes(range(16))
UUID = bytes(range(16, 32))


def spec(*devices: str, **changes: object) -> JobSpec:
    return JobSpec(uuid=UUID, ctime_s=1, devices=devices, job=JOB)._replace(**changes)  # type: ignore[arg-type]


class Store:
    """Takes what the job puts; says that it is written when the test wants."""

    def __init__(self) -> None:
        self.archive = bytearray()
        self.queue: deque[PackedExtent[FrameMark]] = deque()
        self.finished = self.abandoned = False

    def write_one(self, job: Job) -> Iterable[JobInstruction]:
        extent = self.queue.popleft()
        self.archive += b"".join(extent.buffers)
        return job.handle(ExtentWritten(extent.notes, {cluster[0] for cluster in extent.clusters}))


class World:
    """Carries messages and instructions between a job, its producers and the store."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.store = Store()
        self.producers: dict[bytes, Producer] = {}
        self.notices: list[str] = []
        self.carry_out(job.handle(JobStarted()))

    def carry_out(self, instructions: Iterable[JobInstruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send(peer, parts):
                    if peer in self.producers:
                        self.producers[peer].hear([bytes(part) for part in parts])
                case BeginArchive(_, raw_header):
                    self.store.archive += raw_header
                case StoreExtent(extent):
                    self.store.queue.append(extent)
                case FinishArchive():
                    self.store.finished = True
                case AbandonArchive():
                    self.store.abandoned = True
                case LogNotice(text):
                    self.notices.append(text)

    def deliver(self, peer: bytes, parts: list[Part], now: float = 0.0) -> None:
        self.carry_out(self.job.handle(MessageReceived(peer, [bytes(part) for part in parts], now)))

    def add(self, name: str, data: bytes, job: bytes = JOB) -> Producer:
        producer = Producer(name, data, job)
        self.producers[name.encode()] = producer
        self.deliver(name.encode(), producer.side.hello())
        return producer

    def run(self, choose: random.Random) -> None:
        """Let everybody do one step at a time, in random order, until nothing is left to do."""
        while True:
            able = [p for p in self.producers.values() if p.able]
            steps: list[Producer | Store] = [*able, *([self.store] if self.store.queue else [])]
            if not steps:
                break
            step = choose.choice(steps)
            if isinstance(step, Store):
                self.carry_out(step.write_one(self.job))
            else:
                self.deliver(step.name.encode(), step.next_message())
        if self.store.finished and not self.store.queue:
            self.carry_out(self.job.handle(ArchiveStored()))


class Producer:
    """Sends a disk in runs of one cluster, with the memory that a real one has."""

    def __init__(self, name: str, data: bytes, job: bytes) -> None:
        self.name = name
        self.data = data
        self.side = ProducerSide(job, name, len(data) or 1)
        # Without the hot places: the ring alone has to do.
        self.ring = PieceAllocator(hot_places=0)
        self.in_flight = UnackedFrames()
        self.cluster = 0
        self.end_of_session: object = None

    def hear(self, parts: list[bytes]) -> None:
        message = self.side.receive(parts)
        if isinstance(message, Welcome):
            self.ring.fit(self.piece)
        if isinstance(message, Done | Refuse | Abort):
            self.end_of_session = message
        self.in_flight.acknowledge(self.side.acked)

    @property
    def piece(self) -> int:
        return piece_bytes(self.side.frame_bytes)

    @property
    def clusters(self) -> int:
        return -(-len(self.data) // CLUSTER_BYTES)

    @property
    def able(self) -> bool:
        if self.side.state is not ProducerState.SENDING:
            return False
        if self.cluster == self.clusters:
            return True
        # A real producer reads a whole piece at a time before it sends.
        room = self.ring.take(self.piece) is not None
        return room and self.side.credit >= limits.charge(1, CLUSTER_BYTES)

    def next_message(self) -> list[Part]:
        if self.cluster == self.clusters:
            return self.side.end()
        data = self.data[self.cluster * CLUSTER_BYTES :][:CLUSTER_BYTES]
        data += bytes(-len(data) % 4096)
        masks = ((1 << len(data) // 4096) - 1).to_bytes(2, "big") if any(data) else b""
        payload = data if masks else b""
        message = self.side.run(self.cluster, 1, masks, payload)
        if payload:
            position = self.ring.take(self.piece)
            assert position is not None
            self.ring.hold(position, len(payload))
            self.in_flight.add(
                self.side.sent_frames, [], functools.partial(self.ring.free, position)
            )
        self.cluster += 1
        return message


def read_images(raw: bytes) -> dict[str, bytes]:
    """The disks of an archive that is complete."""
    head = read_whole(raw)
    events = scan(raw)
    return {device.name: disk_image(device, events) for device in head.devices}


def disk(seed: int, clusters: int, tail: int = CLUSTER_BYTES) -> bytes:
    """Clusters of two kinds, zero and not, by chance."""
    chance = random.Random(seed)
    pattern = [
        bytes(CLUSTER_BYTES) if chance.random() < 0.3 else bytes([1 + i % 255]) * CLUSTER_BYTES
        for i in range(clusters)
    ]
    return b"".join(pattern)[: (clusters - 1) * CLUSTER_BYTES + tail]
