# SPDX-License-Identifier: Apache-2.0
"""Small writes that come together are carried out together, and each has its own answer."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import make_disk
from tests.producer.guard.hammer import (
    CLUSTER,
    LIMIT_S,
    Backup,
    Place,
    begin,
    guarding,
    next_message,
)
from tests.protocol.nbd.client import shake_hands
from vmapipe.protocol.guard import Claimed, GuardBegun
from vmapipe.protocol.nbd.client_handshake import NbdClientHandshake
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_DISC,
    NBD_CMD_WRITE,
    NBD_ENOSPC,
    NBD_SIMPLE_REPLY_MAGIC,
)
from vmapipe.protocol.nbd.reply import SIMPLE_REPLY
from vmapipe.protocol.nbd.session import NbdRequest, encode_request

# More than are carried out at once.
MANY = 15


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with guarding(tmp_path, make_disk(tmp_path / "image", "A" * 40)) as place:
        yield place


@pytest.fixture
def client(place: Place) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT_S)
        client.connect(str(place.nbd))
        shake_hands(client, NbdClientHandshake("d", structured=False))
        yield client


def packet(*writes: tuple[int, bytes]) -> bytes:
    """(offset, data) each; their cookies count from 0."""
    return b"".join(
        encode_request(NbdRequest(0, NBD_CMD_WRITE, cookie, offset, len(data))) + data
        for cookie, (offset, data) in enumerate(writes)
    )


def answer(client: socket.socket) -> tuple[int, int]:
    """Cookie and error."""
    raw = client.recv(SIMPLE_REPLY.size, socket.MSG_WAITALL)
    magic, error, cookie = SIMPLE_REPLY.unpack(raw)
    assert magic == NBD_SIMPLE_REPLY_MAGIC
    return cookie, error


def test_all_in_front_of_a_disconnect_are_written_and_answered(
    place: Place, client: socket.socket
) -> None:
    writes = [(number * CLUSTER + 5, b"new %d" % number) for number in range(MANY)]
    client.sendall(packet(*writes) + encode_request(NbdRequest(0, NBD_CMD_DISC, 99, 0, 0)))
    assert [answer(client) for _ in writes] == [(number, 0) for number in range(MANY)]
    assert client.recv(1) == b""
    content = place.image.read_bytes()
    assert [content[offset : offset + len(data)] for offset, data in writes] == [
        data for _, data in writes
    ]


def test_of_those_to_one_place_the_last_one_stays(place: Place, client: socket.socket) -> None:
    client.sendall(packet(*((7, b"%02d" % number) for number in range(MANY))))
    assert sorted(answer(client) for _ in range(MANY)) == [(number, 0) for number in range(MANY)]
    assert place.image.read_bytes()[7:9] == b"%02d" % (MANY - 1)


def test_one_that_fails_fails_alone(
    place: Place, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = place.disk.image.write

    def full(data: memoryview, offset: int) -> None:
        if offset == 3 * CLUSTER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(data, offset)

    monkeypatch.setattr(place.disk.image, "write", full)
    client.sendall(packet(*((number * CLUSTER, b"new") for number in range(6))))
    answers = dict(answer(client) for _ in range(6))
    assert answers == dict.fromkeys(range(6), 0) | {3: NBD_ENOSPC}
    content = place.image.read_bytes()
    assert [content[n * CLUSTER : n * CLUSTER + 3] == b"new" for n in range(6)] == [
        *(True, True, True, False, True, True)
    ]


def test_one_that_is_refused_among_them_is_written_nowhere(
    place: Place, client: socket.socket
) -> None:
    size_bytes = place.image.stat().st_size
    client.sendall(packet((0, b"new"), (size_bytes - 1, b"new"), (CLUSTER, b"new")))
    assert dict(answer(client) for _ in range(3)) == {0: 0, 1: NBD_ENOSPC, 2: 0}
    content = place.image.read_bytes()
    assert len(content) == size_bytes
    assert content[:3] == content[CLUSTER : CLUSTER + 3] == b"new"


def test_one_that_has_to_wait_holds_up_none_of_the_others(
    place: Place, client: socket.socket, tmp_path: Path
) -> None:
    backup = Backup(place, 16, random.Random(1))
    before = place.image.read_bytes()
    try:
        begin({"d": place}, tmp_path)
        assert isinstance(next_message(backup), GuardBegun)
        backup.guard.claim(4)
        assert next_message(backup) == Claimed(0, 4)
        client.sendall(packet((20 * CLUSTER, b"a"), (2 * CLUSTER, b"new"), (21 * CLUSTER, b"c")))
        assert {answer(client), answer(client)} == {(0, 0), (2, 0)}
        assert (
            place.image.read_bytes()[2 * CLUSTER : 3 * CLUSTER] == before[2 * CLUSTER : 3 * CLUSTER]
        )
        backup.guard.copied(4)
        assert answer(client) == (1, 0)
        assert place.image.read_bytes()[2 * CLUSTER :].startswith(b"new")
    finally:
        backup.close()
