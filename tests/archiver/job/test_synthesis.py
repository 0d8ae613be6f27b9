# SPDX-License-Identifier: Apache-2.0
"""The synthesis against a model: a dict of clusters. Whatever comes in whatever order, nothing else comes out."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vma.archives import UUID, Run, header, pack, scan, stored_blocks
from vmapipe.archiver.job.synthesis import Keep, Mix, Synthesis
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_HEADER_BYTES, FULL_MASK
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.errors import CoverageError
from vmapipe.vma.header import Device, encode_header
from vmapipe.vma.packer import PackedExtent
from vmapipe.vma.scanner import ExtentRead, HeaderRead

NEW = bytes(range(16, 32))
# (dev_id, cluster) to (mask, stored blocks).
Model = dict[tuple[int, int], tuple[int, bytes]]
# Blocks of a new generation tell so: they are those of a device that does not exist.
LATER = 200


class Change(NamedTuple):
    """What a producer says of consecutive clusters; `masks` None: unchanged."""

    dev_id: int
    first: int
    count: int  # type: ignore[assignment]
    masks: tuple[int, ...] | None


class Case(NamedTuple):
    """A base, its devices in the new archive by their dev_ids in the base, and what comes."""

    base: bytes
    devices: dict[int, Device]
    changes: list[Change]
    expected: Model


def clusters_of(raw: bytes) -> Model:
    """What an archive has; it is complete, with each cluster once."""
    events = scan(raw)
    head = next(event for event in events if isinstance(event, HeaderRead)).header
    coverage = Coverage(head)
    found: Model = {}
    for event in events:
        if isinstance(event, ExtentRead):
            coverage.add(event.extent)
            for run in event.extent.runs:
                at = run.data_at
                for cluster, mask in enumerate(run.masks, run.first_cluster):
                    stop = at + mask.bit_count() * BLOCK_BYTES
                    found[run.dev_id, cluster] = mask, bytes(event.data[at:stop])
                    at = stop
    coverage.finish()
    return found


def synthesis_of(case: Case, hold_bytes: int) -> tuple[Synthesis, Iterator[PackedExtent[None]]]:
    events = scan(case.base)
    head = next(event for event in events if isinstance(event, HeaderRead)).header
    synthesis = Synthesis(NEW, head, case.devices, hold_bytes)
    return synthesis, _extents(synthesis, case, [e for e in events if isinstance(e, ExtentRead)])


def _extents(
    synthesis: Synthesis, case: Case, extents: list[ExtentRead]
) -> Iterator[PackedExtent[None]]:
    at = 0
    for change in case.changes:
        if change.masks is None:
            synthesis.add_unchanged(change.dev_id, change.first, change.count)
        else:
            run = Run(change.dev_id, change.first, change.masks)
            payload = payload_of(change)
            for made in synthesis.add(
                change.dev_id, change.first, change.count, run.raw_masks, memoryview(payload)
            ):
                yield made.extent
        while at < len(extents) and (plan := synthesis.plan(extents[at].extent)) is not None:
            skipped = isinstance(plan, Mix) and not plan.needs_base
            packed = synthesis.pack(plan, memoryview(b"" if skipped else extents[at].data))
            at += 1
            if packed is not None:
                assert len(packed.places) == len(packed.extent.buffers)
                yield packed.extent
    assert at == len(extents), "all has come, and extents of the base are left"
    synthesis.finish()


def payload_of(change: Change) -> bytes:
    return b"".join(
        stored_blocks(LATER, cluster, mask)
        for cluster, mask in enumerate(change.masks or (), change.first)
    )


def archive_of(case: Case, hold_bytes: int = 1 << 20) -> bytes:
    """The new archive."""
    _, extents = synthesis_of(case, hold_bytes)
    head = header(case.devices.values(), uuid=NEW)
    return encode_header(head) + b"".join(b"".join(extent.buffers) for extent in extents)


MASKS = st.sampled_from([0, 1, 0x8001, FULL_MASK])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to two devices, in the base in any order; the new archive may leave one out."""
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    sizes = draw(st.lists(st.integers(1, 130), min_size=1, max_size=2))
    old = [
        Device(number, f"d{number}", size * CLUSTER_BYTES) for number, size in enumerate(sizes, 1)
    ]
    kept = draw(st.lists(st.sampled_from(old), min_size=1, unique=True))
    # Their numbers need not be those that they had.
    devices = {d.dev_id: d._replace(dev_id=number) for number, d in enumerate(kept, 1)}
    runs: list[Run] = []
    for device in old:
        at = 0
        while at < device.clusters:
            count = min(chance.randint(1, 70), device.clusters - at)
            masks = tuple(chance.choice([0, 1, FULL_MASK]) for _ in range(count))
            runs.append(Run(device.dev_id, at, masks))
            at += count
    if draw(st.booleans()):
        chance.shuffle(runs)
    base = pack(header(old), runs, slots=draw(st.sampled_from([58, 59, 7])))
    before = clusters_of(base)
    changes: list[Change] = []
    expected: Model = {}
    for number, device in devices.items():
        at = 0
        while at < device.clusters:
            count = min(chance.randint(1, 40), device.clusters - at)
            said = None
            if chance.random() < 0.4:
                said = tuple(draw(MASKS) for _ in range(min(count, 5)))
                count = len(said)
            changes.append(Change(device.dev_id, at, count, said))
            for index, cluster in enumerate(range(at, at + count)):
                expected[device.dev_id, cluster] = before[number, cluster]
                if said is not None:
                    blocks = stored_blocks(LATER, cluster, said[index])
                    expected[device.dev_id, cluster] = said[index], blocks
            at += count
    if draw(st.booleans()):
        chance.shuffle(changes)
    return Case(base, devices, changes, expected)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([0, CLUSTER_BYTES, 1 << 30]))
def test_the_new_archive_has_what_came_and_else_what_the_base_has(case: Case, hold: int) -> None:
    assert clusters_of(archive_of(case, hold)) == case.expected


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([0, 3 * CLUSTER_BYTES]))
def test_no_more_is_held_than_was_allowed(case: Case, hold: int) -> None:
    synthesis, extents = synthesis_of(case, hold)
    largest = max((len(payload_of(change)) for change in case.changes), default=0)
    for _ in extents:
        assert synthesis.held_bytes <= hold + largest
    assert synthesis.held_bytes == 0


def base_of(clusters: int, masks: int = FULL_MASK) -> bytes:
    runs = [Run(1, 0, (masks,) * clusters)]
    return pack(header([Device(1, "d1", clusters * CLUSTER_BYTES)]), runs)


def case_of(clusters: int, *changes: Change) -> Case:
    device = Device(1, "d1", clusters * CLUSTER_BYTES)
    return Case(base_of(clusters), {1: device}, list(changes), {})


def test_where_nothing_has_changed_all_but_uuid_and_checksums_stays() -> None:
    case = case_of(200, Change(1, 0, 200, None))
    made, base = archive_of(case), case.base
    assert len(made) == len(base)
    differing = {at for at, (a, b) in enumerate(zip(made, base, strict=True)) if a != b}
    extents = [event.extent.offset for event in scan(base) if isinstance(event, ExtentRead)]
    headers = [*range(12288), *(at for e in extents for at in range(e, e + EXTENT_HEADER_BYTES))]
    assert differing <= set(headers)


def test_what_has_changed_stays_in_its_extent_and_moves_no_other_out_of_phase() -> None:
    change = Change(1, 60, 1, (1,))
    case = case_of(200, change, Change(1, 0, 60, None), Change(1, 61, 139, None))
    before = [e.extent for e in scan(case.base) if isinstance(e, ExtentRead)]
    after = [e.extent for e in scan(archive_of(case)) if isinstance(e, ExtentRead)]
    assert [e.runs[0].first_cluster for e in after] == [e.runs[0].first_cluster for e in before]
    assert {(a.offset - b.offset) % BLOCK_BYTES for a, b in zip(after, before, strict=True)} == {0}


def test_zeroes_where_the_base_has_zeroes_change_nothing() -> None:
    device = Device(1, "d1", 58 * CLUSTER_BYTES)
    base = pack(header([device]), [Run(1, 0, (0, FULL_MASK) * 29)])
    head = next(e for e in scan(base) if isinstance(e, HeaderRead)).header
    extent = next(e for e in scan(base) if isinstance(e, ExtentRead)).extent
    synthesis = Synthesis(NEW, head, {1: device})
    for cluster in range(58):
        if cluster % 2:
            synthesis.add_unchanged(1, cluster, 1)
        else:
            synthesis.add(1, cluster, 1, b"", memoryview(b""))
    assert isinstance(synthesis.plan(extent), Keep)


def test_an_extent_waits_until_all_is_known_of_it() -> None:
    case = case_of(58)
    head = next(e for e in scan(case.base) if isinstance(e, HeaderRead)).header
    extent = next(e for e in scan(case.base) if isinstance(e, ExtentRead)).extent
    synthesis = Synthesis(NEW, head, case.devices)
    for first, last in itertools.pairwise([0, 20, 57]):
        synthesis.add_unchanged(1, first, last - first)
        assert synthesis.plan(extent) is None
    synthesis.add_unchanged(1, 57, 1)
    assert isinstance(synthesis.plan(extent), Keep)


def test_an_extent_that_has_changed_as_a_whole_is_not_read() -> None:
    case = case_of(58)
    head = next(e for e in scan(case.base) if isinstance(e, HeaderRead)).header
    extent = next(e for e in scan(case.base) if isinstance(e, ExtentRead)).extent
    synthesis = Synthesis(NEW, head, case.devices)
    synthesis.add(1, 0, 58, struct.pack(">58H", *[1] * 58), memoryview(bytes(58 * BLOCK_BYTES)))
    plan = synthesis.plan(extent)
    assert isinstance(plan, Mix)
    assert not plan.needs_base


@pytest.mark.parametrize("runs", [[Run(1, 0, (1, 1)), Run(1, 1, (1,))], [Run(1, 0, (1,))]])
def test_a_base_that_has_a_cluster_twice_or_not_at_all_is_refused(runs: list[Run]) -> None:
    device = Device(1, "d1", 3 * CLUSTER_BYTES)
    case = Case(pack(header([device]), runs), {1: device}, [Change(1, 0, 3, None)], {})
    with pytest.raises(CoverageError, match=r"second time|is missing"):
        archive_of(case)


def test_the_uuid_of_the_base_is_not_that_of_the_new_archive() -> None:
    case = case_of(3, Change(1, 0, 3, None))
    assert UUID != NEW
    head = next(e for e in scan(archive_of(case)) if isinstance(e, HeaderRead)).header
    assert head.uuid == NEW
