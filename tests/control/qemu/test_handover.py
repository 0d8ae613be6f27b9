# SPDX-License-Identifier: Apache-2.0
"""Which disks a filter of ours may take over from QEMU's backup job."""

from __future__ import annotations

from typing import Any

import pytest

from vmapipe.control.qemu.cbw_filters import (
    Release,
    disks_to_hand_over,
    filter_timeout_s,
    needed_release,
    shows_snapshots,
)
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.features import Features
from vmapipe.control.qmp.connection import Command, QmpRefused

GIB = 1 << 30
DRIVERS = frozenset({"copy-before-write", "snapshot-access", "null-co", "qcow2"})
OLD = Features(frozenset({"x-perf"}), frozenset(), DRIVERS)
NEW = Features(frozenset({"on-cbw-error"}), frozenset(), DRIVERS)


class Qmp:
    """Answers what it knows; all else is refused."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def execute(self, command: Command) -> Any:
        if command.name == "qom-get":
            key = f"{command.arguments['path']} {command.arguments['property']}"
        else:
            key = command.name
        if key not in self.answers:
            raise QmpRefused("no")
        return self.answers[key]


def qemu(*numbers: int, **more: Any) -> Qmp:
    version = dict(zip(("major", "minor", "micro"), numbers, strict=True))
    return Qmp(**{"query-version": {"qemu": version}, "x-debug-query-block-graph": {}, **more})


@pytest.mark.parametrize(
    ("numbers", "fit"),
    [
        ((7, 2, 22), True),
        ((7, 2, 15), True),
        ((7, 2, 14), False),  # ends itself when reads of a snapshot overlap
        ((7, 1, 99), False),
        ((8, 2, 9), False),
        ((9, 2, 4), False),  # not tried
        ((10, 0, 0), True),
        ((10, 0, 13), True),
    ],
)
def test_only_releases_that_were_tried_and_need_it_have_their_disks_handed_over(
    numbers: tuple[int, int, int], fit: bool
) -> None:
    assert needed_release(qemu(*numbers), OLD) == (numbers if fit else None)


def test_a_qemu_that_needs_no_filter_or_has_none_keeps_its_jobs() -> None:
    assert needed_release(qemu(11, 1, 3), NEW) is None
    assert needed_release(qemu(10, 0, 0), OLD._replace(drivers=frozenset({"qcow2"}))) is None
    # Nobody could see what is below a filter when it has to go.
    assert needed_release(Qmp(**{"query-version": {"qemu": {"major": 10}}}), OLD) is None


def test_a_qemu_that_refuses_to_show_snapshots_is_not_asked_to_break_any() -> None:
    assert shows_snapshots(Qmp(**{"blockdev-add": {}, "blockdev-del": {}}), "1", "disk")
    assert not shows_snapshots(Qmp(), "1", "disk")
    assert not NEW.without_snapshots().breaks_snapshots
    assert needed_release(qemu(10, 0, 0), OLD.without_snapshots()) is None


def test_an_old_filter_has_no_timeout_for_its_seconds_would_be_others() -> None:
    assert filter_timeout_s((7, 2, 22), 25) == 0
    assert filter_timeout_s((10, 0, 0), 25) == 25


def block(node: str, qdev: str = "virtio0", used: int = GIB, **more: Any) -> dict[str, Any]:
    inserted = {"node-name": node, "ro": False, "image": {"actual-size": used}}
    return {"device": "", "qdev": qdev, "inserted": inserted, **more}


def handed_over(
    disk: MachineDisk, *blocks: dict[str, Any], release: Release = (10, 0, 0), **answers: Any
) -> bool:
    return disks_to_hand_over(Qmp(**answers), release, [disk], blocks) == [0]


def test_a_disk_is_handed_over_that_one_device_writes_to_which_can_be_put_elsewhere() -> None:
    disk = MachineDisk("drive-virtio0", "n", 100 * GIB)
    assert handed_over(disk, block("n"), block("m"))
    assert not handed_over(disk, block("n"), block("n", "virtio1"))
    assert not handed_over(disk, block("m"))  # below a filter, or a storage daemon's
    assert not handed_over(disk, block("n", ""))
    assert not handed_over(disk, block("n", removable=True))
    read_only = block("n")
    read_only["inserted"]["ro"] = True
    assert not handed_over(disk, read_only)


@pytest.mark.parametrize(
    ("size_gib", "used_gib", "expected"), [(4, 0, True), (90, 30, True), (100, 30, False)]
)
def test_a_thin_disk_is_not_handed_over_when_its_emptiness_would_cost_time(
    size_gib: int, used_gib: int, expected: bool
) -> None:
    disk = MachineDisk("drive-virtio0", "n", size_gib * GIB, is_thin=True)
    assert handed_over(disk, block("n", used=used_gib * GIB)) is expected


@pytest.mark.parametrize(
    ("answers", "threaded"),
    [
        ({}, False),
        ({"/machine/peripheral/d iothread": "/objects/io"}, True),
        ({"/machine/peripheral/d iothread": ""}, False),
        (
            {
                "/machine/peripheral/d parent_bus": "/machine/peripheral/bus/b/bus.0",
                "/machine/peripheral/bus/b iothread": "/objects/io",
            },
            True,
        ),
        (
            {
                "/machine/peripheral/d parent_bus": "/machine/q35/pcie.0",
                "/machine/q35 parent_bus": "/machine/q35",
                "/machine parent_bus": "",
            },
            False,
        ),
    ],
)
def test_a_disk_with_a_thread_of_its_own_is_not_handed_over_by_a_qemu_that_locks_for_it(
    answers: dict[str, str], threaded: bool
) -> None:
    disk = MachineDisk("drive-d", "n", GIB)
    assert handed_over(disk, block("n", "d"), release=(7, 2, 22), **answers) is not threaded
    assert handed_over(disk, block("n", "d"), release=(10, 0, 0), **answers)
