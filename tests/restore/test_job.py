# SPDX-License-Identifier: Apache-2.0
"""Whole restores, with worker processes: the same disks, whatever they come from and go to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.archives import archive, in_order, manifest
from tests.golden_archives import GoldenItem
from tests.machine import Need
from tests.restore.support import (
    CHANCE,
    CONFIGS,
    DISK,
    DISKS,
    contents,
    expected_files,
    frames_with_table,
    lzop,
    members,
    one_frame,
    restored,
    restored_to,
    sha256,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.archive.errors import PlanError, RestoreError, TargetError
from vmapipe.restore.job import Options
from vmapipe.restore.targets.plan import Kind, Plan, TargetSpec, plan_folder

RAW = archive(DISKS, CONFIGS)
MIB = 1 << 20


@pytest.fixture
def vma(tmp_path: Path) -> Path:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    return path


def check_items(folder: Path, items: list[GoldenItem]) -> None:
    names = set()
    for item in items:
        name = item.name if item.kind == "config" else f"disk-{item.name}.raw"
        name = "vmstate.bin" if item.name == "vmstate" else name
        names.add(name)
        assert (folder / name).stat().st_size == item.size_bytes
        assert sha256(folder / name) == item.sha256
    assert {path.name for path in folder.iterdir()} == names


def test_every_golden_archive_is_restored_to_its_digests(
    golden: Path, golden_digests: dict[str, list[GoldenItem]], tmp_path: Path
) -> None:
    for name, items in golden_digests.items():
        restored_to(golden / name, tmp_path / name)
        check_items(tmp_path / name, items)


@pytest.mark.parametrize("way", ["pipe", "zst", "zst with seek table", "gz", "lzo"])
def test_golden_archives_come_out_of_pipes_and_compressed_files(
    way: str,
    golden: Path,
    golden_digests: dict[str, list[GoldenItem]],
    tmp_path: Path,
    need: Need,
) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {
        "pipe": lambda raw: raw,
        "zst": one_frame,
        "zst with seek table": lambda raw: frames_with_table(raw, 1 << 20),
        "gz": members,
        "lzo": lambda raw: lzop(need("lzop")[0], raw),
    }
    for name in ("g03-four-disks.vma", "g20-vmstate.vma"):
        path = tmp_path / f"{name}.packed"
        path.write_bytes(pack[way]((golden / name).read_bytes()))
        source = f"exec:cat {path}" if way == "pipe" else path
        restored_to(source, tmp_path / name)
        check_items(tmp_path / name, golden_digests[name])


def test_disks_memory_and_configs_come_back_as_they_were(vma: Path, out: Path) -> None:
    result = restored_to(vma, out)
    assert contents(out) == expected_files(DISKS, CONFIGS)
    assert [(d.name, d.path) for d in result.devices] == [
        ("drive-scsi0", f"{out}/disk-drive-scsi0.raw"),
        ("vmstate", f"{out}/vmstate.bin"),
        ("drive-ide0", f"{out}/disk-drive-ide0.raw"),
    ]
    assert not result.digests_checked
    assert result.totals.archive_bytes == len(RAW)
    assert result.totals.clusters == 8 + 3 + 1
    assert result.totals.zero_cluster_bytes == 3 * CLUSTER_BYTES
    assert result.totals.zero_block_bytes == (8 + 14 + 15) * 4096


def test_new_files_are_sparse(tmp_path: Path, out: Path) -> None:
    disk = bytes(64 * MIB) + DISK
    (tmp_path / "a").write_bytes(archive({"d": disk}))
    restored_to(tmp_path / "a", out)
    status = (out / "disk-d.raw").stat()
    assert status.st_size == len(disk)
    assert status.st_blocks * 512 < MIB


@pytest.mark.parametrize("source", ["file", "pipe"])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_existing_file_full_of_garbage_becomes_the_disk(
    vma: Path, tmp_path: Path, source: str, workers: int
) -> None:
    disk = bytes(20 * MIB) + DISK + bytes(70 * MIB) + DISK
    vma.write_bytes(archive({"d": disk}))
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * (len(disk) + 1000))
    restored(
        vma if source == "file" else f"exec:cat {vma}",
        lambda header: Plan({1: TargetSpec(str(target), Kind.EXISTING)}),
        options=Options(workers=workers),
    )
    assert target.read_bytes() == disk + b"\xaa" * 1000


def test_a_target_that_reads_as_zero_already_is_spared_the_zeroes(
    vma: Path, tmp_path: Path
) -> None:
    vma.write_bytes(archive({"d": DISK}))
    target = tmp_path / "target"
    target.write_bytes(b"\xaa" * len(DISK))
    spec = TargetSpec(str(target), Kind.EXISTING, write_zeroes=False)
    restored(vma, lambda header: Plan({1: spec}))
    found = target.read_bytes()
    # Garbage shows where nothing was written: two zero clusters, say.
    assert found[3 * CLUSTER_BYTES : 5 * CLUSTER_BYTES] == b"\xaa" * (2 * CLUSTER_BYTES)
    assert found[: 3 * CLUSTER_BYTES] == DISK[: 3 * CLUSTER_BYTES]


def test_a_block_device_full_of_garbage_becomes_the_disk(loop: str, vma: Path) -> None:
    # Its end fits no sector.
    disk = DISK + bytes(13 * MIB) + DISK
    vma.write_bytes(archive({"d": disk}))
    restored(vma, lambda header: Plan({1: TargetSpec(loop, Kind.EXISTING)}))
    with open(loop, "rb") as device:
        found = device.read()
    assert found[: len(disk)] == disk
    assert set(found[len(disk) :]) == {0xAA}


def test_skipped_devices_are_not_written_and_the_rest_is_whole(vma: Path, out: Path) -> None:
    result = restored_to(vma, out, chosen=[("drive-ide0", None)])
    assert set(contents(out)) == {"disk-drive-ide0.raw", *CONFIGS}
    assert [d.path for d in result.devices] == [None, None, f"{out}/disk-drive-ide0.raw"]


def test_an_archive_with_configs_only_is_restored(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a").write_bytes(archive({}, CONFIGS))
    restored_to(tmp_path / "a", out)
    assert contents(out) == CONFIGS


def test_digests_are_checked_where_a_manifest_lies_beside(vma: Path, out: Path) -> None:
    Path(f"{vma}.manifest.json").write_bytes(manifest(RAW))
    assert restored_to(vma, out).digests_checked
    assert contents(out) == expected_files(DISKS, CONFIGS)


def test_a_manifest_may_lie_elsewhere_and_be_for_a_pipe(vma: Path, out: Path) -> None:
    elsewhere = out.parent / "m.json"
    elsewhere.write_bytes(manifest(RAW))
    result = restored(
        f"exec:cat {vma}",
        lambda header: plan_folder(header, str(out)),
        options=Options(manifest=str(elsewhere)),
    )
    assert result.digests_checked
    assert contents(out) == expected_files(DISKS, CONFIGS)


def test_progress_ends_at_all_of_it_and_never_falls(vma: Path, out: Path) -> None:
    events: list[Any] = []
    restored(vma, lambda header: plan_folder(header, str(out)), hear=events.append)
    assert events[0]["event"] == "restoring"
    assert events[-1]["event"] == "restored"
    done = [event["done_bytes"] for event in events if event["event"] == "progress"]
    assert done == sorted(done)
    assert done[-1] == 12 * CLUSTER_BYTES
    assert {e["total_bytes"] for e in events if e["event"] == "progress"} == {done[-1]}


def test_a_limit_slows_a_device_down(tmp_path: Path, out: Path) -> None:
    data = CHANCE.randbytes(24 * CLUSTER_BYTES)
    (tmp_path / "a").write_bytes(archive({"d": data}, slots=8))
    target = tmp_path / "target"
    target.write_bytes(bytes(len(data)))
    started = time.monotonic()
    spec = TargetSpec(str(target), Kind.EXISTING, bytes_per_s=2 * MIB)
    # In messages, for they are handed out extent by extent.
    restored(f"exec:cat {tmp_path}/a", lambda header: Plan({1: spec}))
    # 1.5 MiB in three pieces: the third goes out when the first two are paid for.
    assert time.monotonic() - started > 0.4
    assert target.read_bytes() == data


def test_no_temporary_folder_is_left(
    vma: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setenv("TMPDIR", str(private))
    restored_to(vma, out)
    assert list(private.iterdir()) == []


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_disks_of_any_shape_in_any_order_come_back(tmp_path: Path, data: st.DataObject) -> None:
    letters = st.text("A0ph", min_size=1, max_size=30)
    patterns = data.draw(st.lists(letters, min_size=1, max_size=3))
    disks = {}
    for number, pattern in enumerate(patterns):
        tail = data.draw(st.integers(1, CLUSTER_BYTES))
        clusters = {"A": CHANCE.randbytes(CLUSTER_BYTES), "p": bytes(30_000) + b"p" * 9}
        whole = b"".join(clusters.get(x, b"").ljust(CLUSTER_BYTES, b"\0") for x in pattern)
        disks[f"disk{number}"] = whole[: len(whole) - CLUSTER_BYTES + tail]
    order = data.draw(st.permutations(in_order(disks)))
    slots = data.draw(st.integers(1, 59))
    raw = archive(disks, order=order, slots=slots)
    folder = tmp_path / os.urandom(4).hex()
    path = tmp_path / "shaped"
    path.write_bytes(raw)
    piped = data.draw(st.booleans())
    restored_to(f"exec:cat {path}" if piped else path, folder)
    assert contents(folder) == expected_files(disks, {})


def refused(name: Path, plan: Plan, error: type[Exception] = RestoreError) -> str:
    with pytest.raises(error) as caught:
        restored(name, lambda header: plan)
    return str(caught.value)


def test_one_bad_target_stops_all_before_anything_is_written(vma: Path, out: Path) -> None:
    good = out / "good"
    good.write_bytes(b"\xaa" * len(DISK))
    small = out / "small"
    small.write_bytes(b"\xaa" * 511)
    before = contents(out)
    first = TargetSpec(str(good), Kind.EXISTING)
    for spec, words in {
        TargetSpec(str(small), Kind.EXISTING): "smaller than device 'drive-ide0'",
        TargetSpec(str(out / "absent"), Kind.EXISTING): "No such file",
        TargetSpec(str(good), Kind.NEW): "exists already",
        TargetSpec("/nonexistent/x", Kind.NEW): "cannot create /nonexistent/x",
    }.items():
        assert words in refused(vma, Plan({1: first, 3: spec}), TargetError)
        assert contents(out) == before


def test_one_target_for_two_devices_is_refused(vma: Path, out: Path) -> None:
    vma.write_bytes(archive({"a": DISK, "b": DISK}))
    (out / "x").write_bytes(bytes(len(DISK)))
    (out / "y").hardlink_to(out / "x")
    specs = [TargetSpec(str(out / name), Kind.EXISTING) for name in "xy"]
    assert "are one and the same" in refused(vma, Plan({1: specs[0], 2: specs[1]}), PlanError)


def test_the_archive_is_no_target(vma: Path) -> None:
    spec = TargetSpec(str(vma), Kind.EXISTING)
    plan = Plan({1: spec})
    vma.write_bytes(archive({"a": bytes(len(DISK)) + DISK * 2}))
    os.truncate(vma, len(DISK) * 3)
    assert "the archive itself are one and the same" in refused(vma, plan, PlanError)
