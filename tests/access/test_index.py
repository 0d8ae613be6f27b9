# SPDX-License-Identifier: Apache-2.0
"""The index: every cluster is found where it is, whatever the order of the archive."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.archives import UUID
from vmapipe.access.index import (
    ArchiveIndex,
    IndexBuilder,
    decode_index,
    encode_index,
)
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_HEADER_BYTES, FULL_MASK
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device, Header

CLUSTERS = 40
HEADER = Header(
    UUID,
    1,
    (
        Device(1, "a", CLUSTERS * CLUSTER_BYTES - 5),
        Device(2, "b", CLUSTERS * CLUSTER_BYTES),
        Device(3, "vmstate", 7 * CLUSTER_BYTES),
    ),
    (),
)
Slot = tuple[int, int, int]

masks = st.sampled_from([0, 0, FULL_MASK, FULL_MASK, 1, 0x8001, 0x00F0])
slots = st.lists(st.tuples(st.integers(1, 3), st.integers(0, CLUSTERS + 2), masks), max_size=90)


def extents(listed: list[Slot], per_extent: int) -> list[Extent]:
    """As an archive has them, each slot a run of its own or joined with its neighbour."""
    made = []
    offset = 12288
    for at in range(0, len(listed), per_extent):
        runs: list[ClusterRun] = []
        data_at = 0
        for dev_id, cluster, mask in listed[at : at + per_extent]:
            last = runs[-1] if runs else None
            if last and last.dev_id == dev_id and last.first_cluster + last.count == cluster:
                runs[-1] = last._replace(masks=(*last.masks, mask))
            else:
                runs.append(ClusterRun(dev_id, cluster, (mask,), data_at))
            data_at += mask.bit_count() * BLOCK_BYTES
        made.append(Extent(offset, data_at, tuple(runs)))
        offset += EXTENT_HEADER_BYTES + data_at
    return made


def model(made: list[Extent]) -> tuple[dict[tuple[int, int], list[tuple[int, int, int]]], int]:
    """Where each cluster is, the plain way: (extent offset, data offset, mask) of each copy."""
    where: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for extent in made:
        for run in extent.runs:
            data_at = run.data_at
            for number, mask in enumerate(run.masks, start=run.first_cluster):
                where.setdefault((run.dev_id, number), []).append((extent.offset, data_at, mask))
                data_at += mask.bit_count() * BLOCK_BYTES
    return where, len(made)


def built(made: list[Extent]) -> tuple[ArchiveIndex, IndexBuilder]:
    builder = IndexBuilder(HEADER)
    for extent in made:
        builder.add(extent)
    return builder.finish(), builder


def check(index: ArchiveIndex, made: list[Extent]) -> None:
    where, _ = model(made)
    for dev_id, disk in index.disks.items():
        for cluster in range(CLUSTERS):
            place = disk.find(cluster)
            assert place.first <= cluster < place.end
            copies = where.get((dev_id, cluster), [])
            if len(copies) != 1:
                assert place.is_missing
            elif not copies[0][2]:
                assert place.is_zero
            else:
                offset, data_at, mask = copies[0]
                assert index.offsets[place.extent] == offset
                assert (place.block_of(cluster) * BLOCK_BYTES, place.mask) == (data_at, mask)


@given(slots, st.integers(1, 59))
def test_every_cluster_is_found_where_it_is_and_one_that_comes_twice_is_missing(
    listed: list[Slot], per_extent: int
) -> None:
    made = extents(listed, per_extent)
    index, builder = built(made)
    assert set(index.disks) == {1, 2, 3}
    check(index, made)
    where, _ = model(made)
    for dev_id in (1, 2):
        twice = [n for (d, n), copies in where.items() if d == dev_id and len(copies) > 1]
        twice = [number for number in twice if number < CLUSTERS]
        assert builder.double.get(dev_id) == (min(twice) if twice else None)


@given(slots, st.integers(1, 59))
def test_an_index_from_a_file_is_the_one_that_was_written(
    listed: list[Slot], per_extent: int
) -> None:
    made = extents(listed, per_extent)
    index, _ = built(made)
    read = decode_index(encode_index(index), HEADER)
    assert read is not None
    check(read, made)
    assert (read.offsets, read.sizes) == (index.offsets, index.sizes)


@given(slots, st.integers(0, 1 << 20), st.integers(0, 255))
def test_a_changed_index_file_is_refused_or_leads_nowhere_beyond_what_there_is(
    listed: list[Slot], at: int, value: int
) -> None:
    raw = bytearray(encode_index(built(extents(listed, 58))[0]))
    raw[at % len(raw)] = value
    index = decode_index(bytes(raw), HEADER)
    if index is not None:
        for disk in index.disks.values():
            places = [disk.find(cluster) for cluster in range(CLUSTERS)]
            assert all(place.extent < len(index.offsets) for place in places)


@given(slots, st.integers(0, 400))
def test_a_cut_index_file_is_refused(listed: list[Slot], cut: int) -> None:
    raw = encode_index(built(extents(listed, 58))[0])
    assert decode_index(raw[: max(0, len(raw) - 1 - cut)], HEADER) is None


@given(slots, st.integers(1, 59))
def test_an_index_agrees_with_the_headers_that_it_was_made_of(
    listed: list[Slot], per_extent: int
) -> None:
    once = list(
        {
            (dev_id, cluster): (dev_id, cluster, mask)
            for dev_id, cluster, mask in listed
            if cluster < CLUSTERS
        }.values()
    )
    made = extents(once, per_extent)
    index, _ = built(made)
    with_data = [extent for extent in made if extent.data_bytes]
    for number, extent in enumerate(with_data):
        assert index.agrees_with(number, extent)


def test_an_index_that_points_elsewhere_does_not_agree() -> None:
    made = extents([(1, 0, FULL_MASK), (1, 1, FULL_MASK)], 59)
    index, _ = built(made)
    for wrong in (
        ClusterRun(1, 1, (FULL_MASK, FULL_MASK), 0),
        ClusterRun(1, 0, (FULL_MASK, 1), 0),
        ClusterRun(1, 0, (0, FULL_MASK), 0),
        ClusterRun(1, 0, (FULL_MASK, FULL_MASK), 4096),
        ClusterRun(2, 0, (FULL_MASK, FULL_MASK), 0),
    ):
        assert not index.agrees_with(0, made[0]._replace(runs=(wrong,)))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_tib_of_holes_takes_less_than_a_mib(shuffled: bool) -> None:
    clusters = (1 << 40) // CLUSTER_BYTES
    header = Header(UUID, 1, (Device(1, "a", 1 << 40),), ())
    starts = list(range(0, clusters, 58))
    if shuffled:
        random.Random(1).shuffle(starts)
    builder = IndexBuilder(header)
    for number, first in enumerate(starts):
        masks = (0,) * min(58, clusters - first)
        data = 0
        if number % 5000 == 7:
            masks, data = (FULL_MASK, *masks[1:]), CLUSTER_BYTES
        builder.add(Extent(12288 + number * 512, data, (ClusterRun(1, first, masks, 0),)))
    index = builder.finish()
    assert not index.disks[1].missing()
    assert len(encode_index(index)) < 1 << 20
