# SPDX-License-Identifier: Apache-2.0
"""Messages about jobs: to bytes and back, and what strangers may send instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.jobs import of_coordinators, of_services
from tests.protocol.messages import UUID
from vmapipe.protocol import limits, service
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError
from vmapipe.protocol.schema import Part

OPEN = {"version": 1, "job": UUID, "name": "vm.vma", "devices": ["a"]}


def decode(parts: list[Part]) -> service.FromCoordinator | None:
    return service.read_of_coordinator(*service.unpack_control(parts))


def packed(name: object, fields: object) -> list[Part]:
    return [msgpack.packb([name, fields])]


def code_of(parts: list[Part]) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(parts)
    return caught.value.code


def fault_of(read: Callable[[list[Part]], object], parts: list[Part]) -> str:
    try:
        read(parts)
    except RemoteProtocolError as error:
        return error.code
    return ""


@given(of_coordinators)
def test_what_a_coordinator_says_is_what_a_service_reads(message: service.FromCoordinator) -> None:
    assert decode(service.encode(message)) == message


@given(of_services)
def test_what_a_service_says_is_what_a_coordinator_reads(message: service.FromService) -> None:
    assert service.decode_of_service(service.encode(message)) == message


@given(st.lists(st.binary(max_size=80), max_size=4))
def test_bytes_of_strangers_are_refused_or_read_and_nothing_else(parts: list[Part]) -> None:
    for read in (decode, service.decode_of_service):
        assert fault_of(read, parts) in ("", "malformed", "too-large", "version")


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 63) | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(["OPEN", "BEAT", "CANCEL", "OPENED", "BEGUN", "PROGRESS", "STORED", "ALIVE"]),
    st.dictionaries(
        st.sampled_from(["version", "job", "name", "devices", "configs", "uuid", "sizes", "done"]),
        values,
    ),
)
def test_fields_of_any_type_are_refused_or_make_sense(name: str, fields: dict[str, Any]) -> None:
    for read in (decode, service.decode_of_service):
        assert fault_of(read, packed(name, fields)) in ("", "malformed", "version")


def test_another_version_is_told_from_nonsense() -> None:
    assert code_of(packed("OPEN", {"version": 2})) == "version"
    assert code_of(packed("OPEN", {})) == "malformed"


@pytest.mark.parametrize(
    "change",
    [
        {"job": b"short"},
        {"devices": ["a", 1]},
        {"devices": [""]},
        {"devices": "a"},
        {"configs": [["a", b"x" * 65536]]},
        {"configs": [["../x", b""]]},
        {"configs": [["a"]]},
        {"configs": [["a", "text"]]},
        {"manifest": 1},
        {"uuid": b"12"},
        {"compress": "z" * 5000},
    ],
)
def test_an_open_that_makes_no_sense_is_malformed(change: dict[str, object]) -> None:
    assert decode(packed("OPEN", OPEN)) is not None
    assert code_of(packed("OPEN", {**OPEN, **change})) == "malformed"


def test_limits_hold_before_anything_is_unpacked() -> None:
    assert code_of([bytes(service.MAX_OPEN_BYTES + 1)]) == "too-large"
    assert (
        code_of(packed("BEAT", {"job": UUID, "more": b"x" * service.MAX_TOLD_BYTES})) == "too-large"
    )
    assert code_of(packed("OPEN", {**OPEN, "devices": ["a"] * 257})) == "malformed"
    assert code_of(packed("OPEN", OPEN) * 2) == "malformed"


def test_configs_beyond_the_message_are_refused_where_they_are_sent() -> None:
    configs = tuple((f"c{index}", bytes(65535)) for index in range(17))
    with pytest.raises(LocalProtocolError, match=r"OPEN: .* bytes, at most 1048576"):
        service.encode(service.Open(limits.VERSION, UUID, "vm.vma", ("a",), configs))


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "/etc/passwd", "a/b", "../x", "a\0b", "a\nb", "\x1b[2J"),
        *("x.partial", "x.vma.manifest.json", "x" * 201, "ä" * 101, "\ud800", "a\u2028b"),
    ],
)
def test_a_name_that_is_no_plain_file_name_has_a_fault(name: str) -> None:
    assert service.archive_name_fault(name)


@pytest.mark.parametrize("name", ["vm.vma", "vm-100.vma.zst", "x" * 200, "größe 1.vma", "-", "a:b"])
def test_a_plain_name_has_none(name: str) -> None:
    assert service.archive_name_fault(name) == ""
