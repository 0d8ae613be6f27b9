# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vma.archives import CTIME_S, UUID, with_md5
from tests.vma.memory import peak_bytes
from vmapipe.clusters.sizes import MAX_DEVICE_BYTES
from vmapipe.vma.errors import HeaderError, LimitError, NotAnArchiveError
from vmapipe.vma.header import (
    HEADER_BYTES,
    MAX_BLOB_BYTES,
    MAX_HEADER_BYTES,
    PEEK_BYTES,
    Config,
    Device,
    Header,
    encode_header,
    parse_header,
    peek_header_bytes,
)
from vmapipe.vma.names import is_unsafe

MD5_AT = 32
BLOB_AT_AT, BLOB_BYTES_AT, HEADER_BYTES_AT = 48, 52, 56
CONFIG_NAMES_AT, CONFIG_DATA_AT, DEVICES_AT = 2044, 3068, 4096
DISK = Device(1, "drive-scsi0", 12345)
CONF = Config("qemu-server.conf", b"cores: 2\n")
SMALL = Header(UUID, CTIME_S, (DISK,), (CONF,))

# Any name that a file can have, stray bytes that are not UTF-8 included.
names = (
    st.binary(min_size=1, max_size=40)
    .map(lambda raw: raw.decode("utf-8", "surrogateescape"))
    .filter(lambda name: not is_unsafe(name))
)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    device_names = draw(st.lists(names, max_size=8, unique=True))
    config_names = draw(st.lists(names, min_size=0 if device_names else 1, max_size=8, unique=True))
    ids = draw(
        st.lists(
            st.integers(1, 254),
            min_size=len(device_names),
            max_size=len(device_names),
            unique=True,
        )
    )
    sizes = st.integers(1, MAX_DEVICE_BYTES)
    return Header(
        uuid=draw(st.binary(min_size=16, max_size=16)),
        ctime_s=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        devices=tuple(
            Device(dev_id, name, draw(sizes))
            for dev_id, name in zip(sorted(ids), device_names, strict=True)
        ),
        configs=tuple(Config(name, draw(st.binary(max_size=300))) for name in config_names),
    )


def devices(count: int) -> tuple[Device, ...]:
    return tuple(Device(1 + n, f"d{n}", 1) for n in range(count))


def configs(count: int, data: bytes = b"") -> tuple[Config, ...]:
    return tuple(Config(f"c{n}", data) for n in range(count))


def changed(at: int, value: bytes, header: Header = SMALL) -> bytes:
    """A header with other bytes at a place, and a checksum that fits."""
    raw = bytearray(encode_header(header))
    raw[at : at + len(value)] = value
    return with_md5(raw, MD5_AT)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def refusal(raw: bytes) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        parse_header(raw)
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= MAX_HEADER_BYTES
    return caught.value


# --- what goes in comes out ---


@given(headers())
def test_parsing_an_encoded_header_gives_it_back(header: Header) -> None:
    raw = encode_header(header)
    assert parse_header(raw) == header._replace(header_bytes=len(raw))
    assert peek_header_bytes(raw[:PEEK_BYTES]) == len(raw)
    assert len(raw) % 512 == 0


@given(headers(), st.binary(max_size=600))
@settings(max_examples=30)
def test_bytes_behind_the_header_do_not_matter(header: Header, more: bytes) -> None:
    raw = encode_header(header)
    assert parse_header(raw + more) == parse_header(raw)


@given(st.binary(max_size=200).map(lambda raw: b"VMA\0\0\0\0\1" + raw) | st.binary(max_size=200))
def test_any_bytes_are_a_header_or_refused(raw: bytes) -> None:
    with pytest.raises((HeaderError, NotAnArchiveError)):
        parse_header(raw)


@given(st.data())
@settings(max_examples=100)
def test_any_lie_with_a_right_checksum_is_a_header_or_refused(data: st.DataObject) -> None:
    raw = bytearray(encode_header(SMALL))
    places = [
        BLOB_AT_AT,
        BLOB_BYTES_AT,
        CONFIG_NAMES_AT,
        CONFIG_DATA_AT,
        DEVICES_AT + 32,
        DEVICES_AT + 40,
        HEADER_BYTES,
        HEADER_BYTES + 4,
    ]
    lies = st.tuples(st.sampled_from(places), st.binary(min_size=1, max_size=4))
    for at, value in data.draw(st.lists(lies, min_size=1, max_size=6)):
        raw[at : at + len(value)] = value
    try:
        header = parse_header(with_md5(raw, MD5_AT))
    except HeaderError:
        return
    assert {device.dev_id for device in header.devices} <= set(range(1, 256))


def test_the_places_are_those_of_the_specification() -> None:
    raw = encode_header(SMALL._replace(ctime_s=-2))
    assert raw[:8] == b"VMA\0" + u32(1)
    assert raw[8:24] == UUID
    assert raw[24:32] == b"\xff" * 7 + b"\xfe"
    table = b"\0" + b"\x11\0qemu-server.conf\0" + b"\x09\0cores: 2\n" + b"\x0c\0drive-scsi0\0"
    assert raw[48:60] == u32(HEADER_BYTES) + u32(len(table)) + u32(HEADER_BYTES + 512)
    assert raw[60:CONFIG_NAMES_AT] == bytes(CONFIG_NAMES_AT - 60)
    assert raw[CONFIG_NAMES_AT : CONFIG_NAMES_AT + 8] == u32(1) + u32(0)
    assert raw[CONFIG_DATA_AT : CONFIG_DATA_AT + 8] == u32(20) + u32(0)
    assert raw[DEVICES_AT : DEVICES_AT + 32] == bytes(32)
    assert raw[DEVICES_AT + 32 : DEVICES_AT + 64] == u32(31) + bytes(4) + struct.pack(
        ">Q", 12345
    ) + bytes(16)
    assert raw[HEADER_BYTES : HEADER_BYTES + len(table)] == table
    assert with_md5(raw, MD5_AT) == raw


# --- limits of the writer ---


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param((devices(254), ()), id="254 devices"),
        pytest.param((devices(1), configs(256)), id="256 configs"),
        pytest.param(((), configs(1)), id="configs only"),
        pytest.param((devices(1), configs(1, bytes(MAX_BLOB_BYTES))), id="a config of 65535"),
        pytest.param((devices(1), configs(1)), id="an empty config"),
        pytest.param(((Device(1, "x" * 65534, 1),), ()), id="a name of 65534"),
        pytest.param(((Device(1, "a", MAX_DEVICE_BYTES),), ()), id="the largest device"),
        pytest.param(((Device(1, "a", 1),), (Config("a", b""),)), id="device and config of a name"),
    ],
)
def test_what_the_format_just_holds_is_stored(
    contents: tuple[tuple[Device, ...], tuple[Config, ...]],
) -> None:
    header = Header(UUID, CTIME_S, *contents)
    raw = encode_header(header)
    assert parse_header(raw) == header._replace(header_bytes=len(raw))


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        pytest.param(((), ()), "nothing to archive", id="nothing"),
        pytest.param((devices(255), ()), "too many drives: 255", id="255 devices"),
        pytest.param(((), configs(257)), "too many configs: 257", id="257 configs"),
        pytest.param(
            ((), configs(1, bytes(65536))), "65536 bytes; the limit is 65535", id="a large config"
        ),
        pytest.param(((Device(0, "a", 1),), ()), "dev_id 0", id="dev_id 0"),
        pytest.param(((Device(255, "a", 1),), ()), "dev_id 255", id="dev_id 255"),
        pytest.param(
            ((Device(1, "a", 1), Device(1, "b", 1)), ()), "same dev_id 1", id="a dev_id twice"
        ),
        pytest.param(
            ((Device(1, "a", 1), Device(2, "a", 1)), ()), "two devices have", id="a device twice"
        ),
        pytest.param(
            ((), (Config("a", b""), Config("a", b"x"))), "two configs have", id="a config twice"
        ),
        pytest.param(((Device(1, "a", 0),), ()), "is empty", id="an empty device"),
        pytest.param(((Device(1, "a", -1),), ()), "is empty", id="a negative device"),
        pytest.param(
            ((Device(1, "a", MAX_DEVICE_BYTES + 1),), ()), "the limit is", id="a large device"
        ),
        pytest.param(((Device(1, "", 1),), ()), "empty name", id="a device without name"),
        pytest.param(((), (Config("", b""),)), "empty name", id="a config without name"),
        pytest.param(((Device(1, "a/b", 1),), ()), "slash", id="a slash in a device"),
        pytest.param(((), (Config("../a", b""),)), "slash", id="a slash in a config"),
        pytest.param(((Device(1, "a\0b", 1),), ()), "NUL", id="a NUL in a device"),
        pytest.param(((), (Config("a\0", b""),)), "NUL", id="a NUL in a config"),
        pytest.param(((), (Config("..", b""),)), "not safe", id="the folder above"),
        pytest.param(((Device(1, ".", 1),), ()), "not safe", id="the folder itself"),
        pytest.param(((Device(1, "a\nb", 1),), ()), "not safe", id="a line feed"),
        pytest.param(((Device(1, "a\x9bm", 1),), ()), "not safe", id="a C1 control"),
        pytest.param(((Device(1, "\ud800", 1),), ()), "not valid text", id="a lone surrogate"),
        pytest.param(((Device(1, "x" * 65535, 1),), ()), "65535 bytes long", id="a long name"),
        pytest.param(((Device(1, "é" * 32768, 1),), ()), "65536 bytes long", id="long in bytes"),
        pytest.param(
            ((), configs(8, bytes(64000))), "a header of 524800 bytes", id="a long header"
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(
    contents: tuple[tuple[Device, ...], tuple[Config, ...]], words: str
) -> None:
    with pytest.raises(LimitError, match=words):
        encode_header(Header(UUID, CTIME_S, *contents))


def test_the_largest_header_is_stored_and_one_byte_more_refused() -> None:
    # The table: 1 byte, then for each config 2 + 3 bytes of name and 2 of length beside its data.
    room = MAX_HEADER_BYTES - HEADER_BYTES - 1
    parts = (*configs(7, bytes(MAX_BLOB_BYTES)), Config("cx", b""))
    fixed = sum(2 + 3 + 2 + len(config.data) for config in parts)
    largest = Header(UUID, CTIME_S, (), (*parts[:-1], Config("cx", bytes(room - fixed))))
    raw = encode_header(largest)
    assert len(raw) == MAX_HEADER_BYTES
    assert parse_header(raw).configs == largest.configs
    larger = Header(UUID, CTIME_S, (), (*parts[:-1], Config("cx", bytes(room - fixed + 1))))
    with pytest.raises(LimitError, match="the limit is 524288"):
        encode_header(larger)


@pytest.mark.parametrize("uuid", [b"", bytes(15), bytes(17)])
def test_a_uuid_of_other_than_16_bytes_is_refused(uuid: bytes) -> None:
    with pytest.raises(LimitError, match="uuid"):
        encode_header(SMALL._replace(uuid=uuid))


@pytest.mark.parametrize("ctime_s", [(1 << 63) - 1, -(1 << 63), -1, 0])
def test_any_time_of_64_bits_is_stored(ctime_s: int) -> None:
    header = SMALL._replace(ctime_s=ctime_s)
    assert parse_header(encode_header(header)).ctime_s == ctime_s


@pytest.mark.parametrize("ctime_s", [1 << 63, -(1 << 63) - 1])
def test_a_time_of_more_than_64_bits_is_refused(ctime_s: int) -> None:
    with pytest.raises(LimitError, match="64 bits"):
        encode_header(SMALL._replace(ctime_s=ctime_s))


# --- what a reader must take ---


@pytest.mark.parametrize("more", [1, 511, 512, 4096, 100_000])
def test_a_header_longer_than_need_be_is_read(more: int) -> None:
    raw = bytearray(encode_header(SMALL)) + bytes(more)
    raw[HEADER_BYTES_AT : HEADER_BYTES_AT + 4] = u32(len(raw))
    header = parse_header(with_md5(raw, MD5_AT))
    assert header == SMALL._replace(header_bytes=len(raw))


def test_a_header_size_that_is_no_multiple_of_512_is_read() -> None:
    raw = bytearray(encode_header(SMALL)[: HEADER_BYTES + 45])
    assert len(raw) % 512
    raw[HEADER_BYTES_AT : HEADER_BYTES_AT + 4] = u32(len(raw))
    assert parse_header(with_md5(raw, MD5_AT)).devices == (DISK,)


@pytest.mark.parametrize(
    ("at", "length"),
    [
        pytest.param(60, CONFIG_NAMES_AT - 60, id="behind the fixed fields"),
        pytest.param(4092, 4, id="before the devices"),
        pytest.param(DEVICES_AT, 32, id="dev_id 0"),
        pytest.param(DEVICES_AT + 255 * 32, 32, id="dev_id 255"),
        pytest.param(DEVICES_AT + 32 + 4, 4, id="inside a device"),
        pytest.param(DEVICES_AT + 32 + 16, 16, id="at a device's end"),
        pytest.param(HEADER_BYTES, 1, id="the table's first byte"),
        pytest.param(HEADER_BYTES + 45, 100, id="behind the table"),
    ],
)
def test_reserved_bytes_may_hold_anything(at: int, length: int) -> None:
    assert parse_header(changed(at, b"\xa5" * length)) == parse_header(encode_header(SMALL))


def test_a_blob_table_elsewhere_in_the_header_is_read() -> None:
    raw = bytearray(encode_header(SMALL)) + bytes(512)
    raw[HEADER_BYTES + 512 : HEADER_BYTES + 557] = raw[HEADER_BYTES : HEADER_BYTES + 45]
    raw[HEADER_BYTES : HEADER_BYTES + 45] = bytes(45)
    raw[BLOB_AT_AT : BLOB_AT_AT + 4] = u32(HEADER_BYTES + 512)
    raw[HEADER_BYTES_AT : HEADER_BYTES_AT + 4] = u32(len(raw))
    assert parse_header(with_md5(raw, MD5_AT)).devices == (DISK,)


def test_a_device_without_a_size_or_a_name_is_an_unused_slot() -> None:
    assert parse_header(changed(DEVICES_AT + 32 + 8, bytes(8))).devices == ()
    assert parse_header(changed(DEVICES_AT + 32, bytes(4))).devices == ()


def test_a_config_without_a_name_or_data_is_an_unused_slot() -> None:
    assert parse_header(changed(CONFIG_NAMES_AT, bytes(4))).configs == ()
    assert parse_header(changed(CONFIG_DATA_AT, bytes(4))).configs == ()


def test_two_pointers_to_one_name_are_read() -> None:
    name_at = encode_header(SMALL)[CONFIG_NAMES_AT : CONFIG_NAMES_AT + 4]
    raw = changed(DEVICES_AT + 32, name_at)
    assert parse_header(raw).devices == (Device(1, CONF.name, DISK.size_bytes),)


# --- lies ---


@pytest.mark.parametrize(
    "raw",
    [b"", b"V", b"VMA", b"VMB\0", b"vma\0", bytes(60), b"\x28\xb5\x2f\xfd" + bytes(60), b"VMAE"],
)
def test_what_is_no_archive_is_said_so_in_the_references_words(raw: bytes) -> None:
    with pytest.raises(NotAnArchiveError) as caught:
        peek_header_bytes(raw)
    assert caught.value.reference_text == "not a vma file - wrong magic number"
    assert caught.value.offset == 0


@pytest.mark.parametrize("length", [4, 8, 59, 60, 12287, 12288, 12799])
def test_a_header_that_is_cut_off_is_refused(length: int) -> None:
    assert "ends" in refusal(encode_header(SMALL)[:length]).text


@pytest.mark.parametrize(
    "size", [0, 1, 59, 60, HEADER_BYTES - 1, HEADER_BYTES, MAX_HEADER_BYTES + 1, 0xFFFFFFFF]
)
def test_an_impossible_header_size_is_refused_at_once_in_the_references_words(size: int) -> None:
    raw = changed(HEADER_BYTES_AT, u32(size))
    with pytest.raises(HeaderError) as caught:
        peek_header_bytes(raw[:PEEK_BYTES])
    assert caught.value.reference_text == f"wrong vma header size {size}"
    assert caught.value.offset == HEADER_BYTES_AT
    refusal(raw)


@pytest.mark.parametrize("version", [0, 2, 0x01000000, 0xFFFFFFFF])
def test_another_version_is_refused_in_the_references_words(version: int) -> None:
    error = refusal(changed(4, u32(version)))
    assert error.reference_text == f"wrong vma version {version}"
    assert error.offset == 4


def test_a_wrong_checksum_is_refused_in_the_references_words() -> None:
    raw = bytearray(encode_header(SMALL))
    raw[-1] ^= 1
    error = refusal(bytes(raw))
    assert error.reference_text == "wrong vma header chechsum"
    assert error.offset == MD5_AT


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(BLOB_AT_AT, u32(0), id="the table in the fixed part"),
        pytest.param(BLOB_AT_AT, u32(HEADER_BYTES - 1), id="the table one byte early"),
        pytest.param(BLOB_AT_AT, u32(HEADER_BYTES + 512), id="the table behind the header"),
        pytest.param(BLOB_AT_AT, u32(0xFFFFFFFF), id="the table far behind the header"),
        pytest.param(BLOB_BYTES_AT, u32(513), id="the table longer than the header"),
        pytest.param(BLOB_BYTES_AT, u32(0xFFFFFFFF), id="the table of 4 GiB"),
        pytest.param(BLOB_BYTES_AT, u32(0), id="an empty table"),
        pytest.param(BLOB_BYTES_AT, u32(44), id="a table that cuts its last name"),
        pytest.param(BLOB_BYTES_AT, u32(32), id="a table that cuts a length"),
        pytest.param(DEVICES_AT + 32, u32(44), id="a name at the table's last byte"),
        pytest.param(DEVICES_AT + 32, u32(45), id="a name at the table's end"),
        pytest.param(DEVICES_AT + 32, u32(0xFFFFFFFF), id="a name far away"),
        pytest.param(DEVICES_AT + 32, u32(20), id="a name that is a config's data"),
        pytest.param(DEVICES_AT + 40, b"\xff" * 8, id="a device of 16 EiB"),
        pytest.param(
            DEVICES_AT + 40, struct.pack(">Q", MAX_DEVICE_BYTES + 1), id="a device too large by 1"
        ),
        pytest.param(CONFIG_NAMES_AT, u32(45), id="a config's name at the table's end"),
        pytest.param(CONFIG_DATA_AT, u32(45), id="a config's data at the table's end"),
        pytest.param(CONFIG_DATA_AT, u32(0x80000000), id="a config's data far away"),
        pytest.param(HEADER_BYTES + 1, b"\xff\xff", id="a name longer than the table"),
        pytest.param(HEADER_BYTES + 1, b"\0\0", id="a name without its NUL"),
        pytest.param(HEADER_BYTES + 1, b"\x01\0\0", id="an empty name"),
        pytest.param(HEADER_BYTES + 5, b"\0", id="a NUL inside a name"),
        pytest.param(HEADER_BYTES + 18, b"\0", id="a name that ends in two NUL"),
        pytest.param(HEADER_BYTES + 19, b"x", id="a name that does not end in NUL"),
        pytest.param(HEADER_BYTES + 20, b"\xff\xff", id="data longer than the table"),
    ],
)
def test_a_lie_about_places_and_sizes_is_refused(at: int, value: bytes) -> None:
    refusal(changed(at, value))


def header_with_configs_at(data: bytes, first: int, step: int) -> bytes:
    """256 configs, all of them in the data of the last: `first` and then every `step` bytes."""
    parts = (*configs(255), Config("last", data))
    raw = bytearray(encode_header(Header(UUID, CTIME_S, (), parts)))
    (last,) = struct.unpack_from(">I", raw, CONFIG_DATA_AT + 4 * 255)
    for index in range(256):
        struct.pack_into(">I", raw, CONFIG_DATA_AT + 4 * index, last + first + step * index)
    return with_md5(raw, MD5_AT)


def test_pointers_to_one_blob_cost_its_memory_once() -> None:
    lie = header_with_configs_at(bytes(MAX_BLOB_BYTES), 0, 0)

    def work() -> None:
        assert {config.data for config in parse_header(lie).configs} == {bytes(MAX_BLOB_BYTES)}

    # The header has 80 KiB; 256 copies of the data would be 16 MiB.
    assert peak_bytes(work) < 1 << 20


def test_blobs_that_overlap_are_refused_before_they_cost_memory() -> None:
    # Every second byte begins another blob of 16 KiB.
    lie = header_with_configs_at(b"\x00\x40" * 32767, 2, 2)

    def work() -> None:
        assert "overlaps" in refusal(lie).text

    assert peak_bytes(work) < 1 << 20


@pytest.mark.parametrize(
    ("at", "value", "offset"),
    [
        pytest.param(DEVICES_AT + 32, u32(45), HEADER_BYTES, id="outside the table"),
        pytest.param(HEADER_BYTES + 20, b"\xff\xff", HEADER_BYTES + 20, id="cut off"),
        pytest.param(HEADER_BYTES + 19, b"x", HEADER_BYTES + 1, id="no name"),
        pytest.param(DEVICES_AT + 40, b"\xff" * 8, DEVICES_AT + 32, id="a giant device"),
        pytest.param(BLOB_BYTES_AT, u32(513), BLOB_AT_AT, id="no table"),
    ],
)
def test_a_lie_is_refused_with_its_place(at: int, value: bytes, offset: int) -> None:
    assert refusal(changed(at, value)).offset == offset


def test_all_names_in_one_long_blob_cost_its_memory_once() -> None:
    header = Header(UUID, CTIME_S, (*devices(253), Device(254, "\u20ac" * 21844, 1)), ())
    raw = bytearray(encode_header(header))
    (last,) = struct.unpack_from(">I", raw, DEVICES_AT + 32 * 254)
    for dev_id in range(1, 254):
        struct.pack_into(">I", raw, DEVICES_AT + 32 * dev_id, last)
    lie = with_md5(raw, MD5_AT)

    def work() -> None:
        assert len({device.name for device in parse_header(lie).devices}) == 1

    assert peak_bytes(work) < 1 << 20
