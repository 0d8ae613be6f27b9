# SPDX-License-Identifier: Apache-2.0
"""Answers that are sent out of a mapped file, without a look at it."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vmapipe.access.storage import PlainStorage
from vmapipe.producer.nbd.backend import Mapped, WriteOnlyBackend, one_by_one
from vmapipe.producer.nbd.connection import Connection
from vmapipe.producer.nbd.workers import Pool, Workers
from vmapipe.protocol.nbd.constants import NBD_CMD_DISC, NBD_CMD_READ
from vmapipe.protocol.nbd.session import Export, NbdRequest, NbdSession, encode_request

_SIZE = 1 << 20


class _Disk(WriteOnlyBackend):
    """A file whose views are given without a look at its present length."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._map: memoryview | None = memoryview(mmap.mmap(self._fd, _SIZE, prot=mmap.PROT_READ))
        self.given = 0

    def views(self, offset: int, length: int) -> Sequence[memoryview] | None:
        if self._map is None:
            return None
        self.given += 1
        return [
            self._map[offset : offset + length // 2],
            self._map[offset + length // 2 :][: length - length // 2],
        ]

    def close(self) -> None:
        self._map = None
        os.close(self._fd)

    def distrust_views(self) -> None:
        self._map = None

    def read(self, target: memoryview, offset: int) -> None:
        if os.preadv(self._fd, [target], offset) < len(target):
            raise OSError(errno.EIO, "the file is shorter than it was")

    def try_writes(self, writes: Sequence[tuple[memoryview, int]]) -> list[OSError | None]:
        return one_by_one(lambda data, offset: False, writes)

    def try_zeroes(self, offset: int, length: int) -> bool:
        return False

    def write(self, data: memoryview, offset: int) -> None: ...

    def write_zeroes(
        self, offset: int, length: int, *, may_hole: bool, fast_only: bool
    ) -> None: ...

    def flush(self) -> None: ...


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(_SIZE))
    return path


@pytest.fixture
def disk(path: Path) -> Iterator[_Disk]:
    disk = _Disk(path)
    yield disk
    disk.close()


def ask(disk: _Disk, *places: tuple[int, int]) -> bytes:
    """All that a server answers to reads of these places, until it closes the connection."""
    ours, theirs = socket.socketpair()
    session = NbdSession(Export("disk", _SIZE), 1)
    connection = Connection(theirs, session, disk, Workers("test"), Pool())

    def serve() -> None:
        try:
            connection.serve()
        except OSError:
            pass
        finally:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    requests = [NbdRequest(0, NBD_CMD_READ, n, at, size) for n, (at, size) in enumerate(places)]
    raw = [encode_request(request) for request in [*requests, NbdRequest(0, NBD_CMD_DISC, 0, 0, 0)]]
    ours.sendall(b"".join(raw))
    answer = b""
    with ours:
        while piece := ours.recv(1 << 20):
            answer += piece
    thread.join()
    return answer


def test_reads_are_answered_out_of_the_map_in_their_order(path: Path, disk: _Disk) -> None:
    content = path.read_bytes()
    assert isinstance(disk, Mapped)
    places = [(at * 4096, 4096 + at) for at in range(100)] + [(0, _SIZE)]
    answer = ask(disk, *places)
    for at, size in places:
        assert answer[:8] == b"\x67\x44\x66\x98\0\0\0\0"
        assert answer[16 : 16 + size] == content[at : at + size]
        answer = answer[16 + size :]
    assert not answer
    assert disk.given == len(places)


def test_a_file_cut_under_its_map_ends_the_connection_and_is_an_error_after_that(
    path: Path, disk: _Disk
) -> None:
    content = path.read_bytes()
    os.truncate(path, _SIZE // 2)
    # Whether answers in front of it still come depends on how the kernel cuts what it sends.
    first = ask(disk, (_SIZE // 2, 4096))
    assert len(first) < 16 + 4096
    answer = ask(disk, (0, 4096), (_SIZE // 2, 4096))
    assert answer[16 : 16 + 4096] == content[:4096]
    assert answer[16 + 4096 :][4:8] == (5).to_bytes(4, "big")  # NBD_EIO
    assert disk.given == 1


def test_a_file_that_has_become_shorter_gives_no_view_of_what_is_gone(path: Path) -> None:
    storage = PlainStorage(str(path), os.open(path, os.O_RDONLY), _SIZE)
    try:
        assert storage.view(0, _SIZE) is not None
        os.truncate(path, _SIZE // 2)
        assert storage.view(_SIZE // 2 - 4096, 4097) is None
        assert storage.view(_SIZE // 2 - 4096, 4096) is not None
    finally:
        storage.close()
