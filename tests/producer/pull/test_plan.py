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
from vmapipe.producer.pull_plan import (
    Content,
    ExportExtent,
    Layout,
    PullPiece,
    PullPlan,
    extents_told,
)
from vmapipe.producer.runs import Run
from vmapipe.protocol import limits

SECTOR = 512
UNCHANGED = {Content.UNCHANGED}
FRAMES = st.sampled_from([limits.MIN_FRAME_CHARGE, 200_000, 1 << 20, 8 << 20])


@st.composite
def exports(draw: st.DrawFn) -> tuple[bytes, list[ExportExtent]]:
    """A disk's bytes, and what a server says of them: never less data than there is."""
    size = draw(st.integers(1, 150 * CLUSTER_BYTES // SECTOR)) * SECTOR + draw(st.integers(0, 1))
    cuts = draw(st.lists(st.integers(0, size // SECTOR), max_size=12))
    places = sorted({0, size, *(cut * SECTOR for cut in cuts)})
    chance = random.Random(draw(st.integers(0, 9)))
    disk, extents = bytearray(size), []
    for start, end in pairwise(places):
        content = draw(st.sampled_from(Content))
        extents.append(ExportExtent(start, end, content))
        # Else they are zeroes that are called data.
        if content is not Content.ZERO and draw(st.booleans()):
            disk[start:end] = chance.randbytes(end - start)
    return bytes(disk), extents


def answer(extents: list[ExportExtent], at: int, most: int) -> Iterator[ExportExtent]:
    """What a server says that tells of `most` extents at once."""
    told = 0
    for start, end, content in extents:
        if end > at and told < most:
            yield ExportExtent(max(start, at), end, content)
            told += 1


def pulled(
    disk: bytes, extents: list[ExportExtent], frame_bytes: int, limited: int, chance: random.Random
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
    export: tuple[bytes, list[ExportExtent]], frame_bytes: int, limited: int, chance: random.Random
) -> None:
    """What is unchanged comes from the base, which has the same bytes there."""
    disk, extents = export
    limited = min(limited, frame_bytes)
    found = bytearray()
    next_cluster = 0
    for piece, run, data in pulled(disk, extents, frame_bytes, limited, chance):
        if piece.is_unchanged:
            start = run.first_cluster * CLUSTER_BYTES
            found += disk[start : start + run.clusters * CLUSTER_BYTES]
            found += bytes(-len(found) % CLUSTER_BYTES)
            next_cluster += run.clusters
            continue
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
    export: tuple[bytes, list[ExportExtent]], frame_bytes: int, chance: random.Random
) -> None:
    """So are those that are partly one thing and partly another."""
    disk, extents = export
    contents: dict[int, set[Content]] = {}
    for start, end, content in extents:
        for cluster in range(start // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)):
            contents.setdefault(cluster, set()).add(content)
    wanted = {c for c, found in contents.items() if found not in ({Content.ZERO}, UNCHANGED)}
    read: list[tuple[int, int]] = []
    unchanged = set[int]()
    for piece, run, _ in pulled(disk, extents, frame_bytes, frame_bytes, chance):
        if piece.is_unchanged:
            assert not run.length
            unchanged.update(range(run.first_cluster, run.first_cluster + run.clusters))
        read += [(r.offset, r.length) for r in piece.requests(4096)]
    assert {offset // CLUSTER_BYTES for offset, _ in read} == wanted
    assert unchanged == {c for c, found in contents.items() if found == UNCHANGED}
    assert all(a + length <= b for (a, length), (b, _) in pairwise(read))
    whole = sum(min(CLUSTER_BYTES, len(disk) - c * CLUSTER_BYTES) for c in wanted)
    assert sum(length for _, length in read) == whole


@pytest.mark.parametrize("minimum", [512, 4096, 65536])
@given(export=exports())
def test_requests_keep_to_the_servers_block_size(
    minimum: int, export: tuple[bytes, list[ExportExtent]]
) -> None:
    disk, extents = export
    size = -(-len(disk) // minimum) * minimum
    extents = (
        [*extents, ExportExtent(len(disk), size, Content.DATA)] if size > len(disk) else extents
    )
    disk = disk.ljust(size, b"\0")
    for piece, _, _ in pulled(disk, extents, 8 << 20, 8 << 20, random.Random(1)):
        for offset, length, _ in piece.requests(max(minimum, 4096)):
            assert not offset % minimum
            assert not length % minimum


def test_a_dense_disk_is_cut_where_the_archives_extents_end() -> None:
    size = 3 * EXTENT_CLUSTERS * CLUSTER_BYTES
    plan = PullPlan(size, 8 << 20)
    plan.layout.question()
    plan.layout.tell([ExportExtent(0, size, Content.DATA)])
    pieces = [plan.next_piece(8 << 20) for _ in range(3)]
    assert [piece and piece.clusters for piece in pieces] == [EXTENT_CLUSTERS] * 3
    assert plan.ended


def test_a_terabyte_without_data_is_a_few_pieces_and_no_read() -> None:
    size = 1 << 40
    plan = PullPlan(size, 16 << 20)
    plan.layout.question()
    plan.layout.tell([ExportExtent(0, size, Content.ZERO)])
    pieces = []
    while not plan.ended:
        piece = plan.next_piece(16 << 20)
        assert piece is not None
        pieces.append(piece)
    assert len(pieces) < 20
    assert not any(piece.data_bytes for piece in pieces)


def test_of_a_million_extents_only_those_that_are_needed_are_looked_at() -> None:
    looked = 0

    def many() -> Iterator[ExportExtent]:
        nonlocal looked
        for n in range(1_000_000):
            looked += 1
            content = Content.ZERO if n % 256 else Content.DATA
            yield ExportExtent(n * SECTOR, (n + 1) * SECTOR, content)

    layout = Layout(1_000_000 * SECTOR)
    layout.question()
    layout.tell(many())
    assert layout.knows(10)
    assert looked == 10 * CLUSTER_BYTES // SECTOR + 1
    assert layout.question() is None


TOLD = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=9)


@given(TOLD, TOLD)
def test_two_contexts_are_told_together_as_far_as_both_reach(
    allocation: list[tuple[int, int]], dirty: list[tuple[int, int]]
) -> None:
    """A bitmap knows bit 0 (dirty) and base:allocation bit 1 (zero)."""

    def flags_at(extents: list[tuple[int, int]]) -> list[int]:
        return [flags for length, flags in extents for _ in range(length)]

    wanted = [
        Content.UNCHANGED if not changed & 1 else Content.ZERO if flags & 2 else Content.DATA
        for flags, changed in zip(flags_at(allocation), flags_at(dirty), strict=False)
    ]
    found, at = list[Content](), 7
    for start, end, content in extents_told(7, allocation, dirty):
        assert start == at < end
        found += [content] * (end - start)
        at = end
    assert found == wanted


def test_a_terabyte_of_which_a_cluster_has_changed_is_a_few_pieces_and_one_read() -> None:
    size, changed = 1 << 40, (1 << 39) + 5 * CLUSTER_BYTES
    plan = PullPlan(size, 16 << 20)
    plan.layout.question()
    dirty = [(changed, 0), (CLUSTER_BYTES, 1), (size - changed - CLUSTER_BYTES, 0)]
    plan.layout.tell(extents_told(0, None, dirty))
    pieces = []
    while not plan.ended:
        piece = plan.next_piece(16 << 20)
        assert piece is not None
        pieces.append(piece)
    assert len(pieces) < 20
    assert [piece.data_bytes for piece in pieces if not piece.is_unchanged] == [CLUSTER_BYTES]
