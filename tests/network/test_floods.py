# SPDX-License-Identifier: Apache-2.0
"""Who floods an archiver, or clings to it, is counted and shut out; the honest job is unharmed."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.machine import end_of, good, make_disk, started
from tests.network.cable import cable_to
from tests.network.place import Place, until
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.protocol import transfer
from vmapipe.protocol.transfer import Hello
from vmapipe.runtime.keys import read_client_keys

MIB = 1 << 20
# More than an acceptor holds of those that have proved nothing.
MANY = 1500
GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1CURVE".ljust(64, b"\0")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


def address(place: Place) -> tuple[str, int]:
    host, port = place.endpoint.removeprefix("tcp://").split(":")
    return host, int(port)


def fds_of(place: Place) -> int:
    return psutil.Process(place.archiver.pid).num_fds()


def test_a_flood_of_connections_leaves_descriptors_for_the_archive(place: Place) -> None:
    """They are held open and say nothing, or half of a greeting."""
    with ExitStack() as stack:
        before = fds_of(place)
        for number in range(MANY):
            connection = socket.create_connection(address(place), timeout=30)
            stack.callback(connection.close)
            with contextlib.suppress(OSError):  # closed already
                connection.send(GREETING[: number % 64])
        place.line("the oldest are closed")
        # Those that have not said a first word never come to the archiver itself.
        assert fds_of(place) <= before + 8
        good(*place.producer(place.client))
    place.archive_is_good()


def test_junk_is_counted_and_does_not_fill_the_log(place: Place) -> None:
    chance = random.Random(7)
    for _ in range(30):
        place.throw(chance.randbytes(64))
    place.line("refused 10 connections")
    place.honest_job_succeeds()
    assert len([line for line in place.said if "refused" in line]) == 2


def test_a_message_of_an_old_zeromq_at_a_port_without_keys_is_no_crash(tmp_path: Path) -> None:
    """ZMTP 1.0 has no properties, and libzmq takes much other junk for it: it is not let in."""
    disk, archive = make_disk(tmp_path / "disk.raw", "A0h"), tmp_path / "vm.vma"
    words = ("archiver", "--insecure-plain-tcp", "--listen", "tcp://127.0.0.1:*", "--expect", "1")
    with started(*words, "--output", archive) as archiver, ExitStack() as stack:
        assert archiver.stderr is not None
        endpoint = archiver.stderr.readline().decode().split()[-1]
        port = int(endpoint.rpartition(":")[2])
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            stack.callback(connection.close)
            connection.sendall(b"\1\0\5\0junk")  # no identity; a message
        assert b"refused 1 connection: " in archiver.stderr.readline()
        good(
            *("producer", "--insecure-plain-tcp", "--archiver", endpoint, "--disk", disk),
        )
        assert end_of(archiver)[0] == 0
    good("verify", archive)


def test_a_giant_claim_costs_nothing(place: Place) -> None:
    """A frame that says that it has a terabyte: nobody makes room for it."""
    claim = GREETING + b"\2" + (1 << 40).to_bytes(8, "big") + b"x" * 1000
    place.throw(claim)
    assert psutil.Process(place.archiver.pid).memory_info().rss < 200 * MIB
    place.honest_job_succeeds()


@pytest.mark.slow
def test_who_does_not_finish_the_handshake_is_closed_after_ten_seconds(place: Place) -> None:
    with socket.create_connection(address(place), timeout=30) as connection:
        deadline = time.monotonic() + 30
        with contextlib.suppress(OSError):
            for byte in GREETING:
                connection.send(bytes([byte]))
                time.sleep(1)
        assert time.monotonic() < deadline
    place.honest_job_succeeds()


def test_a_listed_client_that_says_nonsense_harms_only_itself(place: Place) -> None:
    """Messages without end, of every wrong kind, beside an honest job."""
    make_disk(place.disk, "A" * 600)
    keys = read_client_keys(str(place.client))
    with (
        cable_to(place.endpoint) as cable,
        started(*place.producer(place.client, at=cable.endpoint)) as producer,
    ):
        # 37 s, so that it is not over before the last stranger has its answer; slower, and its
        # heartbeats would be too late behind all the data.
        cable.bytes_s = 1 << 20
        until(lambda: bool(list(place.folder.glob("*.partial"))), place.archiver)
        chance = random.Random(3)
        for number in range(40):
            link = ArchiverConnection(place.endpoint, keys)
            try:
                for _ in range(50):
                    link.send(
                        [chance.randbytes(chance.randrange(1, 200)) for _ in range(1 + number % 4)]
                    )
                link.send(transfer.encode_control(Hello(1, os.urandom(16), "x", 1 << 62)))
                link.send([bytes(65_000)])  # larger ones start a thread of pyzmq that stays
                answer = None
                while answer is None:
                    link.wait(1)
                    answer = link.receive()
                    assert producer.poll() is None, "the honest job was over too soon"
                assert b"REFUSE" in answer[0]
            finally:
                link.close()
        cable.bytes_s = 0.0
        assert end_of(producer)[0] == 0
    place.archive_is_good()
    told = [line for line in place.said if "stranger" in line]
    assert 1 <= len(told) <= 101
