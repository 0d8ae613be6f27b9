# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.vma.archives import Run, devices_and_runs, header
from vmapipe.clusters.sizes import CLUSTER_BYTES, FULL_MASK
from vmapipe.vma.coverage import Coverage, mask_fits
from vmapipe.vma.errors import CoverageError
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device

DISK = Device(3, "drive-scsi0", 5 * CLUSTER_BYTES + 4097)  # 6 clusters, 2 blocks in the last
STATE = Device(9, "vmstate", 2 * CLUSTER_BYTES)


def coverage(*devices: Device) -> Coverage:
    return Coverage(header(devices or (DISK, STATE)))


def extent(*runs: tuple[int, int, tuple[int, ...]]) -> Extent:
    return Extent(4711, 0, tuple(ClusterRun(dev, first, m, 0) for dev, first, m in runs))


def refusal(state: Coverage, *runs: tuple[int, int, tuple[int, ...]]) -> CoverageError:
    with pytest.raises(CoverageError) as caught:
        state.add(extent(*runs))
    assert caught.value.offset == 4711
    return caught.value


@given(devices_and_runs())
@settings(max_examples=25)
def test_every_cluster_once_in_any_order_is_complete(
    made: tuple[tuple[Device, ...], list[Run]],
) -> None:
    devices, runs = made
    state = coverage(*devices)
    for run in runs:
        state.add(extent(run))
    state.finish()
    assert list(state.missing()) == []
    for device in devices:
        if not device.is_vmstate:
            assert state.clusters_seen(device.dev_id) == device.clusters


@given(devices_and_runs())
@settings(max_examples=25)
def test_one_missing_cluster_is_named(made: tuple[tuple[Device, ...], list[Run]]) -> None:
    devices, runs = made
    state = coverage(*devices)
    dev_id, first, run_masks = runs[0]
    state.add(extent((dev_id, first + 1, run_masks[1:])) if run_masks[1:] else extent())
    for run in runs[1:]:
        state.add(extent(run))
    name = f"drive-{dev_id}"
    with pytest.raises(CoverageError, match=f"cluster {first} is missing") as caught:
        state.finish()
    assert caught.value.device == name
    assert caught.value.cluster_num == first
    assert caught.value.reference_text == f"detected missing cluster {first} for stream {name}"
    assert [(d.dev_id, f, n) for d, f, n in state.missing()] == [(dev_id, first, 1)]


@given(devices_and_runs())
@settings(max_examples=25)
def test_a_cluster_that_comes_twice_is_named(made: tuple[tuple[Device, ...], list[Run]]) -> None:
    devices, runs = made
    state = coverage(*devices)
    for run in runs:
        state.add(extent(run))
    dev_id, first, run_masks = runs[-1]
    error = refusal(state, (dev_id, first, run_masks[:1]))
    assert error.cluster_num == first
    assert error.device == f"drive-{dev_id}"
    assert error.reference_text == f"found duplicated cluster {first} for stream drive-{dev_id}"


def test_a_cluster_twice_in_one_extent_is_named() -> None:
    assert refusal(coverage(), (3, 1, (0, 0, 0)), (3, 3, (0,))).cluster_num == 3


def test_an_archive_without_any_cluster_misses_the_first_of_its_disks() -> None:
    with pytest.raises(CoverageError, match=r"cluster 0 is missing \(6 of 6 are\)"):
        coverage().finish()


@pytest.mark.parametrize(
    ("first", "count", "culprit"), [(6, 1, 6), (5, 2, 6), (0, 7, 6), (0xFFFFFFFF, 1, 0xFFFFFFFF)]
)
def test_a_cluster_beyond_the_devices_end_is_named(first: int, count: int, culprit: int) -> None:
    error = refusal(coverage(), (3, first, (0,) * count))
    assert error.cluster_num == culprit
    assert error.reference_text == "got wrong block address - write beyond end"


@pytest.mark.parametrize("mask", [0b100, 0b111, 0x8000, 0xFFFE, 0x7FFF])
def test_a_block_beyond_the_devices_end_is_named(mask: int) -> None:
    error = refusal(coverage(), (3, 4, (FULL_MASK, mask)))
    assert error.cluster_num == 5
    assert error.reference_text == "got wrong block address - write beyond end"


@pytest.mark.parametrize("mask", [0, 1, 2, 3, FULL_MASK])
def test_a_last_cluster_within_the_device_or_full_is_taken(mask: int) -> None:
    state = coverage()
    state.add(extent((3, 5, (mask,))))
    assert state.clusters_seen(3) == 1


@pytest.mark.parametrize("mask", [1, 0x8000, FULL_MASK])
def test_only_the_last_cluster_is_held_to_the_devices_end(mask: int) -> None:
    state = coverage()
    state.add(extent((3, 4, (mask,))))
    assert state.clusters_seen(3) == 1


@pytest.mark.parametrize(
    ("size_bytes", "blocks"),
    [(1, 1), (512, 1), (4095, 1), (4096, 1), (4097, 2), (65535, 16), (65536, 16), (65537, 1)],
)
def test_a_mask_fits_when_its_last_block_begins_within_the_device(
    size_bytes: int, blocks: int
) -> None:
    device = Device(1, "a", size_bytes)
    for bit in range(16):
        assert mask_fits(device, 1 << bit) == (bit < blocks)
    assert mask_fits(device, FULL_MASK)
    assert mask_fits(device, FULL_MASK, cut_full=False) == (blocks == 16)


@pytest.mark.parametrize("dev_id", [1, 4, 254, 255])
def test_a_cluster_of_an_unknown_device_is_named(dev_id: int) -> None:
    error = refusal(coverage(), (dev_id, 0, (0,)))
    assert error.device == str(dev_id)
    assert error.reference_text == f"got wrong dev id {dev_id}"


def test_vmstate_may_be_longer_or_shorter_than_its_estimate() -> None:
    for clusters in (0, 1, 2, 3, 70_000):
        state = coverage(STATE)
        for first in range(0, clusters, 35_000):
            state.add(extent((9, first, (FULL_MASK,) * min(35_000, clusters - first))))
        state.finish()
        assert state.vmstate_clusters(9) == clusters


@pytest.mark.parametrize("then", [0, 1, 3, 0xFFFFFFFF])
def test_vmstate_out_of_order_is_refused_in_the_references_words(then: int) -> None:
    state = coverage(STATE)
    state.add(extent((9, 0, (1, 1))))
    error = refusal(state, (9, then, (1,)))
    assert error.device == "vmstate"
    assert error.cluster_num == then
    assert error.reference_text == "found out of order vmstate data"


def test_vmstate_and_disks_may_interleave() -> None:
    state = coverage()
    state.add(extent((9, 0, (1,)), (3, 3, (1, 1, 1)), (9, 1, (1,))))
    state.add(extent((3, 0, (1, 1, 1)), (9, 2, (FULL_MASK,))))
    state.finish()
    assert (state.clusters_seen(3), state.vmstate_clusters(9)) == (6, 3)


def test_a_name_that_would_steer_the_terminal_is_escaped_in_the_references_words() -> None:
    state = coverage(Device(1, "a\x1b[2Jb", 1))
    with pytest.raises(CoverageError) as caught:
        state.finish()
    assert "\x1b" not in str(caught.value)
    assert "\x1b" not in caught.value.reference_text
