# SPDX-License-Identifier: Apache-2.0
"""Many clients at one export, hostile or unlucky: memory has a bound, and an honest one goes on."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.machine import LIMIT_S, eventually
from tests.protocol.nbd.client import Client
from vmapipe.producer.guard.disk import ServedDisk
from vmapipe.producer.guard.image import Image
from vmapipe.producer.guard.main import offer
from vmapipe.producer.nbd import connection as connections
from vmapipe.producer.nbd import server as servers
from vmapipe.producer.nbd.server import Server
from vmapipe.producer.nbd.workers import OWN_BYTES, OWN_REQUESTS, Budget, Pool
from vmapipe.protocol.nbd.constants import NBD_CMD_READ, NBD_CMD_WRITE
from vmapipe.protocol.nbd.session import NbdRequest, encode_request

MIB = 1 << 20
SIZE = 64 * MIB
LARGEST = 32 * MIB


class Crowd:
    """A server in this process, its words, and its socket's path."""

    def __init__(self, path: Path, server: Server, pool: Pool, said: list[str]) -> None:
        self.path = path
        self.server = server
        self.pool = pool
        self.said = said

    def silent(self) -> socket.socket:
        """A client that connects and says nothing."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(LIMIT_S)
        sock.connect(str(self.path))
        return sock


@contextmanager
def serving(folder: Path, pool: Pool, request_limit_s: float | None = None) -> Iterator[Crowd]:
    path, image = folder / "d.sock", folder / "d.raw"
    with image.open("wb") as file:
        file.truncate(SIZE)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(512)
    disk, said = ServedDisk(Image("d", str(image))), list[str]()
    server = Server([listener], [offer("d", disk)], said.append, pool, request_limit_s)
    server.start()
    try:
        yield Crowd(path, server, pool, said)
    finally:
        server.stop()
        assert eventually(lambda: server.clients == 0)
        disk.image.close()


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Crowd]:
    with serving(tmp_path, Pool()) as made:
        yield made


def raw(client: Client) -> socket.socket:
    """Below the codec."""
    return client._socket


def request(kind: int, length: int, offset: int = 0) -> bytes:
    return encode_request(NbdRequest(0, kind, 7, offset, length))


# --- threads, descriptors ---


def test_after_a_moment_without_a_thread_clients_are_let_in_again(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "nbd-client":
            raise RuntimeError("can't start new thread")
        start(thread)

    with Client(crowd.path, "d") as inside:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            for _ in range(3):
                with crowd.silent() as outside:
                    assert outside.recv(1) == b""
                inside.write(0, b"x" * 512)
        assert eventually(lambda: any("start new thread" in text for text in crowd.said))
        with Client(crowd.path, "d") as newcomer:
            assert newcomer.read(0, 512) == b"x" * 512
        assert eventually(lambda: crowd.server.clients == 1)


def test_after_a_moment_without_descriptors_clients_are_let_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, left = socket.socket.accept, [5]

    def none_left(listener: socket.socket) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(24, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", none_left)
    with serving(tmp_path, Pool()) as crowd, Client(crowd.path, "d") as client:
        assert client.read(0, 512) == bytes(512)
        assert left == [0]


# --- places ---


def test_a_newcomer_gets_the_place_of_one_that_has_said_nothing(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "MAX_CLIENTS", 6)
    with ExitStack() as stack:
        honest = stack.enter_context(Client(crowd.path, "d"))
        honest.write(0, b"x" * 512)
        silent = [stack.enter_context(crowd.silent()) for _ in range(40)]
        newcomer = stack.enter_context(Client(crowd.path, "d"))
        assert newcomer.read(0, 512) == b"x" * 512
        honest.write(512, b"y" * 512)
        assert crowd.server.clients <= 6
        del silent


@pytest.mark.parametrize("begun", [b"", request(NBD_CMD_WRITE, LARGEST), b"\x25"])
def test_a_newcomer_gets_the_place_of_one_that_has_sent_no_whole_request(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(servers, "MAX_CLIENTS", 4)
    with ExitStack() as stack:
        honest = stack.enter_context(Client(crowd.path, "d"))
        honest.write(0, b"x" * 512)
        for _ in range(3):
            silent = Client(crowd.path, "d")
            stack.callback(raw(silent).close)
            raw(silent).sendall(begun)
        newcomer = stack.enter_context(Client(crowd.path, "d"))
        assert newcomer.read(0, 512) == b"x" * 512
        honest.write(512, b"y" * 512)


def test_clients_that_have_worked_just_now_keep_their_places(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "MAX_CLIENTS", 3)
    monkeypatch.setattr(servers, "_PLACE_S", 0.3)
    with ExitStack() as stack:
        busy = [stack.enter_context(Client(crowd.path, "d")) for _ in range(3)]
        for client in busy:
            client.write(0, b"x" * 512)
        with crowd.silent() as outside:
            assert outside.recv(1) == b""
        assert eventually(lambda: any("there are 3 already" in text for text in crowd.said))
        for client in busy:
            assert client.read(0, 512) == b"x" * 512


def test_the_words_about_a_crowd_are_few(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_TELL_S", LIMIT_S)
    for _ in range(50):
        with crowd.silent() as outside, suppress(ConnectionResetError):
            outside.recv(18)
            outside.sendall(b"\xff" * 64)
            while outside.recv(100):
                pass
    assert eventually(lambda: crowd.server.clients == 0)
    assert len(crowd.said) == 1


# --- memory ---


def test_clients_that_do_not_read_take_no_more_than_the_pool_and_are_cut_off_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_STALL_S", 0.5)
    taken, most = [0], [0]
    pool = Pool(size_bytes=2 * LARGEST)
    take, give_back = pool.take, pool.give_back

    def counted_take(size_bytes: int) -> None:
        take(size_bytes)
        taken[0] += size_bytes
        most[0] = max(most[0], taken[0])

    def counted_give_back(size_bytes: int) -> None:
        give_back(size_bytes)
        taken[0] -= size_bytes

    monkeypatch.setattr(pool, "take", counted_take)
    monkeypatch.setattr(pool, "give_back", counted_give_back)
    with serving(tmp_path, pool) as crowd, ExitStack() as stack:
        honest = stack.enter_context(Client(crowd.path, "d"))
        for _ in range(10):
            greedy = Client(crowd.path, "d")
            stack.callback(raw(greedy).close)
            raw(greedy).sendall(request(NBD_CMD_READ, LARGEST) * 8)
        # What is its own, it has at once; what is large, when those have lost their share.
        for _ in range(20):
            honest.write(0, b"x" * 4096)
            assert honest.read(0, 4096) == b"x" * 4096
        assert honest.read(0, LARGEST)[:4096] == b"x" * 4096
        honest.write(0, bytes(LARGEST))
        assert most[0] <= 2 * LARGEST


def test_what_a_client_has_asked_for_and_left_is_not_done_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = [0]
    read = ServedDisk.read

    def counted(disk: ServedDisk, target: memoryview, offset: int) -> None:
        done[0] += 1
        read(disk, target, offset)

    monkeypatch.setattr(ServedDisk, "read", counted)
    with serving(tmp_path, Pool(size_bytes=2 * LARGEST)) as crowd:
        for _ in range(10):
            client = Client(crowd.path, "d")
            raw(client).sendall(request(NBD_CMD_READ, LARGEST) * 64)
            raw(client).close()
        assert eventually(lambda: crowd.server.clients == 0)
    assert done[0] < 10 * 8


def test_writes_that_are_announced_and_never_sent_give_their_memory_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_STALL_S", 0.5)
    with serving(tmp_path, Pool(size_bytes=2 * LARGEST)) as crowd, ExitStack() as stack:
        for _ in range(6):
            silent = Client(crowd.path, "d")
            stack.callback(raw(silent).close)
            raw(silent).sendall(request(NBD_CMD_WRITE, LARGEST) + b"x" * 1000)
        honest = stack.enter_context(Client(crowd.path, "d"))
        honest.write(0, b"y" * LARGEST)
        assert honest.read(0, LARGEST) == b"y" * LARGEST


def test_a_client_that_stands_still_keeps_its_connection_while_nobody_needs_its_memory(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may be stopped for a while, in the middle of a read."""
    monkeypatch.setattr(connections, "_STALL_S", 1.0)
    with Client(crowd.path, "d") as slow, Client(crowd.path, "d") as other:
        other.write(0, b"z" * 512)
        raw(slow).sendall(request(NBD_CMD_READ, LARGEST))
        started = time.monotonic()
        while time.monotonic() < started + 2.5:
            assert other.read(0, 512) == b"z" * 512
        head = raw(slow).recv(20, socket.MSG_WAITALL)
        assert struct.unpack(">I", head[:4])[0] == 0x668E33EF  # a structured reply
        left = 8 + LARGEST
        while left:
            got = len(raw(slow).recv(min(left, MIB)))
            assert got
            left -= got


# --- a limit for requests ---


@pytest.mark.parametrize("sent", [b"\x25", request(NBD_CMD_WRITE, 4096), None])
def test_a_request_that_is_begun_and_not_finished_in_time_ends_its_connection(
    tmp_path: Path, sent: bytes | None
) -> None:
    with serving(tmp_path, Pool(), request_limit_s=0.5) as crowd, Client(crowd.path, "d") as other:
        client = Client(crowd.path, "d")
        with raw(client) as sock:
            sock.sendall(sent or request(NBD_CMD_WRITE, LARGEST) + bytes(1000))
            assert sock.recv(1) == b""
        assert eventually(lambda: bool(crowd.said))
        assert "a request was begun and not finished within" in crowd.said[0]
        other.write(0, b"x" * 512)  # one that is idle between two requests is not meant


# --- the budget ---


def test_each_connection_has_something_of_its_own_whatever_others_hold() -> None:
    pool = Pool(requests=2, size_bytes=MIB)
    greedy, other = Budget(pool), Budget(pool)
    for _ in range(OWN_REQUESTS + 2):
        assert greedy.fits(1)
        greedy.take(1)
    assert not greedy.fits(1)
    shares = [other.take(OWN_BYTES // OWN_REQUESTS) for _ in range(OWN_REQUESTS)]
    assert not other.fits(1)
    for share in shares:
        other.give_back(share)
    assert other.fits(OWN_BYTES)


def test_who_waits_for_the_pool_is_served_in_turn_and_is_known() -> None:
    pool = Pool(requests=4, size_bytes=8 * MIB)
    holder, first, second = Budget(pool), Budget(pool), Budget(pool)
    held = holder.take(8 * MIB)
    order: list[str] = []

    def take(budget: Budget, name: str, size: int) -> None:
        share = budget.take(size)
        order.append(name)
        budget.give_back(share)

    threads = []
    for budget, name, size in ((first, "first", 8 * MIB), (second, "second", 2 * MIB)):
        threads.append(threading.Thread(target=take, args=(budget, name, size)))
        threads[-1].start()
        assert eventually(lambda: len(pool._waiting) == len(threads))
    assert holder.is_in_the_way
    assert not first.is_in_the_way
    holder.give_back(held)
    for thread in threads:
        thread.join(LIMIT_S)
    assert order == ["first", "second"]
    for budget in (holder, first, second):
        budget.wait_idle()
    assert not pool.is_wanted()


def test_a_connection_is_not_in_its_own_way() -> None:
    """Cut off for itself, a guest that stands still would lose its disk while nobody needs it."""
    pool = Pool(requests=4, size_bytes=8 * MIB)
    greedy = Budget(pool)
    held = greedy.take(8 * MIB)
    more = threading.Thread(target=greedy.take, args=(8 * MIB,))
    more.start()
    assert eventually(pool.is_wanted)
    assert not greedy.is_in_the_way
    greedy.give_back(held)
    more.join(LIMIT_S)
    assert not pool.is_wanted()
