# SPDX-License-Identifier: Apache-2.0
"""The order of a disk, out of any order: against a model of the disks themselves."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.archives import split_cluster
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, FULL_MASK, MAX_DEVICE_BYTES
from vmapipe.places.ordering import DiskRun, Ordering, normal, pieces
from vmapipe.vma.header import Device

# A letter a cluster: zeroes, full of data, one block of data.
_DISKS = st.lists(st.text("0Ap", min_size=1, max_size=12), min_size=1, max_size=3)


def _disk(letters: str, seed: int) -> bytes:
    chance = Random(seed)
    made = {"0": bytes(CLUSTER_BYTES), "p": bytes(4096) + b"p" + bytes(CLUSTER_BYTES - 4097)}
    return b"".join(made.get(each) or chance.randbytes(CLUSTER_BYTES) for each in letters)


class _Kept:
    """What was kept, all of it in one piece."""

    def __init__(self) -> None:
        self.data = bytearray()

    def keep(self, data: memoryview, at: int) -> int:
        self.data += data
        return len(self.data) - len(data)

    def recall(self, place: int, length: int) -> memoryview:
        return memoryview(bytes(self.data[place : place + length]))


def _cluster(dev_id: int, disk: bytes, number: int) -> DiskRun:
    mask, stored = split_cluster(disk, number)
    masks = struct.pack(">H", mask) if mask else b""
    return DiskRun(dev_id, number, 1, masks, memoryview(stored))


def _bytes_of(run: DiskRun) -> bytes:
    """What a reader makes of the run."""
    if not run.masks:
        return bytes(run.clusters * CLUSTER_BYTES)
    found, at = bytearray(run.clusters * CLUSTER_BYTES), 0
    for number, mask in enumerate(struct.unpack(f">{run.clusters}H", run.masks)):
        for bit in range(16):
            if mask >> bit & 1:
                place = number * CLUSTER_BYTES + bit * BLOCK_BYTES
                found[place : place + BLOCK_BYTES] = run.data[at : at + BLOCK_BYTES]
                at += BLOCK_BYTES
    assert at == len(run.data)
    return bytes(found)


@settings(max_examples=40)
@given(_DISKS, st.randoms(use_true_random=False))
def test_clusters_in_any_order_come_out_disk_after_disk_in_order(
    letters: list[str], chance: Random
) -> None:
    disks = {number: _disk(each, number) for number, each in enumerate(letters, 1)}
    devices = [Device(number, f"d{number}", len(disk)) for number, disk in disks.items()]
    todo = [(n, c) for n, disk in disks.items() for c in range(len(disk) // CLUSTER_BYTES)]
    chance.shuffle(todo)
    kept = _Kept()
    ordering = Ordering(devices, kept.keep, kept.recall)
    came: list[DiskRun] = []
    for dev_id, number in todo:
        came += ordering.add(_cluster(dev_id, disks[dev_id], number), 0)
    came += ordering.finish()
    assert [run.dev_id for run in came] == sorted(run.dev_id for run in came)
    for dev_id, disk in disks.items():
        runs = [run for run in came if run.dev_id == dev_id]
        assert b"".join(map(_bytes_of, runs)) == disk
        assert [run.first for run in runs] == sorted(run.first for run in runs)


def test_what_is_in_order_is_kept_nowhere_and_memory_comes_last() -> None:
    devices = [Device(1, "vmstate", 9), Device(2, "d", 3 * CLUSTER_BYTES)]
    kept = _Kept()
    ordering = Ordering(devices, kept.keep, kept.recall)
    disk = _disk("AAA", 1)
    first = [run for n in range(3) for run in ordering.add(_cluster(2, disk, n), 0)]
    assert (len(first), bytes(kept.data)) == (3, b"")
    memory = [run for n in range(2) for run in ordering.add(_cluster(1, disk, n), 0)]
    assert (len(memory), bytes(kept.data)) == (2, b"")
    assert list(ordering.finish()) == []


def test_a_hole_of_a_tebibyte_that_comes_too_early_takes_one_place() -> None:
    clusters = (1 << 40) // CLUSTER_BYTES
    devices = [Device(1, "a", CLUSTER_BYTES), Device(2, "b", 1 << 40)]
    kept = _Kept()
    ordering = Ordering(devices, kept.keep, kept.recall)
    for at in range(0, clusters, 1 << 14):
        assert not list(ordering.add(DiskRun(2, at, 1 << 14, b"", memoryview(b"")), 0))
    _, hole = ordering.add(_cluster(1, _disk("A", 1), 0), 0)
    assert (hole.first, hole.clusters) == (0, clusters)
    parts = list(pieces(hole))
    assert sum(part.clusters for part in parts) == clusters
    assert max(part.clusters for part in parts) <= 1 << 20


def _runs() -> Iterator[tuple[DiskRun, int]]:
    whole = bytearray(_disk("A", 3))
    whole[BLOCK_BYTES : 2 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    yield DiskRun(1, 0, 1, b"\xff\xff", memoryview(bytes(whole))), MAX_DEVICE_BYTES
    yield DiskRun(1, 0, 1, b"\xff\xff", memoryview(bytes(CLUSTER_BYTES))), MAX_DEVICE_BYTES
    yield DiskRun(1, 0, 1, b"\xff\xff", memoryview(_disk("A", 4))), 3 * BLOCK_BYTES + 5
    yield (
        DiskRun(1, 0, 1, b"\x00\x06", memoryview(_disk("A", 5)[: 2 * BLOCK_BYTES])),
        BLOCK_BYTES + 1,
    )
    yield (
        DiskRun(1, 0, 2, b"\x00\x00\x00\x03", memoryview(_disk("A", 5)[: 2 * BLOCK_BYTES])),
        1 << 30,
    )


def test_no_zero_block_stays_and_nothing_behind_the_end_and_the_disk_is_the_same() -> None:
    for run, size_bytes in _runs():
        found = normal(run, size_bytes)
        assert _bytes_of(found)[:size_bytes] == _bytes_of(run)[:size_bytes]
        assert not any(_bytes_of(found)[size_bytes:])
        words = struct.unpack(f">{len(found.masks) // 2}H", found.masks)
        for number, mask in enumerate(words):
            disk = _bytes_of(found)[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES]
            assert mask == split_cluster(disk, 0)[0]
        assert normal(found, size_bytes) == found
    full = DiskRun(1, 0, 1, FULL_MASK.to_bytes(2, "big"), memoryview(_disk("A", 6)))
    assert normal(full, CLUSTER_BYTES) is full
