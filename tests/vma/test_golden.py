# SPDX-License-Identifier: Apache-2.0
"""Archives that the reference tool wrote: read to the byte, and written again to the byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.golden_archives import GOLDEN_DIR, GoldenItem
from tests.vma.archives import (
    disk_image,
    extents_of,
    pack,
    pack_extents,
    read_whole,
    repack,
    scan,
)
from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES
from vmapipe.vma.errors import ArchiveError, CoverageError, ExtentError
from vmapipe.vma.header import HEADER_BYTES, PEEK_BYTES, encode_header
from vmapipe.vma.scanner import HeaderRead, Scanner

ARCHIVES = sorted(path.stem for path in GOLDEN_DIR.glob("*.vma.xz"))
# Two disks and configs; vmstate: of these every byte of the header is flipped,
# of the others those that are not zero.
EVERY_BYTE = ("g02-two-disks-cfg.vma", "g20-vmstate.vma")


def items_of(raw: bytes, cut: int) -> list[GoldenItem]:
    """What the archive holds, in the form of the list of digests."""
    events = scan(raw, range(cut, len(raw), cut))
    head = events[0]
    assert isinstance(head, HeaderRead)
    contents = [("config", c.name, c.data) for c in head.header.configs]
    contents += [("device", d.name, disk_image(d, events)) for d in head.header.devices]
    return [
        GoldenItem(kind, name, len(data), hashlib.sha256(data).hexdigest())
        for kind, name, data in contents
    ]


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("cut", [1 << 30, 99_991])
def test_the_references_archives_hold_what_is_listed(
    golden: Path, golden_digests: dict[str, list[GoldenItem]], name: str, cut: int
) -> None:
    raw = (golden / name).read_bytes()
    read_whole(raw)
    assert items_of(raw, cut) == golden_digests[name]


@pytest.mark.parametrize("name", ARCHIVES)
def test_packing_a_reference_archive_again_gives_the_same_bytes(golden: Path, name: str) -> None:
    raw = (golden / name).read_bytes()
    assert repack(raw) == raw


def boundaries(raw: bytes) -> list[int]:
    """Where one structure ends and the next begins, the archive's own end not included."""
    events = scan(raw)
    head = events[0]
    assert isinstance(head, HeaderRead)
    places = {0, 4, PEEK_BYTES, HEADER_BYTES, len(head.raw)}
    for event in extents_of(events):
        start = event.extent.offset
        places |= {start, start + EXTENT_HEADER_BYTES, start + event.extent.total_bytes}
    return sorted(places - {len(raw)})


def cluster_count_of(raw: bytes) -> int:
    return sum(run.count for event in extents_of(scan(raw)) for run in event.extent.runs)


@pytest.mark.parametrize("name", ARCHIVES)
def test_truncation_at_any_structure_is_noticed_unless_nothing_is_lost(
    golden: Path, name: str
) -> None:
    raw = (golden / name).read_bytes()
    clusters = cluster_count_of(raw)
    ends = {place + by for place in boundaries(raw) for by in (-1, 0, 1)} - {-1}
    for end in sorted(ends | {len(raw) - 1}):
        error = damage_of(raw[:end])
        if error is None:
            # Only the empty extent of an archive of configs.
            assert clusters == 0
            assert len(raw) - end == EXTENT_HEADER_BYTES
        elif isinstance(error, CoverageError):
            assert error.cluster_num is not None
        else:
            assert error.offset is not None
            assert error.offset <= end


def damage_of(raw: bytes) -> ArchiveError | None:
    try:
        read_whole(raw)
    except ArchiveError as error:
        return error
    return None


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_flipped_bit_in_any_byte_of_the_header_is_noticed(golden: Path, name: str) -> None:
    raw = (golden / name).read_bytes()
    head = scan(raw)[0]
    assert isinstance(head, HeaderRead)
    start = bytearray(raw[: len(head.raw) + EXTENT_HEADER_BYTES])
    for at in range(len(head.raw)):
        if not start[at] and name not in EVERY_BYTE:
            continue
        # Another bit in each byte: all eight of a byte would take minutes.
        bit = 1 << at % 8
        start[at] ^= bit
        assert offset_of_damage(start) is not None, f"byte {at}"
        start[at] ^= bit


def offset_of_damage(raw: bytearray) -> int | None:
    scanner = Scanner()
    try:
        list(scanner.feed(raw))
        scanner.close()
    except ArchiveError as error:
        return error.offset
    return None


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_flipped_bit_in_any_byte_of_any_extent_header_is_noticed(golden: Path, name: str) -> None:
    raw = bytearray((golden / name).read_bytes())
    events = extents_of(scan(bytes(raw)))
    head = encode_header(read_whole(bytes(raw)))
    for event in events:
        for at in range(EXTENT_HEADER_BYTES):
            damaged = bytearray(event.raw_header)
            damaged[at] ^= 1 << at % 8
            scanner = Scanner()
            list(scanner.feed(head))
            scanner.offset = event.extent.offset
            with pytest.raises(ExtentError) as caught:
                list(scanner.feed(damaged))
            assert caught.value.offset == event.extent.offset


def test_a_flipped_bit_in_the_data_is_not_noticed_because_the_format_has_no_checksum_for_it(
    golden: Path,
) -> None:
    raw = bytearray((golden / "g08-tail.vma").read_bytes())
    before = read_whole(bytes(raw))
    raw[-1] ^= 1
    assert read_whole(bytes(raw)) == before


def test_two_reference_archives_do_not_splice(golden: Path) -> None:
    first = (golden / "g06-c58.vma").read_bytes()
    second = (golden / "g06-c59.vma").read_bytes()
    extent_at = extents_of(scan(first))[0].extent.offset
    with pytest.raises(ExtentError) as caught:
        read_whole(first[:extent_at] + second[extent_at:])
    assert caught.value.reference_text == "wrong vma extent uuid"
    assert caught.value.offset == extent_at


def test_an_archive_of_configs_only_is_what_the_reference_writes(golden: Path) -> None:
    raw = (golden / "g14-cfgonly.vma").read_bytes()
    head = read_whole(raw)
    assert pack(head, []) == raw
    assert b"".join(pack_extents(head.uuid, [])) == raw[-EXTENT_HEADER_BYTES:]
