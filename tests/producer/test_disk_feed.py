# SPDX-License-Identifier: Apache-2.0
"""A disk cut into runs: put together again it is the same disk."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from tests.producer.memorydisk import MemoryDisk, cut
from vmapipe.clusters.masks import nonzero_pieces
from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_CLUSTERS
from vmapipe.producer.runs import Run
from vmapipe.producer.source import Segment
from vmapipe.protocol import limits

MEMORY = memoryview(bytearray(limits.MAX_PAYLOAD_BYTES))


def put_together(disk: MemoryDisk, frame_bytes: int) -> tuple[bytes, list[Run]]:
    image = bytearray(disk.size_bytes)
    seen: list[Run] = []
    for run in cut(disk, MEMORY, frame_bytes):
        assert limits.charge(run.clusters, run.length) <= frame_bytes
        seen.append(run)
        at = 0
        for offset, length in nonzero_pieces(run.masks):
            start = run.first_cluster * CLUSTER_BYTES + offset
            piece = MEMORY[run.position + at : run.position + at + length]
            image[start : start + length] = piece[: disk.size_bytes - start]
            at += length
        assert at == run.length
    return bytes(image[: disk.size_bytes]), seen


@st.composite
def disks(draw: st.DrawFn) -> MemoryDisk:
    """A string a cluster: `0` zero, `A` full, `p` one block, `h` a hole, `P` all but one block."""
    pattern = draw(st.text("0ApPh", min_size=1, max_size=40))
    tail = draw(st.integers(1, CLUSTER_BYTES))
    clusters = {
        "0": bytes(CLUSTER_BYTES),
        "h": bytes(CLUSTER_BYTES),
        "A": b"A" * CLUSTER_BYTES,
        "p": bytes(5 * 4096 + 17) + b"p" + bytes(CLUSTER_BYTES - 5 * 4096 - 18),
        "P": b"P" * 4096 + bytes(4096) + b"P" * (CLUSTER_BYTES - 8192),
    }
    data = b"".join(clusters[letter] for letter in pattern)
    data = data[: len(data) - CLUSTER_BYTES + tail]
    holes = frozenset(index for index, letter in enumerate(pattern) if letter == "h")
    return MemoryDisk(data, holes)


@given(disks(), st.sampled_from([limits.charge(1, CLUSTER_BYTES), 200_000, 1 << 20, 8 << 20]))
def test_the_runs_of_a_disk_put_together_are_the_disk(disk: MemoryDisk, frame_bytes: int) -> None:
    image, seen = put_together(disk, frame_bytes)
    assert image == disk.data
    covered = [run.first_cluster + i for run in seen for i in range(run.clusters)]
    assert covered == list(range(-(-disk.size_bytes // CLUSTER_BYTES)))


@given(disks())
def test_holes_are_never_read(disk: MemoryDisk) -> None:
    put_together(disk, 8 << 20)
    assert not disk.read & disk.holes


def test_neighbouring_zero_clusters_become_one_run_whether_holes_or_read() -> None:
    disk = MemoryDisk(bytes(100 * CLUSTER_BYTES), frozenset(range(30, 60)))
    _, seen = put_together(disk, 8 << 20)
    assert [(run.first_cluster, run.clusters, run.masks) for run in seen] == [(0, 100, b"")]


def test_a_huge_hole_is_cut_at_the_longest_run_of_the_wire() -> None:
    class HugeHole(MemoryDisk):
        def segments(self) -> Iterator[Segment]:
            yield Segment(0, self.size_bytes, is_data=False)

    disk = HugeHole(b"")
    clusters = 3 * limits.MAX_RUN_CLUSTERS + 5
    disk.size_bytes = clusters * CLUSTER_BYTES
    lengths = [run.clusters for run in cut(disk, MEMORY, 16 << 20)]
    assert lengths == [limits.MAX_RUN_CLUSTERS] * 3 + [5]


def test_a_run_that_was_begun_before_steps_became_small_is_ended() -> None:
    steps = iter([32 * CLUSTER_BYTES] * 3 + [CLUSTER_BYTES] * 100)
    disk = MemoryDisk(b"A" * (20 * CLUSTER_BYTES))
    made = cut(disk, MEMORY, 8 << 20, lambda: next(steps))
    assert [run.clusters for run in made] == [4] + [1] * 16


def test_zeroes_go_with_the_data_beside_them_and_runs_end_where_extents_do() -> None:
    extent = EXTENT_CLUSTERS
    data = {1, extent + 3, 5 * extent + 2}
    pieces = [(b"A" if i in data else b"\0") * CLUSTER_BYTES for i in range(6 * extent)]
    _, seen = put_together(MemoryDisk(b"".join(pieces)), 8 << 20)
    assert [(run.first_cluster, run.clusters, bool(run.masks)) for run in seen] == [
        (0, 4 * extent, True),
        (4 * extent, extent, False),
        (5 * extent, extent, True),
    ]
    assert sum(run.zero_clusters for run in seen) == 6 * extent - len(data)
