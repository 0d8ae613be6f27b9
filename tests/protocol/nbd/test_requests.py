# SPDX-License-Identifier: Apache-2.0
"""Which requests are taken, which are answered with which error, and which end the connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.nbd.disk import ALL_FLAGS, export_of
from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.constants import MAX_PAYLOAD_BYTES
from vmapipe.protocol.nbd.errors import NbdProtocolError, error_from_peer, error_of_errno
from vmapipe.protocol.nbd.session import (
    REQUEST,
    REQUEST_BYTES,
    BlockSizes,
    Export,
    MetaContext,
    NbdRequest,
    NbdSession,
    encode_request,
    parse_request,
)

SIZE = 1 << 26
EVERYTHING = ALL_FLAGS | c.NBD_FLAG_HAS_FLAGS
CONTEXTS = (MetaContext(1, c.BASE_ALLOCATION),)
FULL = NbdSession(export_of(SIZE), EVERYTHING, True, True, CONTEXTS)
BARE = NbdSession(export_of(SIZE), c.NBD_FLAG_HAS_FLAGS)
READ_ONLY = NbdSession(export_of(SIZE), EVERYTHING | c.NBD_FLAG_READ_ONLY, True, True, CONTEXTS)

FUA, NO_HOLE, DF = c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_NO_HOLE, c.NBD_CMD_FLAG_DF
REQ_ONE, FAST_ZERO = c.NBD_CMD_FLAG_REQ_ONE, c.NBD_CMD_FLAG_FAST_ZERO
# The flags of each command when everything was announced.
FLAGS = {
    c.NBD_CMD_READ: FUA | DF,
    c.NBD_CMD_WRITE: FUA,
    c.NBD_CMD_FLUSH: FUA,
    c.NBD_CMD_TRIM: FUA,
    c.NBD_CMD_CACHE: FUA,
    c.NBD_CMD_WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    c.NBD_CMD_BLOCK_STATUS: FUA | REQ_ONE,
}
RANGED = [kind for kind in FLAGS if kind != c.NBD_CMD_FLUSH]
CHANGING = [c.NBD_CMD_WRITE, c.NBD_CMD_TRIM, c.NBD_CMD_WRITE_ZEROES]


def request(kind: int, offset: int = 0, length: int = 4096, flags: int = 0) -> NbdRequest:
    if kind == c.NBD_CMD_FLUSH:
        length = 0
    return NbdRequest(flags, kind, 1, offset, length)


# --- parse_request ---


@given(
    st.builds(
        NbdRequest,
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, MAX_PAYLOAD_BYTES),
    )
)
def test_every_request_comes_back_as_it_was(sent: NbdRequest) -> None:
    assert parse_request(encode_request(sent)) == sent
    assert str(sent)


@given(st.binary(min_size=REQUEST_BYTES, max_size=REQUEST_BYTES))
def test_any_28_bytes_are_a_request_or_a_protocol_error(raw: bytes) -> None:
    with pytest.raises(NbdProtocolError, match="no request"):
        parse_request(b"\0" + raw[1:])
    try:
        parsed = parse_request(encode_request(NbdRequest(0, 0, 0, 0, 0))[:4] + raw[4:])
    except NbdProtocolError:
        return
    assert 0 <= parsed.payload_bytes <= MAX_PAYLOAD_BYTES
    assert FULL.fault_of(parsed) in {0, *c.ERROR_NAMES}


@pytest.mark.parametrize("length", [0, 27, 29])
def test_another_number_of_bytes_is_the_callers_fault(length: int) -> None:
    with pytest.raises(LocalProtocolError):
        parse_request(bytes(length))


def test_a_write_beyond_32_mib_ends_the_connection_before_its_data_is_read() -> None:
    largest = REQUEST.pack(c.NBD_REQUEST_MAGIC, 0, c.NBD_CMD_WRITE, 1, 0, MAX_PAYLOAD_BYTES)
    assert parse_request(largest).payload_bytes == MAX_PAYLOAD_BYTES
    larger = REQUEST.pack(c.NBD_REQUEST_MAGIC, 0, c.NBD_CMD_WRITE, 1, 0, MAX_PAYLOAD_BYTES + 1)
    with pytest.raises(NbdProtocolError, match="33554433"):
        parse_request(larger)


@pytest.mark.parametrize("kind", [kind for kind in range(10) if kind != c.NBD_CMD_WRITE])
def test_only_a_write_has_data(kind: int) -> None:
    assert request(kind).payload_bytes == 0


# --- Session.fault_of ---


@pytest.mark.parametrize("kind", FLAGS)
def test_a_good_request_has_no_fault(kind: int) -> None:
    assert FULL.fault_of(request(kind)) == c.NBD_SUCCESS
    assert FULL.fault_of(request(kind, flags=FLAGS[kind])) == c.NBD_SUCCESS


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("bit", range(16))
def test_a_flag_that_the_command_does_not_have_is_einval(kind: int, bit: int) -> None:
    wanted = c.NBD_SUCCESS if FLAGS[kind] & 1 << bit else c.NBD_EINVAL
    assert FULL.fault_of(request(kind, flags=1 << bit)) == wanted


@pytest.mark.parametrize("kind", FLAGS)
def test_what_was_not_announced_is_einval(kind: int) -> None:
    taken = kind in (c.NBD_CMD_READ, c.NBD_CMD_WRITE)
    assert BARE.fault_of(request(kind)) == (c.NBD_SUCCESS if taken else c.NBD_EINVAL)
    assert BARE.fault_of(request(kind, flags=FUA)) == c.NBD_EINVAL


@pytest.mark.parametrize(
    ("flag", "kind", "flags"),
    [
        (c.NBD_FLAG_SEND_FLUSH, c.NBD_CMD_FLUSH, 0),
        (c.NBD_FLAG_SEND_FUA, c.NBD_CMD_WRITE, FUA),
        (c.NBD_FLAG_SEND_TRIM, c.NBD_CMD_TRIM, 0),
        (c.NBD_FLAG_SEND_WRITE_ZEROES, c.NBD_CMD_WRITE_ZEROES, NO_HOLE),
        (c.NBD_FLAG_SEND_FAST_ZERO, c.NBD_CMD_WRITE_ZEROES, FAST_ZERO),
        (c.NBD_FLAG_SEND_CACHE, c.NBD_CMD_CACHE, 0),
        (c.NBD_FLAG_SEND_DF, c.NBD_CMD_READ, DF),
    ],
)
def test_each_transmission_flag_allows_what_it_announces(flag: int, kind: int, flags: int) -> None:
    without = NbdSession(export_of(SIZE), EVERYTHING & ~flag)
    assert without.fault_of(request(kind, flags=flags)) == c.NBD_EINVAL
    assert FULL.fault_of(request(kind, flags=flags)) == c.NBD_SUCCESS


def test_block_status_needs_a_selected_context() -> None:
    session = NbdSession(export_of(SIZE), EVERYTHING, structured=True)
    assert session.fault_of(request(c.NBD_CMD_BLOCK_STATUS)) == c.NBD_EINVAL


@pytest.mark.parametrize("kind", [8, 9, 100, 0xFFFF])
def test_an_unknown_command_is_einval(kind: int) -> None:
    assert FULL.fault_of(request(kind)) == c.NBD_EINVAL


@pytest.mark.parametrize("kind", FLAGS)
def test_a_read_only_export_is_not_changed(kind: int) -> None:
    wanted = c.NBD_EPERM if kind in CHANGING else c.NBD_SUCCESS
    assert READ_ONLY.fault_of(request(kind)) == wanted


@pytest.mark.parametrize("kind", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (SIZE - 4096, 4097), ((1 << 64) - 1, 1), (1 << 63, 4096)],
)
def test_beyond_the_end_is_enospc_for_what_fills_and_einval_else(
    kind: int, offset: int, length: int
) -> None:
    fills = kind in (c.NBD_CMD_WRITE, c.NBD_CMD_WRITE_ZEROES)
    wanted = c.NBD_ENOSPC if fills else c.NBD_EINVAL
    assert FULL.fault_of(request(kind, offset, length)) == wanted
    assert FULL.fault_of(request(kind, SIZE - length, length)) == c.NBD_SUCCESS


@pytest.mark.parametrize("kind", RANGED)
def test_a_length_of_zero_is_einval(kind: int) -> None:
    assert FULL.fault_of(request(kind, length=0)) == c.NBD_EINVAL


@pytest.mark.parametrize("kind", RANGED)
def test_only_what_has_data_is_limited_in_length(kind: int) -> None:
    limited = kind in (c.NBD_CMD_READ, c.NBD_CMD_WRITE)
    assert FULL.fault_of(request(kind, length=MAX_PAYLOAD_BYTES)) == c.NBD_SUCCESS
    long = FULL.fault_of(request(kind, length=SIZE))
    assert long == (c.NBD_EINVAL if limited else c.NBD_SUCCESS)


def test_the_maximum_block_size_limits_data_further() -> None:
    export = Export("x", SIZE, ALL_FLAGS, block_sizes=BlockSizes(512, 4096, 65536))
    session = NbdSession(export, export.flags)
    assert session.max_data_bytes == 65536
    assert session.fault_of(request(c.NBD_CMD_READ, length=65536)) == c.NBD_SUCCESS
    assert session.fault_of(request(c.NBD_CMD_READ, length=65536 + 512)) == c.NBD_EINVAL


@pytest.mark.parametrize("kind", RANGED)
def test_requests_between_the_smallest_blocks_are_einval(kind: int) -> None:
    export = Export("x", SIZE, ALL_FLAGS, block_sizes=BlockSizes(512, 4096, 1 << 20))
    session = NbdSession(export, export.flags, True, True, CONTEXTS)
    assert session.fault_of(request(kind, 512, 512)) == c.NBD_SUCCESS
    assert session.fault_of(request(kind, 512, 513)) == c.NBD_EINVAL
    assert session.fault_of(request(kind, 256, 512)) == c.NBD_EINVAL


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1)])
def test_a_flush_has_no_range(offset: int, length: int) -> None:
    flush = NbdRequest(0, c.NBD_CMD_FLUSH, 1, offset, length)
    assert FULL.fault_of(flush) == c.NBD_EINVAL


# --- error numbers ---


@pytest.mark.parametrize(
    ("errno", "error"),
    [
        (1, c.NBD_EPERM),
        (5, c.NBD_EIO),
        (12, c.NBD_ENOMEM),
        (13, c.NBD_EPERM),
        (22, c.NBD_EINVAL),
        (27, c.NBD_ENOSPC),
        (28, c.NBD_ENOSPC),
        (30, c.NBD_EPERM),
        (95, c.NBD_ENOTSUP),
        (122, c.NBD_ENOSPC),
        (9, c.NBD_EIO),
        (None, c.NBD_EIO),
    ],
)
def test_errors_of_the_system_become_errors_of_the_protocol(errno: int | None, error: int) -> None:
    assert error_of_errno(errno) == error


def test_an_unexpected_error_of_a_server_is_einval() -> None:
    assert [error_from_peer(number) for number in (5, 108, 2, 0xFFFFFFFF)] == [5, 108, 22, 22]
