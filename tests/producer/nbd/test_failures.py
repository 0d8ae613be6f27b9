# SPDX-License-Identifier: Apache-2.0
"""Requests that a server answers with an error: each is told of, with its place and the reason."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.machine import eventually
from tests.protocol.nbd.client import Client
from vmapipe.producer.nbd.backend import Write
from vmapipe.producer.nbd.server import Offer, Server
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.session import Export

SIZE = 1 << 20
FLAGS = (
    NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_FAST_ZERO
)


class _Failing:
    """A disk on which nothing can be done. `at_once`: said without a thread of the workers."""

    at_once = False

    def _fail(self, what: str) -> OSError:
        return OSError(errno.EIO, f"no {what} today")

    def try_read(self, target: memoryview, offset: int) -> bool:
        if self.at_once:
            raise self._fail("read at once")
        return False

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        return [self._fail("write at once") for _ in writes] if self.at_once else []

    def try_zeroes(self, offset: int, length: int) -> bool:
        if self.at_once:
            raise self._fail("zeroes at once")
        return False

    def settle(self, *, idle: bool) -> None: ...

    def read(self, target: memoryview, offset: int) -> None:
        raise self._fail("read")

    def write(self, data: memoryview, offset: int) -> None:
        raise self._fail("write")

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        raise OSError(errno.EOPNOTSUPP, "") if fast_only else self._fail("zeroes")

    def trim(self, offset: int, length: int) -> None:
        raise self._fail("trim")

    def flush(self) -> None:
        raise self._fail("flush")

    def cache(self, offset: int, length: int) -> None: ...

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield 4096, 0
        raise self._fail("status")


REQUESTS: list[tuple[bool, Callable[[Client], object], str]] = [
    (False, lambda c: c.read(4096, 512), "byte 4096: read of 512 bytes failed: no read today"),
    (True, lambda c: c.read(4096, 512), "failed: no read at once today"),
    (False, lambda c: c.write(8192, b"x" * 512), "byte 8192: write of 512 bytes failed"),
    (True, lambda c: c.write(0, b"x" * 512), "byte 0: write of 512 bytes failed: no write at once"),
    (False, lambda c: c.write(0, b"x", NBD_CMD_FLAG_FUA), "byte 0: write of 1 bytes failed"),
    (False, lambda c: c.command(NBD_CMD_WRITE_ZEROES, 0, 512), "failed: no zeroes today"),
    (True, lambda c: c.command(NBD_CMD_WRITE_ZEROES, 0, 512), "failed: no zeroes at once today"),
    (False, lambda c: c.command(NBD_CMD_TRIM, 512, 512), "byte 512: trim of 512 bytes failed"),
    (False, lambda c: c.command(NBD_CMD_FLUSH), "'d', flush failed: no flush today"),
    (False, lambda c: c.extents(), "failed: no status today"),
]


def test_each_request_that_fails_is_told_once_with_its_place_and_reason(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(tmp_path / "s"))
    listener.listen()
    disk, said = _Failing(), list[str]()
    export = Export("d", SIZE, FLAGS, "", allocation=True)
    server = Server([listener], [Offer(export, disk)], said.append, reports_failures=True)
    server.start()
    try:
        with Client(tmp_path / "s", "d") as client:
            for at_once, ask, expected in REQUESTS:
                disk.at_once = at_once
                told = len(said)
                for _ in range(3):
                    with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
                        ask(client)
                    assert caught.value.errno == errno.EIO
                assert len(said) == told + 1, said[told:]
                assert said[-1].startswith("export 'd', ")
                assert expected in said[-1]
            # What cannot be done quickly is an answer, not a fault.
            told = len(said)
            with pytest.raises(OSError):  # noqa: PT011  what is told is looked at
                client.command(NBD_CMD_WRITE_ZEROES, 0, 512, NBD_CMD_FLAG_FAST_ZERO)
            assert len(said) == told
            # A client that fails everywhere does not fill the log.
            disk.at_once = True
            for at in range(1000):
                with pytest.raises(OSError):  # noqa: PT011  what is told is looked at
                    client.read(at * 512, 512)
            assert told < len(said) <= 256
    finally:
        server.stop()
        assert eventually(lambda: server.clients == 0)
