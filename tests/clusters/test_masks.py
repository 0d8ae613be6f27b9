# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.clusters.masks import cluster_masks, collect, compact, is_zero, nonzero_pieces

BLOCK = 4096
CLUSTER = 65536
MIB = 1 << 20

# A block is zero, or not zero in one place only: its first, last or any byte.
a_block = st.one_of(
    st.just(None), st.just(None), st.just(0), st.just(BLOCK - 1), st.integers(0, BLOCK - 1)
)


@st.composite
def disks(draw: st.DrawFn) -> bytearray:
    """Some blocks, mostly zero, mostly full, or mixed; the last cluster may be partial."""
    count = draw(st.integers(0, 100))
    kind = draw(st.sampled_from(["mixed", "zero", "full", "one"]))
    if kind == "mixed":
        places = draw(st.lists(a_block, min_size=count, max_size=count))
    else:
        places = [0 if kind == "full" else None] * count
        if kind == "one" and count:
            places[draw(st.integers(0, count - 1))] = draw(st.integers(0, BLOCK - 1))
    data = bytearray(count * BLOCK)
    for block, place in enumerate(places):
        if place is not None:
            data[block * BLOCK + place] = 1 + (block & 0x7F)
    return data


def naive_masks(data: bytes | bytearray) -> list[int]:
    masks = [0] * -(-len(data) // CLUSTER)
    for at in range(0, len(data), BLOCK):
        if any(data[at : at + BLOCK]):
            masks[at // CLUSTER] |= 1 << at % CLUSTER // BLOCK
    return masks


def as_numbers(masks: bytes) -> list[int]:
    return [int.from_bytes(masks[at : at + 2], "big") for at in range(0, len(masks), 2)]


@given(disks(), st.sampled_from([bytes, bytearray, memoryview]), st.integers(0, 3))
@settings(max_examples=60)
def test_the_masks_tell_which_blocks_are_not_zero(
    disk: bytearray, form: type[bytes] | type[bytearray] | type[memoryview], behind: int
) -> None:
    # What stands behind the length does not count.
    data = form(disk + b"\xff" * (behind * 1000))
    masks = cluster_masks(data, len(disk))
    expected = naive_masks(disk)
    assert as_numbers(masks) == (expected if any(expected) else [])


@given(disks(), st.sampled_from([bytes, bytearray, memoryview]))
@settings(max_examples=60)
def test_what_is_collected_are_the_blocks_that_are_not_zero(
    disk: bytearray, form: type[bytes] | type[bytearray] | type[memoryview]
) -> None:
    data = form(disk)
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    masks = cluster_masks(data, len(data))
    assert bytes(collect(data, masks)) == b"".join(block for block in blocks if any(block))


@given(disks())
@settings(max_examples=60)
def test_compacting_moves_the_blocks_that_are_not_zero_to_the_front(disk: bytearray) -> None:
    masks = cluster_masks(disk, len(disk))
    blocks = bytes(collect(bytes(disk), masks))
    length = compact(memoryview(disk), masks)
    assert length == len(blocks)
    assert disk[:length] == blocks


@given(st.binary(max_size=40).filter(lambda raw: len(raw) % 2 == 0))
@settings(max_examples=200)
def test_nonzero_pieces_are_the_set_bits_merged(masks: bytes) -> None:
    pieces = nonzero_pieces(masks)
    blocks = [at // BLOCK for start, n in pieces for at in range(start, start + n, BLOCK)]
    assert blocks == [
        16 * cluster + bit
        for cluster, mask in enumerate(as_numbers(masks))
        for bit in range(16)
        if mask >> bit & 1
    ]
    ends = [start + length for start, length in pieces]
    assert all(end < following for end, (following, _) in zip(ends, pieces[1:], strict=False))


def test_blocks_that_lie_together_are_not_copied() -> None:
    data = bytearray(b"\1" * 3 * CLUSTER)
    payload = collect(data, cluster_masks(data, len(data)))
    assert isinstance(payload, memoryview)
    assert payload.obj is data
    payload.release()


@pytest.mark.parametrize(
    "length", [0, 1, BLOCK, CLUSTER - 1, CLUSTER, CLUSTER + 1, 3 * CLUSTER + BLOCK, MIB + 12345]
)
def test_one_byte_anywhere_makes_a_piece_not_zero(length: int) -> None:
    data = bytearray(length)
    assert is_zero(data, length)
    assert is_zero(bytes(data), length)
    for at in {0, length // 2, length - 1, CLUSTER - 1, CLUSTER, 2 * CLUSTER, MIB} & set(
        range(length)
    ):
        data[at] = 1
        assert not is_zero(data, length)
        assert is_zero(data, at)
        data[at] = 0


def test_bytes_behind_the_length_do_not_make_it_not_zero() -> None:
    assert is_zero(bytes(MIB) + b"\1", MIB)
    assert cluster_masks(bytes(MIB) + b"\1", MIB) == b""


def test_nothing_has_no_masks_and_no_data() -> None:
    assert cluster_masks(b"", 0) == b""
    assert bytes(collect(b"", b"")) == b""


@pytest.mark.parametrize("blocks", range(1, 17))
def test_a_partial_last_cluster_has_only_the_bits_it_has_blocks(blocks: int) -> None:
    length = CLUSTER + blocks * BLOCK
    assert as_numbers(cluster_masks(b"\1" * length, length)) == [0xFFFF, (1 << blocks) - 1]
