# SPDX-License-Identifier: Apache-2.0
"""The plan of a pull: for any export, told in any pieces and answered in any order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_CLUSTERS
from vmapipe.producer.pull_plan import DataExtent, Layout, PullPiece, PullPlan
from vmapipe.producer.runs import Run
from vmapipe.protocol import limits

SECTOR = 512
FRAMES = st.sampled_from([limits.MIN_FRAME_CHARGE, 200_000, 1 << 20, 8 << 20])


@st.composite
def exports(draw: st.DrawFn) -> tuple[bytes, list[DataExtent]]:
    """A disk's bytes, and where a server says that it has data: never less than there is."""
    size = draw(st.integers(1, 150 * CLUSTER_BYTES // SECTOR)) * SECTOR + draw(st.integers(0, 1))
    cuts = draw(st.lists(st.integers(0, size // SECTOR), max_size=12))
    places = sorted({0, size, *(cut * SECTOR for cut in cuts)})
    chance = random.Random(draw(st.integers(0, 9)))
    disk, extents = bytearray(size), []
    for start, end in pairwise(places):
        is_data = draw(st.booleans())
        extents.append(DataExtent(start, end, is_data))
        if is_data and draw(st.booleans()):  # else they are zeroes that are called data
            disk[start:end] = chance.randbytes(end - start)
    return bytes(disk), extents


def answer(extents: list[DataExtent], at: int, most: int) -> Iterator[DataExtent]:
    """What a server says that tells of `most` extents at once."""
    told = 0
    for start, end, is_data in extents:
        if end > at and told < most:
            yield DataExtent(max(start, at), end, is_data)
            told += 1


def pulled(
    disk: bytes, extents: list[DataExtent], frame_bytes: int, limited: int, chance: random.Random
) -> Iterator[tuple[PullPiece, Run, bytes]]:
    """Carry a plan out, each piece in memory of its own; the answers of a piece come in any order."""
    plan = PullPlan(len(disk), frame_bytes)
    while not plan.ended:
        piece = plan.next_piece(limited)
        if piece is None:
            question = plan.layout.question()
            assert question is not None, "nothing to do, and nothing to ask"
            offset, length = question
            assert 0 < length <= len(disk) - offset
            plan.layout.tell(answer(extents, offset, chance.choice([1, 2, 99])))
            continue
        memory = memoryview(bytearray(piece.data_bytes + 2 * BLOCK_BYTES))
        piece.position = BLOCK_BYTES
        requests = list(piece.requests(chance.choice([SECTOR, 4096, 1 << 18])))
        chance.shuffle(requests)
        for offset, length, position in requests:
            assert not piece.is_complete
            memory[position : position + length] = disk[offset : offset + length]
            piece.came(length)
        assert piece.is_complete
        run = piece.run(memory)
        yield piece, run, bytes(memory[run.position : run.position + run.length])


@given(exports(), FRAMES, FRAMES, st.randoms(use_true_random=False))
def test_the_runs_are_the_disk_whatever_is_told_and_in_whatever_order_it_comes(
    export: tuple[bytes, list[DataExtent]], frame_bytes: int, limited: int, chance: random.Random
) -> None:
    disk, extents = export
    limited = min(limited, frame_bytes)
    found = bytearray()
    next_cluster = 0
    for _, run, data in pulled(disk, extents, frame_bytes, limited, chance):
        assert run.first_cluster == next_cluster, "a gap, or an overlap"
        assert limits.charge(run.clusters, run.length) <= frame_bytes
        next_cluster += run.clusters
        at = 0
        for index in range(run.clusters):
            mask = int.from_bytes(run.masks[2 * index : 2 * index + 2], "big")
            for block in range(16):
                there = bool(mask >> block & 1)
                found += data[at : at + BLOCK_BYTES] if there else bytes(BLOCK_BYTES)
                at += BLOCK_BYTES if there else 0
        assert at == len(data)
    assert found[: len(disk)] == disk
    assert not any(found[len(disk) :])
    assert len(found) == -(-len(disk) // CLUSTER_BYTES) * CLUSTER_BYTES


@given(exports(), FRAMES, st.randoms(use_true_random=False))
def test_only_clusters_with_data_are_read_and_each_of_their_bytes_once(
    export: tuple[bytes, list[DataExtent]], frame_bytes: int, chance: random.Random
) -> None:
    disk, extents = export
    wanted = set[int]()
    for start, end, is_data in extents:
        if is_data:
            wanted.update(range(start // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)))
    read: list[tuple[int, int]] = []
    for piece, _, _ in pulled(disk, extents, frame_bytes, frame_bytes, chance):
        read += [(r.offset, r.length) for r in piece.requests(4096)]
    assert {offset // CLUSTER_BYTES for offset, _ in read} == wanted
    assert all(a + length <= b for (a, length), (b, _) in pairwise(read))
    whole = sum(min(CLUSTER_BYTES, len(disk) - c * CLUSTER_BYTES) for c in wanted)
    assert sum(length for _, length in read) == whole


@pytest.mark.parametrize("minimum", [512, 4096, 65536])
@given(export=exports())
def test_requests_keep_to_the_servers_block_size(
    minimum: int, export: tuple[bytes, list[DataExtent]]
) -> None:
    disk, extents = export
    size = -(-len(disk) // minimum) * minimum
    extents = [*extents, DataExtent(len(disk), size, True)] if size > len(disk) else extents
    disk = disk.ljust(size, b"\0")
    for piece, _, _ in pulled(disk, extents, 8 << 20, 8 << 20, random.Random(1)):
        for offset, length, _ in piece.requests(max(minimum, 4096)):
            assert not offset % minimum
            assert not length % minimum


def test_a_dense_disk_is_cut_where_the_archives_extents_end() -> None:
    size = 3 * EXTENT_CLUSTERS * CLUSTER_BYTES
    plan = PullPlan(size, 8 << 20)
    plan.layout.question()
    plan.layout.tell([DataExtent(0, size, True)])
    pieces = [plan.next_piece(8 << 20) for _ in range(3)]
    assert [piece and piece.clusters for piece in pieces] == [EXTENT_CLUSTERS] * 3
    assert plan.ended


def test_a_terabyte_without_data_is_a_few_pieces_and_no_read() -> None:
    size = 1 << 40
    plan = PullPlan(size, 16 << 20)
    plan.layout.question()
    plan.layout.tell([DataExtent(0, size, False)])
    pieces = []
    while not plan.ended:
        piece = plan.next_piece(16 << 20)
        assert piece is not None
        pieces.append(piece)
    assert len(pieces) < 20
    assert not any(piece.data_bytes for piece in pieces)


def test_of_a_million_extents_only_those_that_are_needed_are_looked_at() -> None:
    looked = 0

    def many() -> Iterator[DataExtent]:
        nonlocal looked
        for n in range(1_000_000):
            looked += 1
            yield DataExtent(n * SECTOR, (n + 1) * SECTOR, n % 256 == 0)

    layout = Layout(1_000_000 * SECTOR)
    layout.question()
    layout.tell(many())
    assert layout.knows(10)
    assert looked == 10 * CLUSTER_BYTES // SECTOR + 1
    assert layout.question() is None
