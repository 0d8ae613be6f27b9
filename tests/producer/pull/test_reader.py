# SPDX-License-Identifier: Apache-2.0
"""Pulling an export from servers that are honest, slow, hostile, or die."""

from __future__ import annotations

import functools
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.producer.pull.reading import content
from tests.protocol.nbd.disk import ALL_FLAGS, Disk, export_of
from tests.protocol.nbd.server import DiskServer
from vmapipe.producer.pull import connections
from vmapipe.producer.pull.connections import Endpoint
from vmapipe.producer.pull.export import ExportError, open_export
from vmapipe.producer.pull.uri import parse_nbd_uri
from vmapipe.producer.pull_reader import PullReader
from vmapipe.protocol.nbd import reply
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_EIO,
    NBD_EOVERFLOW,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_TRIM,
    Bytes,
)
from vmapipe.protocol.nbd.session import Export, NbdRequest, NbdSession
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled

CLUSTER = 65536
FIRST = 3 * CLUSTER  # where the disk's data begins
Answer = Callable[[Disk, NbdSession, NbdRequest], list[Bytes] | None]


def sparse(clusters: int = 40) -> bytes:
    """A disk with data at FIRST, and here and there behind it; not a whole number of clusters."""
    disk = bytearray(clusters * CLUSTER - 512)
    chance = random.Random(1)
    for start, length in (
        (FIRST, 5 * CLUSTER),
        (20 * CLUSTER + 4096, 4096),
        (len(disk) - 512, 512),
    ):
        disk[start : start + length] = chance.randbytes(length)
    return bytes(disk)


class Scripted(Disk):
    """A disk whose answers a test may change: `script` returns them, or None for the honest one."""

    def __init__(self, disk: bytes, script: Answer = lambda *_: None) -> None:
        super().__init__(disk)
        self.script = script

    def answer(self, session: NbdSession, request: NbdRequest, payload: Bytes = b"") -> list[Bytes]:
        other = self.script(self, session, request)
        return super().answer(session, request, payload) if other is None else other


@contextmanager
def pulled(
    server: DiskServer, *, answer_s: float = 60, trims: bool = False, compares: bool = True
) -> Iterator[PullReader]:
    uri = parse_nbd_uri(server.uri)
    endpoint = Endpoint("d", uri.shown, functools.partial(open_export, uri), answer_s=answer_s)
    with (
        closing(Cancel()) as cancel,
        closing(PullReader(endpoint, cancel, trims=trims, compares=compares)) as reader,
    ):
        yield reader


def fails(server: DiskServer, pattern: str, **how: float) -> None:
    with pytest.raises(ExportError, match=pattern), pulled(server, **how) as reader:  # type: ignore[arg-type]
        content(reader)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("flags", [ALL_FLAGS, 0], ids=["all flags", "no flags"])
def test_an_honest_server_is_read_whatever_it_can(
    tmp_path: Path, structured: bool, flags: int
) -> None:
    disk = Scripted(sparse())
    export = export_of(len(disk.content), flags=flags)
    with DiskServer(tmp_path / "s", disk, [export], structured=structured) as server:
        with pulled(server) as reader:
            assert content(reader) == disk.content
        assert not server.faults
    # What a server with block status calls zero is not read.
    read = {r.offset // CLUSTER for r in disk.seen if r.type == NBD_CMD_READ}
    assert (0 in read) is not structured


def test_a_large_export_that_allows_it_is_read_over_several_connections(tmp_path: Path) -> None:
    disk = Scripted(random.Random(1).randbytes(4 << 20) * 16)
    export = export_of(len(disk.content))
    with DiskServer(tmp_path / "s", disk, [export]) as server, pulled(server) as reader:
        assert content(reader) == disk.content
        assert len(server.sessions) > 1
    alone = export_of(len(disk.content), flags=0)
    with DiskServer(tmp_path / "t", disk, [alone]) as server, pulled(server) as reader:
        assert content(reader) == disk.content
        assert len(server.sessions) == 1


def test_a_server_that_cannot_answer_in_one_piece_is_asked_again(tmp_path: Path) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == NBD_CMD_READ and request.flags:
            return [reply.error_chunk(request.cookie, NBD_EOVERFLOW)]
        return None

    disk = Scripted(sparse(), script)
    export = export_of(len(disk.content), flags=NBD_FLAG_SEND_DF)
    with DiskServer(tmp_path / "s", disk, [export]) as server, pulled(server) as reader:
        assert content(reader) == disk.content


LIES: dict[str, Callable[[NbdRequest], list[Bytes]]] = {
    "a wrong cookie": lambda r: [reply.data_chunk(r.cookie + 99, r.offset, r.length)],
    "data before the request": lambda r: [reply.data_chunk(r.cookie, r.offset - 512, 512)],
    "data beyond the request": lambda r: [reply.data_chunk(r.cookie, r.offset, r.length + 1)],
    "a hole outside": lambda r: [reply.hole_chunk(r.cookie, r.offset + r.length, 512)],
    "a hole of four gigabytes": lambda r: [reply.hole_chunk(r.cookie, r.offset, 0xFFFFFFFF)],
    "too little": lambda r: [reply.data_chunk(r.cookie, r.offset, 512), bytes(512)],
    "nothing": lambda r: [reply.none_chunk(r.cookie)],
    "the same twice": lambda r: [
        *(reply.data_chunk(r.cookie, r.offset, 512, done=False), bytes(512)) * 2
    ],
    "an error outside": lambda r: [
        reply.error_chunk(r.cookie, NBD_EIO, offset=r.offset + r.length)
    ],
    "a block status": lambda r: [reply.status_chunk(r.cookie, 1, [(512, 0)])],
    "a simple reply": lambda r: [reply.simple_reply(r.cookie), bytes(r.length)],
    "no reply": lambda r: [b"HTTP/1.1 200 OK\r\n\r\n..."],
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_cannot_be_is_an_error_with_device_and_offset(
    tmp_path: Path, lie: str
) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        return LIES[lie](request) if request.type == NBD_CMD_READ else None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, rf"^disk 'd': cannot read near offset {FIRST}: ")


@pytest.mark.parametrize(
    "extents", [[(0, 0)], [(CLUSTER, 0), (0, 0)], [(1 << 31, 0), (512, 3)]], ids=str
)
def test_a_block_status_that_cannot_be_is_an_error(
    tmp_path: Path, extents: list[tuple[int, int]]
) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == NBD_CMD_BLOCK_STATUS:
            return [reply.status_chunk(request.cookie, session.allocation_id or 0, extents)]
        return None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, r"^disk 'd': cannot read near offset 0: .*BLOCK_STATUS")


@pytest.mark.parametrize("kind", [NBD_CMD_READ, NBD_CMD_BLOCK_STATUS])
def test_a_refused_request_is_an_error_with_the_servers_words_and_never_zeroes(
    tmp_path: Path, kind: int
) -> None:
    """Such as those outside of what a bitmap calls dirty."""

    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == kind and request.offset + request.length > 20 * CLUSTER:
            where = max(request.offset, 20 * CLUSTER)
            return [reply.error_chunk(request.cookie, NBD_EIO, "not\ndirty", offset=where)]
        return None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        where = 20 * CLUSTER
        fails(
            server, rf"^disk 'd': cannot read near offset {where}: Input/output error; not\\ndirty$"
        )


def test_a_server_that_refuses_what_it_calls_zero_is_read_well(tmp_path: Path) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        first = request.offset // CLUSTER
        if request.type == NBD_CMD_READ and not (3 <= first < 8 or first in (20, 39)):
            return [reply.error_chunk(request.cookie, NBD_EIO, "not dirty")]
        return None

    disk = Scripted(sparse(), script)
    with (
        DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server,
        pulled(server) as reader,
    ):
        assert content(reader) == disk.content


def test_a_server_that_never_answers_is_given_up_after_the_named_limit(tmp_path: Path) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        return [] if request.type == NBD_CMD_READ else None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, rf"offset {FIRST}: no answer for 1 s \(--nbd-timeout\)$", answer_s=1)


def test_a_server_that_sends_a_byte_now_and_then_does_not_count_as_answering(
    tmp_path: Path,
) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type != NBD_CMD_READ:
            return None
        time.sleep(0.2)
        return [reply.data_chunk(request.cookie, request.offset, 1, done=False), b"x"]

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, r"no answer for 1 s \(--nbd-timeout\)$", answer_s=1)


def test_what_was_under_way_on_a_lost_connection_is_read_over_another(tmp_path: Path) -> None:
    lost = 0

    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        nonlocal lost
        if request.type == NBD_CMD_READ and len(disk.seen) % 11 == 6 and lost < 5:
            lost += 1
            disk.seen.append(request)
            raise ConnectionError
        return None

    disk = Scripted(random.Random(1).randbytes(16 << 20) * 3, script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        with pulled(server) as reader:
            assert content(reader) == disk.content
        assert len(server.sessions) > 3


def test_a_server_that_dies_of_one_request_is_not_tried_for_ever(tmp_path: Path) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == NBD_CMD_READ and request.offset == FIRST:
            raise ConnectionError
        return None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, rf"^disk 'd': cannot read near offset {FIRST}: .*, 3 times$")


def hang_up_once() -> Answer:
    done = False

    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        nonlocal done
        if request.type == NBD_CMD_READ and request.offset > 19 * CLUSTER and not done:
            done = True
            raise ConnectionError
        return None

    return script


def test_another_size_behind_a_new_connection_is_refused(tmp_path: Path) -> None:
    disk = Scripted(sparse(), hang_up_once())
    exports = [export_of(len(disk.content))]
    with DiskServer(tmp_path / "s", disk, exports) as server, pulled(server) as reader:
        server._exports = [export_of(len(disk.content) - 512)]
        with pytest.raises(ExportError, match="another disk than before: its size in bytes was"):
            content(reader)


def test_other_bytes_behind_a_new_connection_are_refused(tmp_path: Path) -> None:
    once = hang_up_once()

    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        try:
            return once(disk, session, request)
        except ConnectionError:
            disk.content[FIRST : FIRST + 4096] = bytes(4096)
            raise

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, rf"is another disk than before: other bytes are at offset {FIRST}$")


def test_a_server_that_does_not_come_back_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "RECONNECT_S", 0.3)

    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == NBD_CMD_READ:
            server.path.unlink(missing_ok=True)
            raise ConnectionError
        return None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(
            server,
            rf"^disk 'd': cannot read near offset {FIRST}: the connection is lost, and not back within "
            "0 s: .*No such file or directory$",
        )


def test_an_export_that_does_not_answer_at_the_end_fails(tmp_path: Path) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == NBD_CMD_READ and request.length == 4096:
            return [reply.error_chunk(request.cookie, NBD_EIO)]
        return None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, rf"offset {FIRST} at the end, when all was read: Input/output error$")


def test_an_export_that_was_written_to_meanwhile_fails_unless_it_is_shared(tmp_path: Path) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == NBD_CMD_READ and request.offset > 30 * CLUSTER:
            disk.content[FIRST] ^= 1
        return None

    disk = Scripted(sparse(), script)
    with DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server:
        fails(server, rf"the export was written to while it was read \(offset {FIRST}\)")
        with pulled(server, compares=False) as reader:
            content(reader)


def test_what_was_read_is_trimmed_but_for_what_is_read_again(tmp_path: Path) -> None:
    disk = Scripted(sparse())
    before = bytes(disk.content)
    with (
        DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server,
        pulled(server, trims=True) as reader,
    ):
        assert content(reader) == before
        assert not reader.notices
    trimmed = {r.offset // CLUSTER for r in disk.seen if r.type == NBD_CMD_TRIM}
    assert trimmed == {4, 5, 6, 7, 20, 39}


@pytest.mark.parametrize("flags", [NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_TRIM, 0])
def test_trim_is_refused_where_the_export_does_not_take_it(tmp_path: Path, flags: int) -> None:
    disk = Scripted(sparse())
    export = export_of(len(disk.content), flags=flags)
    with DiskServer(tmp_path / "s", disk, [export]) as server:
        fails(server, "leave out --trim", trims=True)
    assert not [r for r in disk.seen if r.type == NBD_CMD_TRIM]


def test_a_trim_that_fails_is_told_once_and_costs_nothing_else(tmp_path: Path) -> None:
    def script(disk: Disk, session: NbdSession, request: NbdRequest) -> list[Bytes] | None:
        if request.type == NBD_CMD_TRIM:
            return [reply.error_chunk(request.cookie, NBD_EIO)]
        return None

    disk = Scripted(sparse(), script)
    with (
        DiskServer(tmp_path / "s", disk, [export_of(len(disk.content))]) as server,
        pulled(server, trims=True) as reader,
    ):
        assert content(reader) == disk.content
        assert len(reader.notices) == 1
        assert "cannot trim at offset" in reader.notices[0]


def test_an_export_whose_last_bytes_cannot_be_read_is_refused(tmp_path: Path) -> None:
    disk = Scripted(sparse())
    honest = export_of(len(disk.content))
    odd = Export(
        "disk",
        len(disk.content),
        honest.flags,
        block_sizes=honest.block_sizes._replace(minimum=4096),
    )
    with DiskServer(tmp_path / "s", disk, [odd]) as server:
        fails(server, "last 3584 bytes cannot be read")


def test_an_empty_export_is_refused(tmp_path: Path) -> None:
    disk = Scripted(b"")
    with DiskServer(tmp_path / "s", disk, [export_of(0)]) as server:
        fails(server, "it is empty: nothing to back up")


def test_an_export_that_is_not_there_is_named(tmp_path: Path) -> None:
    disk = Scripted(sparse())
    with DiskServer(tmp_path / "s", disk, [export_of(512), export_of(512, "other")]) as server:
        server.uri = server.uri.replace("/disk?", "/none?")
        fails(server, r"^disk 'd': nbd\+unix:///none\?socket=.*UNKNOWN")


def test_a_server_that_says_nothing_at_all_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "OPEN_S", 0.3)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        uri = parse_nbd_uri(f"nbd+unix:///?socket={tmp_path}/s")
        endpoint = Endpoint("d", uri.shown, functools.partial(open_export, uri))
        with closing(Cancel()) as cancel:
            with pytest.raises(ExportError, match="no answer within"):
                PullReader(endpoint, cancel)
            cancel.ask("the user")
            with pytest.raises(Cancelled):
                PullReader(endpoint, cancel)
