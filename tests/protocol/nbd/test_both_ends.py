# SPDX-License-Identifier: Apache-2.0
"""Our client against our server, in memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.nbd.conversation import carry_out, joined, serve_stream, shake_hands
from tests.protocol.nbd.disk import ALL_FLAGS, Disk, export_of
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.client_handshake import Goal, NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.reply import Data, Hole, RequestDone, RequestFailed, Status
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import BlockSizes, Export, NbdSession, encode_request

SIZE = 1 << 16


def connect(
    *exports: Export, name: str = "disk", structured: bool = True
) -> tuple[NbdSession, NbdSession]:
    server = NbdServerHandshake(exports)
    client = NbdClientHandshake(name, structured=structured)
    shake_hands(server, client)
    assert server.session is not None
    assert client.session is not None
    return server.session, client.session


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("flags", [0, ALL_FLAGS, c.NBD_FLAG_READ_ONLY, c.NBD_FLAG_ROTATIONAL])
def test_both_ends_agree_on_the_session(structured: bool, flags: int) -> None:
    sizes = BlockSizes(512, 65536, 1 << 20)
    export = Export("disk", 1 << 40, flags, "ein Gerät", sizes, allocation=True)
    server, client = connect(export, Export("x", 1), structured=structured)
    assert client.flags == server.flags
    assert client.structured == server.structured == structured
    assert client.no_zeroes
    assert client.meta_contexts == server.meta_contexts
    assert bool(client.meta_contexts) == structured
    for field in ("name", "size_bytes", "description", "block_sizes"):
        assert getattr(client.export, field) == getattr(server.export, field)


def test_the_only_export_needs_no_name() -> None:
    _, client = connect(export_of(SIZE), name="")
    assert client.export.name == "disk"


@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_characters="\0", codec="utf-8")), st.text("ab ")),
        unique_by=lambda entry: entry[0],
        max_size=20,
    )
)
def test_a_list_is_read_as_it_was_written(entries: list[tuple[str, str]]) -> None:
    server = NbdServerHandshake(Export(name, 1, description=text) for name, text in entries)
    client = NbdClientHandshake(goal=Goal.LIST)
    shake_hands(server, client)
    assert client.listed == entries
    assert server.wanted_bytes == 0
    assert server.session is None


def test_one_export_is_described() -> None:
    server = NbdServerHandshake([export_of(SIZE), Export("x", 1)])
    client = NbdClientHandshake("disk", goal=Goal.INFORMATION)
    shake_hands(server, client)
    assert client.export is not None
    assert client.export.description == "a disk of a test"
    assert client.offered_contexts == (c.BASE_ALLOCATION,)
    assert server.session is None


def test_an_unknown_export_is_refused() -> None:
    client = NbdClientHandshake("other")
    server = NbdServerHandshake([export_of(SIZE)])
    with pytest.raises(NbdRefusedError, match="NBD_REP_ERR_UNKNOWN") as caught:
        shake_hands(server, client)
    server.feed(caught.value.unsent)
    assert server.wanted_bytes == 0


def test_a_server_without_go_closes_the_connection_for_an_unknown_export() -> None:
    """The client is made to believe so."""
    client = NbdClientHandshake("other", structured=False)
    server = NbdServerHandshake([export_of(SIZE)])
    plain = server.greeting()[:-2] + bytes(2)
    with pytest.raises(NbdProtocolError, match="no export"):
        server.feed(client.feed(plain))
    with pytest.raises(NbdRefusedError):
        client.eof()


def content(seed: int = 1) -> bytes:
    chance = random.Random(seed)
    return b"".join(
        chance.randbytes(4096) if chance.random() < 0.5 else bytes(4096)
        for _ in range(SIZE // 4096)
    )


COMMANDS = st.tuples(
    st.sampled_from(
        [
            c.NBD_CMD_READ,
            c.NBD_CMD_WRITE,
            c.NBD_CMD_TRIM,
            c.NBD_CMD_WRITE_ZEROES,
            c.NBD_CMD_CACHE,
            c.NBD_CMD_BLOCK_STATUS,
        ]
    ),
    st.integers(0, SIZE - 1),
    st.integers(1, SIZE),
    st.booleans(),
)


@given(st.lists(COMMANDS, max_size=12), st.booleans())
def test_reads_find_what_writes_left(
    commands: list[tuple[int, int, int, bool]], structured: bool
) -> None:
    disk = Disk(content())
    model = bytearray(disk.content)
    server, session = connect(export_of(SIZE), structured=structured)
    client = NbdClientTransmission(session)
    for number, (kind, offset, end, flag) in enumerate(commands):
        length = min(end, SIZE - offset)
        place = slice(offset, offset + length)
        if kind == c.NBD_CMD_BLOCK_STATUS and not structured:
            continue
        flags = c.NBD_CMD_FLAG_FUA
        if flag and kind == c.NBD_CMD_BLOCK_STATUS:
            flags |= c.NBD_CMD_FLAG_REQ_ONE
        if flag and kind == c.NBD_CMD_READ and structured:
            flags |= c.NBD_CMD_FLAG_DF
        data = bytes([number + 1]) * length if kind == c.NBD_CMD_WRITE else b""
        request = client.request(kind, offset, length, flags)
        events = carry_out(client, server, disk, request, data)
        if kind == c.NBD_CMD_WRITE:
            model[place] = data
        elif kind in (c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES):
            model[place] = bytes(length)
        assert events.pop() == RequestDone(request.cookie, c.NBD_SUCCESS)
        got = bytearray(b"?" * length)
        for event in events:
            match event:
                case Data(_, at, piece):
                    got[at - offset : at - offset + len(piece)] = piece
                case Hole(_, at, size):
                    got[at - offset : at - offset + size] = bytes(size)
                case Status():
                    check_status(event, model, offset)
                case _:
                    pytest.fail(str(event))
        if kind == c.NBD_CMD_READ:
            assert got == model[place]
    assert disk.content == model
    assert client.in_flight == 0


def check_status(status: Status, model: bytearray, offset: int) -> None:
    for length, flags in status.extents():
        assert (flags == 3) == (not any(model[offset : offset + length]))
        offset += length


@pytest.mark.parametrize("structured", [True, False])
def test_requests_may_pile_up(structured: bool) -> None:
    disk = Disk(content())
    server, session = connect(export_of(SIZE), structured=structured)
    client = NbdClientTransmission(session)
    requests = [client.request(c.NBD_CMD_READ, at, 4096) for at in range(0, SIZE, 4096)]
    assert client.in_flight == len(requests)
    raw = serve_stream(server, disk, b"".join(map(encode_request, requests)))
    assert sum(isinstance(event, RequestDone) for event in joined(client.feed(raw))) == len(
        requests
    )


def test_an_error_reaches_the_client_with_its_words() -> None:
    """A server may be stricter than it said."""
    disk = Disk(content())
    server, session = connect(export_of(SIZE))
    strict = NbdSession(Export("disk", 100), server.flags, structured=True)
    client = NbdClientTransmission(session)
    request = client.request(c.NBD_CMD_READ, 0, 4096)
    events = carry_out(client, strict, disk, request)
    assert events == [
        RequestFailed(request.cookie, c.NBD_EINVAL, "the test's server says no"),
        RequestDone(request.cookie, c.NBD_EINVAL),
    ]
