# SPDX-License-Identifier: Apache-2.0
"""Extents that do not depend on the order in which their clusters come."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vma.archives import Run, disk_image, header, scan
from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_CLUSTERS, FULL_MASK
from vmapipe.vma.groups import WHOLE_FROM_BLOCKS, GroupPacker
from vmapipe.vma.header import Device, Header, encode_header
from vmapipe.vma.packer import PackedExtent
from vmapipe.vma.scanner import ExtentRead

_MASKS = st.sampled_from([0, 0, FULL_MASK, FULL_MASK, 1, 0x7FFF, 0x00FF, 0xF00F, 0x007F])


def _cut(masks: list[int], dev_id: int, chance: random.Random) -> list[Run]:
    runs, at = [], 0
    while at < len(masks):
        stop = at + chance.choice([1, 1, 2, 7, 58, 90])
        runs.append(Run(dev_id, at, tuple(masks[at:stop])))
        at = stop
    return runs


def _packed(
    head: Header, runs: list[Run], hold_bytes: int, *, whole: bool
) -> list[PackedExtent[int]]:
    packer: GroupPacker[int] = GroupPacker(head, hold_bytes, whole=whole)
    extents = []
    for note, run in enumerate(runs):
        memory = memoryview(bytearray(run.payload))
        came = packer.add(run.dev_id, run.first, len(run.masks), run.raw_masks, memory, note)
        notes = [extent.notes[run.dev_id] for extent in came if run.dev_id in extent.notes]
        assert notes == ([note] if any(run.dev_id in e.dev_ids for e in came) else [])
        extents += [e._replace(buffers=[b"".join(e.buffers)]) for e in came]
        memory[:] = bytes(len(memory))  # it is used for something else
        # What is held is within its bound, but for what each part costs.
        assert packer.held_bytes <= hold_bytes
    return extents + packer.flush()


def _archive(head: Header, extents: list[PackedExtent[int]]) -> bytes:
    return encode_header(head) + b"".join(b"".join(e.buffers) for e in extents)


@given(
    first=st.lists(_MASKS, min_size=1, max_size=200),
    second=st.lists(_MASKS, min_size=1, max_size=80),
    seed=st.integers(0, 1 << 32),
    held_clusters=st.integers(0, 150),
    whole=st.booleans(),
)
@settings(max_examples=40)
def test_every_disk_comes_out_whatever_the_order_and_however_little_may_be_held(
    first: list[int], second: list[int], seed: int, held_clusters: int, whole: bool
) -> None:
    masks = {1: first, 2: second}
    devices = [Device(n, f"d{n}", len(m) * CLUSTER_BYTES) for n, m in masks.items()]
    head, chance = header(devices), random.Random(seed)
    runs = [run for n, m in masks.items() for run in _cut(m, n, chance)]
    expected = scan(_archive(head, _packed(head, runs, 1 << 40, whole=False)))
    chance.shuffle(runs)
    events = scan(_archive(head, _packed(head, runs, held_clusters * CLUSTER_BYTES, whole=whole)))
    for device in devices:
        assert disk_image(device, events) == disk_image(device, expected)


@given(masks=st.lists(_MASKS, min_size=1, max_size=200), seed=st.integers(0, 1 << 32))
@settings(max_examples=25)
def test_extent_k_holds_clusters_58k_to_58k_plus_57_as_long_as_all_can_be_held(
    masks: list[int], seed: int
) -> None:
    head, chance = header([Device(1, "d", len(masks) * CLUSTER_BYTES)]), random.Random(seed)
    runs = _cut(masks, 1, chance)
    chance.shuffle(runs)
    events = scan(_archive(head, _packed(head, runs, 1 << 40, whole=True)))
    found = {}
    for event in events:
        if isinstance(event, ExtentRead):
            (run,) = event.extent.runs
            found[run.first_cluster] = run.masks
    assert list(found) == list(range(0, len(masks), EXTENT_CLUSTERS))
    stored = [mask for first in sorted(found) for mask in found[first]]
    assert stored == [
        FULL_MASK if mask.bit_count() >= WHOLE_FROM_BLOCKS and n < len(masks) - 1 else mask
        for n, mask in enumerate(masks)
    ]


def test_a_disk_in_order_is_not_copied() -> None:
    head = header([Device(1, "d", 116 * CLUSTER_BYTES)])
    packer: GroupPacker[None] = GroupPacker(head, whole=True)
    payload = memoryview(bytearray(58 * CLUSTER_BYTES))
    (extent,) = packer.add(1, 0, 58, b"\xff\xff" * 58, payload, None)
    assert extent.buffers[1] is not payload
    assert isinstance(extent.buffers[1], memoryview)
    assert extent.buffers[1].obj is payload.obj


def test_scattered_clusters_that_cannot_be_held_share_extents() -> None:
    head = header([Device(1, "d", 58 * 116 * CLUSTER_BYTES)])
    runs = [Run(1, 58 * group, (FULL_MASK,)) for group in range(116)]
    extents = _packed(head, runs, 58 * CLUSTER_BYTES, whole=True)
    assert len(extents) <= 5, "and not one each"


def test_groups_that_lack_what_was_never_allocated_leave_in_order_and_alike_in_each_backup() -> (
    None
):
    head = header([Device(1, "d", 58 * 40 * CLUSTER_BYTES)])
    extents = []
    for early in (0, 7):
        # The disk in order, but for its zeroes, which come at the end, and what a guest wrote to.
        parts = [Run(1, 58 * group, (FULL_MASK,) * 40) for group in range(40)]
        zeroes = [Run(1, 58 * group + 40, (0,) * 18) for group in range(40)]
        runs = [*parts[30 : 30 + early], *parts[:30], *parts[30 + early :], *zeroes]
        extents.append(_packed(head, runs, 58 * 15 * CLUSTER_BYTES, whole=True))
    one, other = ([e.buffers for e in each if e.clusters[0][3]] for each in extents)
    assert one[:30] == other[:30]


def test_a_machines_memory_is_packed_as_it_comes_and_ends_where_it_ends() -> None:
    head = header([Device(1, "vmstate", 1 << 30)])
    runs = [Run(1, at, (FULL_MASK,) * 10) for at in range(0, 70, 10)]
    extents = _packed(head, runs, 1 << 40, whole=True)
    assert [sum(run[2] for run in extent.clusters) for extent in extents] == [58, 12]
