# SPDX-License-Identifier: Apache-2.0
"""LVM2's label and text, whatever is in them."""

from __future__ import annotations

import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmapipe.access.files.lvm import LvmError, VolumeGroup, parse_group, parse_text, read_label
from vmapipe.access.files.sources import ByteSource

GOLDEN = Path(__file__).parent.parent / "golden"
ID = "abcdef-ghij-klmn-opqr-stuv-wxyz-ABCDEF"
HEAD = f'id = "{ID}"\nseqno = 4\nextent_size = 256\nstatus = ["READ"]\n'
PVS = f'physical_volumes {{\npv0 {{\nid = "{ID}"\npe_start = 2048\npe_count = 90\n}}\n}}\n'


def group(volumes: str, head: str = HEAD, pvs: str = PVS) -> VolumeGroup:
    return parse_group(f"vg {{\n{head}{pvs}logical_volumes {{\n{volumes}}}\n}}\n".encode())


def volume(name: str, *segments: str, status: str = '"VISIBLE"') -> str:
    rows = "".join(f"segment{number} {{\n{text}\n}}\n" for number, text in enumerate(segments, 1))
    return f"{name} {{\nstatus = [{status}]\nsegment_count = {len(segments)}\n{rows}}}\n"


def linear(start: int, count: int, at: int, pv: str = "pv0") -> str:
    return (
        f'start_extent = {start}\nextent_count = {count}\ntype = "striped"\n'
        f'stripe_count = 1\nstripes = [\n"{pv}", {at}\n]'
    )


def source(raw: bytes) -> ByteSource:
    return ByteSource(lambda offset, length: raw[offset : offset + length], len(raw))


def golden(name: str) -> bytes:
    return lzma.decompress((GOLDEN / name).read_bytes())


def checksum(raw: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(raw, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF)


# --- what LVM2 itself has written ---


def test_the_newest_text_that_lvm2_wrote_is_found_and_understood() -> None:
    label = read_label(source(golden("lvm-a.xz")))
    other = read_label(source(golden("lvm-b.xz")))
    assert label is not None
    assert other is not None
    (found,) = label.groups
    assert found == other.groups[0]
    assert found.name == "vg0"
    assert found.pv_uuids == {label.uuid, other.uuid}
    size, base = 128 << 10, 1 << 20
    places = {
        item.name: [
            (
                *(part.start // size, part.length // size, part.stripe_bytes),
                *((s.pv_uuid == other.uuid, (s.offset - base) // size) for s in part.stripes),
            )
            for part in item.segments
        ]
        for item in found.volumes
    }
    assert places == {
        "root": [(0, 16, 0, (False, 0)), (16, 16, 0, (False, 20))],
        "gap": [(0, 4, 0, (False, 16))],
        "span": [(0, 24, 0, (True, 0)), (24, 16, 0, (False, 70))],
        "striped": [(0, 16, 32768, (False, 36), (True, 24))],
    }


def test_text_that_goes_round_the_end_of_its_area_is_one_text() -> None:
    raw = bytearray(golden("lvm-a.xz"))
    offset, size = struct.unpack_from("<QQ", raw, 4096 + 24)
    at, length = struct.unpack_from("<QQ", raw, 4096 + 40)
    text = bytes(raw[offset + at : offset + at + length])
    new = size - 100
    raw[offset + new : offset + size] = text[:100]
    raw[offset + 512 : offset + 512 + length - 100] = text[100:]
    struct.pack_into("<Q", raw, 4096 + 40, new)
    raw[4096:4100] = checksum(bytes(raw[4100 : 4096 + 512]))
    label = read_label(source(bytes(raw)))
    assert label is not None
    assert len(label.groups[0].volumes) == 4


@given(st.integers(0, 8192), st.integers(1, 255))
def test_a_byte_that_was_changed_is_noticed_or_does_not_matter(at: int, mask: int) -> None:
    good = golden("lvm-a.xz")
    raw = bytearray(good)
    raw[at] ^= mask
    before = read_label(source(good))
    try:
        after = read_label(source(bytes(raw)))
    except LvmError:
        return
    if after is not None:
        assert after.problem or after == before or not after.groups


# --- what the text says ---


def test_volumes_that_are_not_mapped_are_named_by_what_they_are() -> None:
    thin = 'start_extent = 0\nextent_count = 4\ntype = "thin"\nthin_pool = "pool"\ndevice_id = 1'
    raid = 'start_extent = 0\nextent_count = 4\ntype = "raid1"\nraids = ["a", "b"]'
    moved = linear(0, 4, 0, pv="pvmove0")
    snapshot = (
        'start_extent = 0\nextent_count = 4\ntype = "snapshot"\norigin = "root"\ncow_store = "snap"'
    )
    found = group(
        volume("thin1", thin)
        + volume("mirror", raid)
        + volume("moved", moved)
        + volume("snap", linear(0, 4, 10))
        + volume("snapshot0", snapshot, status='"READ"')
        + volume("half", linear(0, 4, 0), thin.replace("start_extent = 0", "start_extent = 4"))
        + volume("root", linear(0, 4, 0))
        + volume("pool_tdata", linear(0, 4, 20), status='"READ"')
    )
    kinds = {item.name: item.kind for item in found.volumes}
    assert kinds == {
        "thin1": "thin",
        "mirror": "raid1",
        "moved": "striped",
        "snap": "snapshot",
        "half": "thin",
        "root": "",
    }


@pytest.mark.parametrize(
    "text",
    [
        "vg {",
        "vg { } }",
        "vg { a = }",
        "vg { a = [1, 2 }",
        'vg { a = "x }',
        "vg = 1",
        "",
        "a { } b { }",
        "vg {" * 40,
        "{ a = 1 }",
    ],
)
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(LvmError):
        parse_group(text.encode())


@pytest.mark.parametrize(
    "volumes",
    [
        volume("../x", linear(0, 4, 0)),
        volume('"a b"', linear(0, 4, 0)),
        volume("root", linear(1, 4, 0)),
        volume("root", linear(0, 4, 0), linear(3, 4, 0)),
        volume("root", linear(0, 0, 0)),
        volume("root", linear(0, 4, -1)),
        volume("root", linear(0, 1 << 62, 0)),
        volume("root", linear(0, 4, 0)).replace("segment_count = 1", "segment_count = 2"),
        volume("root", linear(0, 4, 0).replace("stripes = [", "stripes = [1,")),
        volume("root", linear(0, 3, 0).replace('"pv0", 0', '"pv0", 0, "pv0", 9')),
    ],
)
def test_volumes_that_cannot_be_are_refused(volumes: str) -> None:
    with pytest.raises(LvmError):
        group(volumes)


def test_comments_and_escapes_are_not_part_of_a_value() -> None:
    assert parse_text('# one\na = "x\\"y\\\\z" # two\nb = [1, "c", 2.5]\n\0') == {
        "a": 'x"y\\z',
        "b": [1, "c", 2.5],
    }


PIECES = ["vg", "{", "}", "[", "]", "=", ",", '"', "\\", "#", "\n", "1", "pv0", "id", "\0", '"a"']


def is_a_group_or_refused_in_a_line(raw: bytes) -> None:
    try:
        found = parse_group(raw)
    except LvmError:
        return
    assert all(part.length > 0 for volume in found.volumes for part in volume.segments)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map(" ".join))
@example("a = " + "9" * 5000)
def test_no_text_brings_more_than_our_own_error(text: str) -> None:
    is_a_group_or_refused_in_a_line(text.encode("utf-8", "surrogateescape"))


VALUE: Any = st.one_of(
    st.integers(-2, 1 << 70).map(str), st.just('"pv0"'), st.just('["pv0", 1]'), st.just("[]")
)


@given(
    st.sampled_from(["extent_size", "seqno", "id", "pe_start", "segment_count", "start_extent"])
    | st.sampled_from(["extent_count", "type", "stripes", "status"]),
    VALUE,
)
def test_no_value_of_a_field_brings_more_than_our_own_error(name: str, value: str) -> None:
    text = f"vg {{\n{HEAD}{PVS}logical_volumes {{\n{volume('root', linear(0, 4, 0))}}}\n}}\n"
    lines = [
        f"{name} = {value}" if line.startswith(f"{name} = ") else line
        for line in text.replace("[\n", "[").splitlines()
    ]
    is_a_group_or_refused_in_a_line("\n".join(lines).encode())
