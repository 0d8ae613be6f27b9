# SPDX-License-Identifier: Apache-2.0
"""Guests that write, a backup that runs, and the disk as it was at the instant.

All in one process but with the product's own server, guard and sockets, so
that a run takes some 30 ms and there can be thousands of them.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.protocol.nbd.client import Client
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.guard.disk import ServedDisk
from vmapipe.producer.guard.image import Image
from vmapipe.producer.guard.main import Conversations, offer
from vmapipe.producer.guard_client import GuardClient
from vmapipe.producer.nbd.server import Server
from vmapipe.producer.shared_memory import RING_BYTES, Ring
from vmapipe.protocol import limits
from vmapipe.protocol.guard import (
    MAX_PACKET_BYTES,
    Claimed,
    FromGuard,
    GuardAttach,
    GuardBegin,
    GuardBegun,
    GuardWaiting,
    Held,
    Hold,
    Saved,
    SavedHole,
    ToGuard,
    decode_from_guard,
    encode,
)
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE_ZEROES,
)
from vmapipe.runtime.syscalls import readable

CLUSTER = CLUSTER_BYTES
JOB = bytes(range(16))
LIMIT_S = 60.0


@dataclass
class Place:
    """A guard in this process: its image, its NBD socket and its control socket."""

    image: Path
    disk: ServedDisk
    nbd: Path
    control: Path


@contextmanager
def guarding(folder: Path, image: Path, name: str = "d") -> Iterator[Place]:
    nbd, control = folder / f"{name}.nbd", folder / f"{name}.control"
    listeners = []
    for path, kind in ((nbd, socket.SOCK_STREAM), (control, socket.SOCK_SEQPACKET)):
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)
    disk = ServedDisk(Image(name, str(image)))
    server = Server([listeners[0]], [offer(name, disk)])
    conversations = Conversations(listeners[1], {name: disk}, lambda text: None)
    server.start()
    try:
        yield Place(image, disk, nbd, control)
    finally:
        server.stop()
        conversations.close()
        disk.image.close()


class Backup:
    """The backup half of one disk: takes clusters in any order, and each only once."""

    def __init__(
        self,
        place: Place,
        slots: int,
        chance: random.Random,
        guest_wait_s: int = 30,
        spool: tuple[int, int] | None = None,
    ) -> None:
        """`spool`: a descriptor and its slots."""
        self._chance = chance
        self._ring = Ring(slots * CLUSTER)
        assert self._ring.fd is not None
        spool_fd, spool_slots = spool or (-1, 0)
        attach = GuardAttach(limits.VERSION, JOB, "d", RING_BYTES, slots, spool_slots, guest_wait_s)
        fds = [self._ring.fd] + ([spool_fd] if spool_slots else [])
        try:
            self.guard = GuardClient("d", str(place.control), attach, fds)
        except BaseException:
            self._ring.close()
            raise
        self.content = bytearray(b"?" * self.guard.size_bytes)
        self.clusters = -(-self.guard.size_bytes // CLUSTER)
        self.seen: set[int] = set()
        self.saved_clusters = self.waits = 0
        self._may_claim = False
        self._kept: list[int] = []

    def run(self) -> None:
        """To the end, as fast or slow as chance has it."""
        while len(self.seen) < self.clusters:
            message = self.guard.receive()
            if message is not None:
                self.take(message)
            elif self._kept:
                self.release()
            elif self._may_claim:
                # Guests are busy meanwhile: a slow backup has more to save.
                readable([self.guard.fd], self._chance.choice((0, 0.001, 0.004)))
                self.guard.claim(self._chance.choice((1, 1, 2, 2, 7, 64)))
                self._may_claim = False
            else:
                assert self.wait_readable(), "the guard says nothing"

    def wait_readable(self) -> bool:
        return bool(readable([self.guard.fd], LIMIT_S))

    def take(self, message: FromGuard) -> None:
        match message:
            case GuardBegun():
                self._may_claim = True
            case Claimed(first, clusters):
                if clusters:
                    self._read(first, self._chance.randint(1, clusters))
                    self._may_claim = True
            case Saved(clusters, slots):
                self._take_slots(clusters, slots)
            case SavedHole(first, clusters):
                self.saved_clusters += clusters
                for cluster in range(first, first + clusters):
                    self._put(cluster, bytes(CLUSTER))
            case GuardWaiting(writes):
                self.waits += bool(writes)
            case _:
                raise AssertionError(message)

    def close(self) -> None:
        self.guard.close()
        self._ring.close()
        del self._ring  # and with it the mapping, which has a descriptor of its own

    def _read(self, first: int, clusters: int) -> None:
        data = os.pread(self.guard.disk_fd, clusters * CLUSTER, first * CLUSTER)
        self.guard.copied(clusters)
        for index in range(clusters):
            self._put(first + index, data[index * CLUSTER :][:CLUSTER])

    def _take_slots(self, clusters: tuple[int, ...], slots: tuple[int, ...]) -> None:
        self.saved_clusters += len(slots)
        for cluster, slot in zip(clusters, slots, strict=True):
            start = RING_BYTES + slot * CLUSTER
            self._put(cluster, self._ring.view[start : start + CLUSTER])
        self._kept += slots
        if self._chance.random() < 0.5:
            self.release()

    def release(self) -> None:
        """Give back all slots that were read."""
        kept, self._kept = self._kept, []
        self._chance.shuffle(kept)
        self.guard.release(kept)

    def _put(self, cluster: int, data: bytes | memoryview) -> None:
        assert cluster not in self.seen, f"cluster {cluster} came twice"
        self.seen.add(cluster)
        start = cluster * CLUSTER
        end = min(len(self.content), start + CLUSTER)
        self.content[start:end] = data[: end - start]


def next_message(backup: Backup) -> FromGuard:
    while (message := backup.guard.receive()) is None:
        assert backup.wait_readable(), "the guard says nothing"
    return message


class Guest(threading.Thread):
    """One connection that changes the disk until it is told to stop."""

    def __init__(self, place: Place, seed: int, size_bytes: int, name: str = "d") -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.busy = threading.Event()
        self.operations = 0
        self.fault: BaseException | None = None
        self._chance = random.Random(seed)
        self._size = size_bytes
        self._client = Client(place.nbd, name)

    def run(self) -> None:
        try:
            with self._client as client:
                while not self.stop.is_set():
                    self._change(client)
                    self.operations += 1
                    self.busy.set()
        except BaseException as error:  # noqa: BLE001  reported by the test
            self.fault = error
            self.busy.set()

    def _change(self, client: Client) -> None:
        chance = self._chance
        length = min(self._size, chance.choice((1, 512, 4096, 65536, chance.randint(1, 300_000))))
        offset = chance.randint(0, self._size - length)
        if chance.random() < 0.3:
            offset -= offset % 4096
        match chance.random():
            case number if number < 0.15:
                # Together, as a guest's disk at depth 16.
                for _ in range(chance.randint(2, 8)):
                    start = chance.randint(0, self._size - min(self._size, 4096))
                    client.begin_write(start, chance.randbytes(min(self._size, 4096)))
                client.wait()
            case number if number < 0.75:
                flags = NBD_CMD_FLAG_FUA if chance.random() < 0.05 else 0
                client.write(offset, chance.randbytes(length), flags)
            case number if number < 0.85:
                flags = NBD_CMD_FLAG_NO_HOLE if chance.random() < 0.5 else 0
                client.command(NBD_CMD_WRITE_ZEROES, offset, length, flags)
            case number if number < 0.95:
                client.command(NBD_CMD_TRIM, offset, length)
            case _:
                client.command(NBD_CMD_FLUSH)


def begin(places: dict[str, Place], folder: Path, job: bytes = JOB) -> dict[str, bytes]:
    """Find the instant as a coordinator does; returns what the disks held at it."""
    held: list[socket.socket] = []
    try:
        for name, place in places.items():
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            held.append(sock)
            sock.settimeout(LIMIT_S)
            sock.connect(str(place.control))
            _say(sock, Hold(limits.VERSION, job, (name,)))
        for sock in held:
            assert decode_from_guard(sock.recv(MAX_PACKET_BYTES)) == Held()
        copies = {}
        for name, place in places.items():
            copy = folder / f"{name}.instant"
            shutil.copyfile(place.image, copy)
            copies[name] = copy.read_bytes()
        for sock in held:
            _say(sock, GuardBegin())
        for sock in held:
            assert decode_from_guard(sock.recv(MAX_PACKET_BYTES)) == GuardBegun()
        return copies
    finally:
        for sock in held:
            sock.close()


def _say(sock: socket.socket, message: ToGuard) -> None:
    sock.send(encode(message))


def make_image(path: Path, chance: random.Random) -> int:
    """Data, zeroes and holes; any size."""
    largest = chance.choice((1000, 2 * CLUSTER, 40 * CLUSTER, 60 * CLUSTER))
    size = chance.randint(1, largest)
    with path.open("wb") as file:
        at = 0
        while at < size:
            length = min(size - at, chance.randint(1, 6 * CLUSTER))
            if chance.random() < 0.6:
                file.seek(at)
                file.write(chance.randbytes(length))
            at += length
        file.truncate(size)
    return size
