# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vma.archives import UUID, masks, with_md5
from vmapipe.clusters.masks import mask_runs
from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_HEADER_BYTES, FULL_MASK
from vmapipe.vma.errors import ExtentError
from vmapipe.vma.extent import (
    ClusterRun,
    block_pieces,
    encode_extent_header,
    parse_extent_header,
    slot_word,
)

MD5_AT = 24
SLOTS_AT = 40


def extent_header(*slots: int, blocks: int | None = None, uuid: bytes = UUID) -> bytes:
    if blocks is None:
        blocks = sum((slot >> 48).bit_count() for slot in slots if slot >> 32 & 0xFF)
    return encode_extent_header(uuid, list(slots), blocks)


@given(st.integers(0, FULL_MASK))
@settings(max_examples=300)
def test_mask_runs_are_the_set_bits_in_maximal_runs(mask: int) -> None:
    runs = mask_runs(mask)
    bits = [bit for first, count in runs for bit in range(first, first + count)]
    assert bits == [bit for bit in range(16) if mask >> bit & 1]
    for (first, count), (following, _) in itertools.pairwise(runs):
        assert first + count < following


@given(
    st.lists(masks, min_size=1, max_size=8).map(tuple),
    st.integers(0, 4),
    st.integers(1, 12 * CLUSTER_BYTES) | st.integers(1, 12 * 16).map(lambda n: n * 4096),
    st.integers(0, 50).map(lambda blocks: blocks * 4096),
)
@settings(max_examples=200)
def test_block_pieces_say_where_each_stored_byte_belongs(
    run_masks: tuple[int, ...], first: int, size_bytes: int, data_at: int
) -> None:
    run = ClusterRun(1, first, run_masks, data_at)
    expected = []
    at = data_at
    for index, mask in enumerate(run_masks):
        for bit in range(16):
            if mask >> bit & 1:
                disk_at = (first + index) * CLUSTER_BYTES + bit * 4096
                length = min(4096, size_bytes - disk_at)
                if length > 0:
                    expected.append((disk_at, at, length))
                at += 4096
    pieces = block_pieces(run, size_bytes)
    # Cut into blocks again, the merged pieces are what was expected.
    cut = [
        (disk_at + by, data_from + by, min(4096, length - by))
        for disk_at, data_from, length in pieces
        for by in range(0, length, 4096)
    ]
    assert cut == expected
    for (disk_at, _, length), (following, _, _) in itertools.pairwise(pieces):
        assert disk_at + length < following


@pytest.mark.parametrize(
    ("run_masks", "is_full", "is_zero", "data_bytes"),
    [
        ((FULL_MASK,), True, False, CLUSTER_BYTES),
        ((FULL_MASK, FULL_MASK), True, False, 2 * CLUSTER_BYTES),
        ((FULL_MASK, 0x7FFF), False, False, 31 * 4096),
        ((FULL_MASK, 0), False, False, CLUSTER_BYTES),
        ((0, 0), False, True, 0),
        ((0, 1), False, False, 4096),
    ],
)
def test_a_run_knows_whether_it_is_full_or_zero(
    run_masks: tuple[int, ...], is_full: bool, is_zero: bool, data_bytes: int
) -> None:
    run = ClusterRun(1, 0, run_masks, 0)
    assert run.count == len(run_masks)
    assert (run.is_full, run.is_zero, run.data_bytes) == (is_full, is_zero, data_bytes)


@pytest.mark.parametrize("run_masks", [(FULL_MASK,), (FULL_MASK, 1), (1,), (0,)])
def test_a_run_beyond_the_devices_end_has_no_pieces(run_masks: tuple[int, ...]) -> None:
    run = ClusterRun(1, 5, run_masks, 0)
    assert block_pieces(run, 5 * CLUSTER_BYTES) == []
    assert block_pieces(run, 1) == []


def test_a_block_that_begins_at_the_devices_end_is_no_piece() -> None:
    run = ClusterRun(1, 0, (0b101,), 0)
    assert block_pieces(run, 2 * 4096) == [(0, 0, 4096)]


def test_a_full_last_cluster_is_cut_at_the_devices_end() -> None:
    run = ClusterRun(1, 0, (FULL_MASK, FULL_MASK), 0)
    assert block_pieces(run, CLUSTER_BYTES + 1) == [(0, 0, CLUSTER_BYTES + 1)]


@st.composite
def slot_lists(draw: st.DrawFn) -> list[int]:
    """Used and empty slots in any mixture; empty ones may hold rubbish beside the dev_id."""
    used = st.builds(
        slot_word, masks, st.integers(1, 255), st.one_of(st.integers(0, 9), st.just(0xFFFFFFFF))
    )
    empty = st.one_of(st.just(0), st.builds(slot_word, masks, st.just(0), st.integers(0, 9)))
    return draw(st.lists(st.one_of(used, empty), max_size=59))


@st.composite
def slots_in_order(draw: st.DrawFn) -> list[int]:
    """Words that grow by one each, also beyond the number's bits; then anything, or nothing."""
    first = draw(
        st.builds(
            lambda mask, reserved, dev_id, num: slot_word(mask, dev_id, num) | reserved << 40,
            masks,
            st.sampled_from([0, 0xA5]),
            st.integers(0, 254),
            st.one_of(st.integers(0, 9), st.integers(0xFFFFFFFF - 59, 0xFFFFFFFF)),
        )
    )
    count = draw(st.integers(1, 59))
    return (list(range(first, first + count)) + draw(slot_lists()))[:59]


@given(st.one_of(slot_lists(), slots_in_order()), st.integers(0, 1 << 60))
def test_parsing_an_encoded_extent_header_gives_its_used_slots(
    slots: list[int], offset: int
) -> None:
    extent = parse_extent_header(extent_header(*slots), UUID, offset)
    found = [
        (mask, run.dev_id, run.first_cluster + index)
        for run in extent.runs
        for index, mask in enumerate(run.masks)
    ]
    used = [slot for slot in slots if slot >> 32 & 0xFF]
    assert found == [(slot >> 48, slot >> 32 & 0xFF, slot & 0xFFFFFFFF) for slot in used]
    assert extent.offset == offset
    assert extent.total_bytes == EXTENT_HEADER_BYTES + extent.data_bytes
    at = 0
    for run in extent.runs:
        assert run.data_at == at
        at += run.data_bytes
    assert at == extent.data_bytes
    for before, after in itertools.pairwise(extent.runs):
        assert (before.dev_id, before.first_cluster + before.count) != (
            after.dev_id,
            after.first_cluster,
        )


def test_neighbouring_clusters_are_one_run_also_across_an_empty_slot() -> None:
    slots = [slot_word(1, 3, 7), 0, slot_word(3, 3, 8), slot_word(0, 3, 10), slot_word(0, 4, 11)]
    extent = parse_extent_header(extent_header(*slots), UUID)
    assert extent.runs == (
        ClusterRun(3, 7, (1, 3), 0),
        ClusterRun(3, 10, (0,), 3 * 4096),
        ClusterRun(4, 11, (0,), 3 * 4096),
    )


def test_an_extent_with_all_59_slots_is_read() -> None:
    slots = [slot_word(FULL_MASK, 1, num) for num in range(59)]
    extent = parse_extent_header(extent_header(*slots), UUID)
    assert extent.runs == (ClusterRun(1, 0, (FULL_MASK,) * 59, 0),)
    assert extent.data_bytes == 59 * CLUSTER_BYTES


def test_an_empty_extent_is_read() -> None:
    extent = parse_extent_header(extent_header(), UUID)
    assert extent.runs == ()
    assert extent.total_bytes == EXTENT_HEADER_BYTES


def test_the_reserved_bits_of_a_slot_may_hold_anything() -> None:
    slot = slot_word(1, 2, 3)
    plain = parse_extent_header(extent_header(slot), UUID)
    assert parse_extent_header(extent_header(slot | 0xA5 << 40), UUID) == plain


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_any_buffer_is_parsed(form: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    raw = extent_header(slot_word(1, 2, 3))
    assert parse_extent_header(form(raw + b"more"), UUID) == parse_extent_header(raw, UUID)


def refusal(raw: bytes, offset: int = 777) -> ExtentError:
    with pytest.raises(ExtentError) as caught:
        parse_extent_header(raw, UUID, offset)
    assert caught.value.offset == offset
    return caught.value


@pytest.mark.parametrize("at", range(6))
def test_a_wrong_magic_or_reserved_byte_is_refused_in_the_references_words(at: int) -> None:
    raw = bytearray(extent_header())
    raw[at] ^= 1
    error = refusal(with_md5(raw, MD5_AT))
    assert error.reference_text == "wrong vma extent header magic"


def test_an_extent_of_another_archive_is_refused_in_the_references_words() -> None:
    assert refusal(extent_header(uuid=bytes(16))).reference_text == "wrong vma extent uuid"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (0, "short vma extent - too many blocks"),
        (2, "vma extent error - missing blocks"),
        (65535, "vma extent error - missing blocks"),
    ],
)
def test_a_block_count_that_the_masks_deny_is_refused_in_the_references_words(
    said: int, text: str
) -> None:
    assert refusal(extent_header(slot_word(8, 1, 0), blocks=said)).reference_text == text


def test_the_mask_of_an_empty_slot_does_not_count() -> None:
    assert parse_extent_header(extent_header(slot_word(FULL_MASK, 0, 5)), UUID).data_bytes == 0


@pytest.mark.parametrize("length", [0, 1, 511])
def test_a_short_extent_header_is_refused_in_the_references_words(length: int) -> None:
    error = refusal(extent_header()[:length])
    assert error.reference_text == f"read short extent ({length} bytes)"


def test_every_single_bit_flip_in_an_extent_header_is_noticed() -> None:
    raw = extent_header(slot_word(3, 1, 0), 0, slot_word(0, 2, 9))
    for at in range(len(raw)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << bit
            refusal(bytes(damaged))


def test_the_layout_is_that_of_the_specification() -> None:
    raw = extent_header(slot_word(0x0102, 0x0A, 0x01020304))
    assert raw[:8] == b"VMAE" + b"\0\0" + b"\0\2"
    assert raw[8:24] == UUID
    assert raw[SLOTS_AT : SLOTS_AT + 8] == bytes.fromhex("0102 00 0a 01020304")
    assert raw[SLOTS_AT + 8 :] == bytes(58 * 8)
    assert with_md5(raw, MD5_AT) == raw
    assert struct.calcsize(">4sHH16s16s59Q") == len(raw)
