# SPDX-License-Identifier: Apache-2.0
"""QEMU's records of changes: which disk may be incremental, and what is left after any crash, by a model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.control.qemu.bitmaps import (
    BaseArchive,
    archive_of,
    bitmap_name,
    choose_method,
    disk_of,
    node_of,
    of_runs,
    worthless,
)
from vmapipe.control.qemu.change_tracking import ChangeTracking, TrackingOptions
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.jobs import run_prefix
from vmapipe.control.qemu.leftovers import remove_records
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qemu.undo import find_own_objects
from vmapipe.control.qmp.connection import Command, QmpGone, QmpRefused

CLUSTERS = 12
SIZE = CLUSTERS * CLUSTER_BYTES
RUN = "0a1b2c3d"
BASE = BaseArchive(bytes(range(16)), {"disk": SIZE})
DISK = MachineDisk("disk", "disk", SIZE)


def bitmap(**more: Any) -> dict[str, Any]:
    whole = {"recording": True, "busy": False, "granularity": CLUSTER_BYTES, "count": 0}
    return {"name": bitmap_name(BASE.uuid, "disk"), **whole, **more}


def node(*bitmaps: dict[str, Any], drv: str = "qcow2") -> dict[str, Any]:
    return {"node-name": "disk", "drv": drv, "dirty-bitmaps": list(bitmaps)}


def test_a_disk_whose_own_node_has_recorded_since_the_base_is_incremental() -> None:
    method = choose_method(DISK, node({"count": 5}, bitmap(count=3 * CLUSTER_BYTES)), BASE)
    assert method == (bitmap_name(BASE.uuid, "disk"), "", 3 * CLUSTER_BYTES)
    assert method.is_incremental


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (node(bitmap(inconsistent=True, recording=False)), "was not ended properly"),
        (node(bitmap(recording=False)), "somebody has disabled"),
        (node(bitmap(busy=True)), "another operation uses"),
        (node(bitmap(granularity=4096)), "was not made by vmapipe"),
        (node(bitmap(count=7 * CLUSTER_BYTES)), "more than 50 % of it has changed"),
        (node(), "a snapshot was taken"),
        (node(drv="raw"), "lost whenever QEMU ends"),
        (
            node(bitmap(name=bitmap_name(bytes(16), "disk"))),
            "since another archive (00000000-0000-",
        ),
        (node(bitmap(name="libvirt-1")), "QEMU has no record"),
        (node(bitmap(name=bitmap_name(BASE.uuid, "b"))), "that of another disk in the base ('b')"),
        (None, "no node"),
    ],
)
def test_any_doubt_about_a_record_means_a_full_backup_for_a_reason_in_words(
    found: dict[str, Any] | None, reason: str
) -> None:
    method = choose_method(DISK, found, BASE)
    assert not method.is_incremental
    assert reason in method.reason


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [({}, "the base does not have it"), ({"disk": SIZE - 512}, "its size has changed")],
)
def test_a_disk_that_is_not_the_bases_is_backed_up_in_full(
    sizes: Mapping[str, int], reason: str
) -> None:
    method = choose_method(DISK, node(bitmap()), BASE._replace(sizes=sizes))
    assert (method.since, reason in method.reason) == ("", True)


def test_the_record_of_a_backing_file_says_nothing_of_the_disk_above_it() -> None:
    blocks: list[dict[str, Any]] = [
        {"device": "drive", "inserted": {"node-name": "overlay"}},
        {"device": "cd"},
    ]
    nodes = [node(bitmap()), {"node-name": "overlay", "drv": "qcow2"}]
    active = node_of("drive", blocks, nodes)
    assert active is not None
    assert active["node-name"] == "overlay"
    assert not choose_method(DISK._replace(device="drive"), active, BASE).is_incremental
    assert node_of("overlay", [], nodes) is active
    assert node_of("cd", blocks, nodes) is None


@given(
    st.binary(min_size=16, max_size=16),
    st.text("0123456789abcdefABCDEF-\n", max_size=40),
    st.text(min_size=1),
)
def test_only_an_archives_uuid_behind_our_prefix_is_a_record_of_ours(
    uuid: bytes, other: str, disk: str
) -> None:
    ours = bitmap_name(uuid, disk)
    assert (archive_of(ours), disk_of(ours)) == (uuid, disk)
    assert archive_of(uuid.hex()) == b""
    name = f"vmapipe-{other}"
    assert archive_of(name) == b"" or name.startswith(f"vmapipe-{archive_of(name).hex()}")
    assert not disk_of(name) or name == bitmap_name(archive_of(name), disk_of(name))


def test_what_is_not_ours_is_never_removed() -> None:
    others = [bitmap(name=name, recording=False) for name in ("libvirt-1", "vmapipe-x", "")]
    assert worthless([node(*others)]) == []
    assert of_runs([node(*others)], run_prefix(RUN)) == []


# --- The model ---


class ModelQemu:
    """A QEMU with one disk, of numbers in place of clusters, and its bitmaps as sets of clusters."""

    def __init__(self, drv: str) -> None:
        self.disk = [0] * CLUSTERS
        self.drv = drv
        self.bitmaps: dict[str, dict[str, Any]] = {}
        #: How many more commands QEMU answers before we are killed.
        self.left = -1

    def execute(self, command: Command) -> Any:
        if self.left == 0:
            raise QmpGone("killed")
        self.left -= 1
        match command.name:
            case "query-jobs" | "query-block":
                return []
            case "query-named-block-nodes":
                return [{**node(*map(self._answer, self.bitmaps)), "drv": self.drv}]
        return self._change(command)

    def _change(self, command: Command) -> None:
        arguments = command.arguments
        match command.name:
            case "block-dirty-bitmap-add":
                if arguments["name"] in self.bitmaps:
                    raise QmpRefused("Bitmap already exists")
                if arguments["persistent"] and self.drv != "qcow2":
                    raise QmpRefused("Can't store persistent bitmaps")
                self.bitmaps[arguments["name"]] = {
                    "dirty": set(),
                    "is_kept": arguments["persistent"],
                    "is_whole": True,
                }
            case "block-dirty-bitmap-remove":
                if arguments["name"] not in self.bitmaps:
                    raise QmpRefused("Bitmap could not be found")
                del self.bitmaps[arguments["name"]]
            case "block-dirty-bitmap-merge":
                (source,) = arguments["bitmaps"]
                if source not in self.bitmaps or not self.bitmaps[source]["is_whole"]:
                    raise QmpRefused("Bitmap cannot be used")
                self.bitmaps[arguments["target"]]["dirty"] |= self.bitmaps[source]["dirty"]
            case _:
                raise QmpRefused(f"The command {command.name} has not been found")

    def _answer(self, name: str) -> dict[str, Any]:
        found = self.bitmaps[name]
        count = len(found["dirty"]) * CLUSTER_BYTES
        is_whole = found["is_whole"]
        return bitmap(name=name, count=count, recording=is_whole, inconsistent=not is_whole)

    def write(self, cluster: int, value: int) -> None:
        self.disk[cluster] = value
        for found in self.bitmaps.values():
            found["dirty"].add(cluster)

    def end(self, *, is_killed: bool) -> None:
        """And begin again: what was kept is there, after a kill not whole."""
        self.bitmaps = {name: found for name, found in self.bitmaps.items() if found["is_kept"]}
        for found in self.bitmaps.values():
            found["is_whole"] = found["is_whole"] and not is_killed
            found["dirty"] = set(found["dirty"]) if found["is_whole"] else set()


def undo(qemu: ModelQemu) -> None:
    """As the guardian does it, and the next backup."""
    for command in find_own_objects(qemu, "vmapipe-").cleanup_commands():
        qemu.execute(command)
    assert find_own_objects(qemu, "vmapipe-").nothing


FOLDER: Any = None  # without a sample there is no need for a SinkFolder


class Backups:
    """All backups of a model's disk. An archive is the disk's clusters."""

    def __init__(self, qemu: ModelQemu) -> None:
        self.qemu = qemu
        self.stored: dict[bytes, list[int]] = {}
        self.incremental = 0
        self._number = 0

    def back_up(
        self, base: bytes, fate: str, meanwhile: Iterator[tuple[int, int]], at: int
    ) -> None:
        """`base` may be none that was stored. `at`: where we are killed, in commands."""
        self._number += 1
        uuid = self._number.to_bytes(16, "big")
        found = BaseArchive(base, {"disk": SIZE}) if base in self.stored else None
        options = TrackingOptions(uuid, found, "there is no base")
        tracking = ChangeTracking(self.qemu, RUN, options)
        folder: SinkFolder = FOLDER
        try:
            self.qemu.left = at if fate == "killed" else -1
            jobs = tracking.prepare([DISK], [], folder)
            self.qemu.write(*next(meanwhile))  # before the instant
            content = list(self.qemu.disk)
            copied = set(range(CLUSTERS))
            if "disk" in jobs:
                copied = set(self.qemu.bitmaps[jobs["disk"].name]["dirty"])
                self.incremental += 1
            self.qemu.write(*next(meanwhile))  # behind it
            undo(self.qemu)
            if fate in ("stored", "killed"):
                old = self.stored.get(base, content)
                self.stored[uuid] = [content[n] if n in copied else old[n] for n in range(CLUSTERS)]
                assert self.stored[uuid] == content
            tracking.settle(self.qemu, stored=fate == "stored")
        except QmpGone:
            pass
        self.qemu.left = -1
        undo(self.qemu)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["qcow2", "raw"]), st.randoms(use_true_random=False))
def test_no_archive_is_ever_wrong_whatever_died_in_whatever_moment(
    drv: str, chance: random.Random
) -> None:
    qemu = ModelQemu(drv)
    backups = Backups(qemu)
    values = iter(range(1, 1 << 30))
    writes = ((chance.randrange(CLUSTERS), value) for value in values)
    for _ in range(20):
        for _ in range(chance.randrange(4)):
            qemu.write(*next(writes))
        known = [*backups.stored, bytes(16)]
        base = chance.choice([known[-2] if len(known) > 1 else bytes(16), chance.choice(known)])
        fate = chance.choice(["stored", "stored", "failed", "killed"])
        backups.back_up(base, fate, writes, chance.randrange(12))
        if chance.random() < 0.2:
            qemu.end(is_killed=chance.random() < 0.5)
        ours = [archive_of(name) for name in qemu.bitmaps]
        assert all(ours)
    remove_records(qemu)
    assert qemu.bitmaps == {}


def test_backups_that_are_stored_are_incremental_and_leave_one_record() -> None:
    qemu = ModelQemu("raw")
    backups = Backups(qemu)
    writes = iter((n % CLUSTERS, n) for n in range(1, 100))
    base = bytes(16)
    for number in range(1, 5):
        backups.back_up(base, "stored", writes, 0)
        base = number.to_bytes(16, "big")
        assert list(qemu.bitmaps) == [bitmap_name(base, "disk")]
    assert backups.incremental == 3


@pytest.mark.parametrize("fate", ["failed", "stored"])
def test_a_backup_that_fails_leaves_the_record_of_the_one_before(fate: str) -> None:
    qemu = ModelQemu("qcow2")
    backups = Backups(qemu)
    writes = iter((n % CLUSTERS, n) for n in range(1, 100))
    backups.back_up(bytes(16), "stored", writes, 0)
    first = (1).to_bytes(16, "big")
    backups.back_up(first, fate, writes, 0)
    left = {"failed": first, "stored": (2).to_bytes(16, "big")}
    assert list(qemu.bitmaps) == [bitmap_name(left[fate], "disk")]
    assert qemu.bitmaps[bitmap_name(left[fate], "disk")]["dirty"]
