# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.vma.archives import (
    UUID,
    Run,
    clusters_of,
    extents_of,
    header,
    pack,
    pack_extents,
    read_whole,
    scan,
    with_md5,
)
from tests.vma.memory import peak_bytes
from vmapipe.clusters.sizes import (
    CLUSTER_BYTES,
    EXTENT_HEADER_BYTES,
    FULL_MASK,
    MAX_CLUSTERS,
    MAX_EXTENT_BYTES,
)
from vmapipe.vma.errors import (
    ArchiveError,
    CoverageError,
    ExtentError,
    HeaderError,
    NotAnArchiveError,
)
from vmapipe.vma.extent import encode_extent_header, slot_word
from vmapipe.vma.header import HEADER_BYTES, MAX_HEADER_BYTES, Config, Device, encode_header
from vmapipe.vma.scanner import ExtentRead, Scanner

DISK = Device(1, "drive-scsi0", 3 * CLUSTER_BYTES)
HEAD = header([DISK])
RAW_HEAD = encode_header(HEAD)


def refusal(raw: bytes) -> ArchiveError:
    with pytest.raises(ArchiveError) as caught:
        scan(raw)
    return caught.value


# --- forms of extents that other writers make ---


def test_one_cluster_an_extent_is_read() -> None:
    raw = pack(HEAD, [Run(1, 0, (1, 0, FULL_MASK))], 1)
    read_whole(raw)
    assert [event.extent.runs[0].count for event in extents_of(scan(raw))] == [1, 1, 1]


def test_empty_extents_between_others_are_read() -> None:
    empty = encode_extent_header(UUID, [], 0)
    full = list(pack_extents(UUID, [Run(1, 0, (1, 0, FULL_MASK))], 1))
    raw = RAW_HEAD + empty + full[0] + empty + empty + full[1] + full[2] + empty
    read_whole(raw)
    assert [len(event.extent.runs) for event in extents_of(scan(raw))] == [0, 1, 0, 0, 1, 1, 0]


def test_empty_slots_between_used_ones_are_skipped() -> None:
    slots = [0, slot_word(1, 1, 2), 0, 0, slot_word(2, 1, 0), slot_word(0, 1, 1), 0]
    raw = RAW_HEAD + encode_extent_header(UUID, slots, 2) + b"a" * 4096 + b"b" * 4096
    read_whole(raw)
    assert [(c.num, c.mask, c.data[:1]) for c in clusters_of(scan(raw))] == [
        (2, 1, b"a"),
        (0, 2, b"b"),
        (1, 0, b""),
    ]


def test_an_extent_of_59_full_clusters_is_read() -> None:
    head = header([Device(1, "a", 59 * CLUSTER_BYTES)])
    raw = pack(head, [Run(1, 0, (FULL_MASK,) * 59)], 59)
    assert len(raw) == len(RAW_HEAD) + MAX_EXTENT_BYTES
    read_whole(raw)


def test_events_carry_their_place_in_the_archive_and_their_raw_headers() -> None:
    raw = pack(HEAD, [Run(1, 0, (1, 0, FULL_MASK))], 1)
    head, *extents = scan(raw)
    rebuilt = head.raw if not isinstance(head, ExtentRead) else b""
    for event in extents:
        assert isinstance(event, ExtentRead)
        assert event.extent.offset == len(rebuilt)
        rebuilt += event.raw_header + bytes(event.data)
    assert rebuilt == raw


# --- what is no archive, or not all of one ---


@given(st.binary(max_size=100))
@example(b"")
@example(b"VM")
@example(b"VMA\0")
def test_other_bytes_are_refused_and_nothing_worse(raw: bytes) -> None:
    with pytest.raises((NotAnArchiveError, HeaderError)):
        scan(raw)


@given(st.binary(min_size=1, max_size=2000))
def test_rubbish_behind_the_header_is_refused(rubbish: bytes) -> None:
    with pytest.raises(ExtentError) as caught:
        scan(RAW_HEAD + rubbish)
    assert caught.value.offset == len(RAW_HEAD)


def test_nothing_at_all_is_no_archive() -> None:
    with pytest.raises(NotAnArchiveError, match="empty"):
        scan(b"")


@pytest.mark.parametrize("got", [1, 100, 511])
def test_an_archive_that_ends_inside_an_extent_header_says_so(got: int) -> None:
    raw = pack(HEAD, [Run(1, 0, (1,))])[: len(RAW_HEAD) + got]
    error = refusal(raw)
    assert isinstance(error, ExtentError)
    assert error.offset == len(RAW_HEAD)
    assert error.reference_text == f"read short extent ({got} bytes)"


@pytest.mark.parametrize("got", [0, 1, 4095])
def test_an_archive_that_ends_inside_an_extents_data_says_so(got: int) -> None:
    raw = pack(HEAD, [Run(1, 0, (1,))])[: len(RAW_HEAD) + EXTENT_HEADER_BYTES + got]
    error = refusal(raw)
    assert isinstance(error, ExtentError)
    assert error.offset == len(RAW_HEAD)
    assert error.reference_text == f"short vma extent ({512 + got} < {512 + 4096})"


def test_the_place_of_damage_counts_from_the_archives_start() -> None:
    raw = bytearray(pack(HEAD, [Run(1, 0, (1, 1, 1))], 1))
    second = len(RAW_HEAD) + EXTENT_HEADER_BYTES + 4096
    raw[second] ^= 1
    error = refusal(bytes(raw))
    assert error.offset == second
    assert f"(archive offset {second})" in str(error)


def test_a_lost_end_of_vmstate_is_not_noticed_because_its_length_stands_nowhere() -> None:
    head = header([DISK, Device(2, "vmstate", 4 * CLUSTER_BYTES)])
    runs = [Run(1, 0, (1, 0, 1)), Run(2, 0, (1, 1, 1, 1))]
    extents = list(pack_extents(UUID, runs, 5))
    whole = read_whole(encode_header(head) + b"".join(extents))
    assert read_whole(encode_header(head) + extents[0]) == whole


# --- two archives in one ---


def test_the_extents_of_another_archive_are_refused() -> None:
    other = header([DISK], uuid=bytes(16))
    runs = [Run(1, 0, (1, 0, FULL_MASK))]
    mine, foreign = pack(HEAD, runs, 1), pack(other, runs, 1)
    second = len(RAW_HEAD) + EXTENT_HEADER_BYTES + 4096
    error = refusal(mine[:second] + foreign[second:])
    assert error.offset == second
    assert error.reference_text == "wrong vma extent uuid"


def test_a_second_archive_behind_the_first_is_refused() -> None:
    raw = pack(HEAD, [Run(1, 0, (1, 0, FULL_MASK))])
    error = refusal(raw + raw)
    assert error.offset == len(raw)
    assert error.reference_text == "wrong vma extent header magic"


def test_an_extent_that_was_taken_out_is_missed() -> None:
    extents = list(pack_extents(UUID, [Run(1, 0, (1, 0, FULL_MASK))], 1))
    with pytest.raises(CoverageError, match="cluster 1 is missing"):
        read_whole(RAW_HEAD + extents[0] + extents[2])


def test_an_extent_that_comes_twice_is_refused() -> None:
    extents = list(pack_extents(UUID, [Run(1, 0, (1, 0, FULL_MASK))], 1))
    with pytest.raises(CoverageError, match="cluster 1 comes a second time"):
        read_whole(RAW_HEAD + extents[0] + extents[1] + extents[1] + extents[2])


# --- memory ---


@pytest.mark.parametrize("claim", [MAX_HEADER_BYTES + 1, 1 << 30, 0xFFFFFFFF])
def test_a_header_that_claims_much_is_refused_before_memory_is_taken(claim: int) -> None:
    raw = bytearray(RAW_HEAD)
    raw[56:60] = claim.to_bytes(4, "big")
    scanner = Scanner()

    def work() -> None:
        with pytest.raises(HeaderError):
            list(scanner.feed(raw))

    assert peak_bytes(work) < 1 << 20
    assert scanner.wanted_bytes <= MAX_HEADER_BYTES


def test_an_extent_that_claims_much_is_refused_before_memory_is_taken() -> None:
    raw = bytearray(encode_extent_header(UUID, [slot_word(1, 1, 0)], 65535))
    with pytest.raises(ExtentError):
        scan(RAW_HEAD + with_md5(raw, 24))


@given(st.lists(st.sampled_from([b"\0" * 512, RAW_HEAD]), max_size=6))
@settings(max_examples=20)
def test_the_scanner_never_wants_more_than_one_extent(pieces: list[bytes]) -> None:
    scanner = Scanner()
    try:
        for piece in (RAW_HEAD, *pieces):
            list(scanner.feed(piece))
            assert 0 < scanner.wanted_bytes <= MAX_EXTENT_BYTES
    except ArchiveError:
        pass


def test_memory_does_not_grow_with_the_archive() -> None:
    head = header([Device(1, "a", MAX_CLUSTERS * CLUSTER_BYTES)])
    piece = next(pack_extents(UUID, [Run(1, 0, (FULL_MASK,) * 58)]))
    scanner = Scanner()
    list(scanner.feed(encode_header(head)))

    def work() -> None:
        for _ in range(8):
            for start in range(0, len(piece), 100_000):
                for event in scanner.feed(piece[start : start + 100_000]):
                    assert isinstance(event, ExtentRead)

    # The extent that is being collected, its copy, and what growing takes.
    assert peak_bytes(work) < 4 * MAX_EXTENT_BYTES


def test_configs_only_may_end_with_the_header() -> None:
    raw = encode_header(header(configs=[Config("a", b"x")]))
    assert len(raw) > HEADER_BYTES
    read_whole(raw)
