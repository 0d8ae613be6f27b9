# SPDX-License-Identifier: Apache-2.0
"""Verification finds all damage, says what is lost, and says what it could not check."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.archives import (
    ClusterAt,
    archive,
    extents_of,
    in_order,
    manifest,
    resealed,
)
from tests.restore.support import (
    CONFIGS,
    DISK,
    DISKS,
    STATE,
    a_cancel,
    flipped,
    frames_with_table,
    members,
    one_frame,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.restore.verify.report import MAX_DAMAGE, Report
from vmapipe.restore.verify.verify import VerifyOptions, verify
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled
from vmapipe.runtime.events import Event
from vmapipe.vma.errors import HeaderError, NotAnArchiveError

RAW = archive(DISKS, CONFIGS, slots=2)
EXTENTS = extents_of(RAW)
MIB = 1 << 20


def report_of(
    source: Path | str,
    options: VerifyOptions | None = None,
    hear: Callable[[Event], None] = lambda event: None,
) -> Report:
    with a_cancel() as cancel:
        return verify(str(source), hear, cancel, options)


Verify = Callable[..., Report]


@pytest.fixture
def check(tmp_path: Path) -> Verify:
    """Verify these bytes as a file, and as a pipe; both must say the same."""

    def run(raw: bytes, digests: bytes | None = None, **more: Any) -> Report:
        path = tmp_path / "vm.vma"
        path.write_bytes(raw)
        beside = tmp_path / "digests.json"
        beside.write_bytes(digests or b"")
        options = VerifyOptions(manifest=str(beside) if digests else None, **more)
        report = report_of(path, options)
        piped = report_of(f"exec:cat {path}", options)
        assert (piped.damage, vars(piped.totals)) == (report.damage, vars(report.totals))
        assert piped.data_checked == report.data_checked
        return report

    return run


def words(report: Report) -> list[str]:
    return [str(find) for find in report.damage]


def test_every_golden_archive_is_sound(golden: Path) -> None:
    for path in golden.iterdir():
        report = report_of(path)
        assert report.ok, words(report)
        assert report.totals.archive_bytes == path.stat().st_size


def test_without_a_manifest_only_the_structure_is_checked(check: Verify) -> None:
    damaged = flipped(RAW, EXTENTS[0].offset + 5000)
    report = check(damaged)
    assert report.ok
    assert not report.data_checked
    assert report.manifest is None


def test_with_a_manifest_all_data_is_checked(check: Verify) -> None:
    report = check(RAW, manifest(RAW))
    assert report.ok
    assert report.data_checked
    assert report.totals.archive_bytes == len(RAW)
    assert report.totals.extents == len(EXTENTS)


def test_a_manifest_beside_the_archive_is_found(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma.zst"
    stored = frames_with_table(RAW)
    path.write_bytes(stored)
    Path(f"{path}.manifest.json").write_bytes(manifest(RAW, stored))
    report = report_of(path, VerifyOptions(file_digest=True))
    assert report.ok, words(report)
    assert (report.compression, report.data_checked, report.file_checked) == ("zstd", True, True)
    assert report.manifest == f"{path}.manifest.json"
    assert not report_of(path, VerifyOptions(check_digests=False)).data_checked


def test_every_damaged_extent_is_named_with_its_device_and_bytes(check: Verify) -> None:
    damaged = RAW
    for number in (0, 3, len(EXTENTS) - 1):
        damaged = flipped(damaged, EXTENTS[number].offset + EXTENTS[number].total_bytes - 1)
    report = check(damaged, manifest(RAW))
    assert report.data_checked
    text = "the data is damaged, somewhere in this range: the digest is not the manifest's"
    assert [(d.device, d.offset, d.length) for d in report.damage] == [
        ("drive-scsi0", 0, 2 * CLUSTER_BYTES),
        ("drive-scsi0", 6 * CLUSTER_BYTES, len(DISK) - 6 * CLUSTER_BYTES),
        ("drive-ide0", 0, 512),
    ]
    # The last extent holds memory, too, which its own digest vouches for.
    assert {disk.device.name: disk.state for disk in report.disks} == {
        "drive-scsi0": "damaged",
        "vmstate": "sound",
        "drive-ide0": "damaged",
    }
    assert {d.text for d in report.damage} == {text}
    assert report.damage[0].archive_offset == EXTENTS[0].offset


def test_behind_a_damaged_extent_header_it_goes_on(check: Verify) -> None:
    """Two headers are bad: their clusters are lost, all others are counted and compared."""
    damaged = flipped(flipped(RAW, EXTENTS[1].offset + 100), EXTENTS[3].offset)
    damaged = flipped(damaged, EXTENTS[4].offset + 600)
    report = check(damaged, manifest(RAW))
    assert words(report) == [
        "the extent header's checksum is wrong: it is damaged; "
        f"{EXTENTS[1].total_bytes} bytes of the archive hold no extent "
        f"(archive offset {EXTENTS[1].offset})",
        "no extent header where one must be: the archive is damaged; "
        f"{EXTENTS[3].total_bytes} bytes of the archive hold no extent "
        f"(archive offset {EXTENTS[3].offset})",
        f"device 'vmstate', bytes 0..{2 * CLUSTER_BYTES - 1}: the data is damaged, somewhere in "
        "this range: the digest is not the manifest's "
        f"(archive offset {EXTENTS[4].offset})",
        f"device 'drive-scsi0', bytes {2 * CLUSTER_BYTES}..{4 * CLUSTER_BYTES - 1}: "
        "clusters 2..3 are missing",
        f"device 'drive-scsi0', bytes {6 * CLUSTER_BYTES}..{len(DISK) - 1}: "
        "clusters 6..7 are missing",
    ]
    assert report.damage[0].reference_words == "wrong vma extent header chechsum"
    assert report.damage[3].reference_words == "detected missing cluster 2 for stream drive-scsi0"


def test_bytes_that_were_cut_out_anywhere_are_found_and_the_rest_is_compared(
    check: Verify,
) -> None:
    # 1001 bytes: what follows is aligned to nothing.
    start = EXTENTS[2].offset - 2000
    report = check(RAW[:start] + RAW[start + 1001 :], manifest(RAW))
    assert words(report)[0].startswith("bytes of an extent's data are missing")
    assert words(report)[1:] == [
        f"device 'drive-scsi0', bytes {2 * CLUSTER_BYTES}..{4 * CLUSTER_BYTES - 1}: "
        "clusters 2..3 are missing"
    ]
    assert not report.data_checked
    states = {disk.device.name: disk.state for disk in report.disks}
    assert states == {"drive-scsi0": "incomplete", "vmstate": "sound", "drive-ide0": "sound"}


def test_garbage_of_some_mebibytes_is_skipped_and_measured(check: Verify) -> None:
    at = EXTENTS[2].offset
    garbage = (b"VMAE" + b"\0" * 3) * (3 * MIB // 7)
    report = check(RAW[:at] + garbage + RAW[at:])
    assert words(report) == [
        "the extent belongs to another archive (its uuid differs); "
        f"{len(garbage)} bytes of the archive hold no extent (archive offset {at})"
    ]


@pytest.mark.parametrize("surplus", [1, 100, 511, 512, 5000, 2 * MIB])
def test_trailing_bytes_are_damage(check: Verify, surplus: int) -> None:
    report = check(RAW + b"\xaa" * surplus)
    assert len(report.damage) == 1
    assert f"{surplus} bytes of the archive hold no extent" in words(report)[0]
    assert report.damage[0].archive_offset == len(RAW)


@pytest.mark.parametrize("cut", [1, 200, 512 + 4096, 100_000])
def test_an_archive_that_was_cut_lacks_what_was_behind(check: Verify, cut: int) -> None:
    report = check(RAW[:-cut], manifest(RAW))
    assert report.damage_count >= 2
    assert any("the manifest lists" in text for text in words(report))
    assert any("cluster 0 is missing" in text and "'drive-ide0'" in text for text in words(report))


def test_a_header_alone_lacks_everything(check: Verify) -> None:
    report = check(RAW[: EXTENTS[0].offset])
    assert [(d.device, d.offset, d.length) for d in report.damage] == [
        ("drive-scsi0", 0, len(DISK)),
        ("drive-ide0", 0, 512),
    ]


def test_clusters_that_come_twice_are_told_together(check: Verify) -> None:
    order = [ClusterAt("a", n) for n in (*range(8), 2, 3, 5)]
    report = check(archive({"a": DISK}, order=order))
    assert [(d.text, d.offset, d.length) for d in report.damage] == [
        ("clusters 2..3 are there a second time", 2 * CLUSTER_BYTES, 2 * CLUSTER_BYTES),
        ("cluster 5 is there a second time", 5 * CLUSTER_BYTES, CLUSTER_BYTES),
    ]
    assert report.damage[0].reference_words == "found duplicated cluster 2 for stream a"


def test_clusters_beyond_the_end_are_damage(check: Verify) -> None:
    order = [ClusterAt("a", n) for n in (*range(8), 8, 9, 11)]
    report = check(archive({"a": DISK}, order=order))
    assert [d.text for d in report.damage] == [
        "clusters 8..9 are beyond the device's end",
        "cluster 11 is beyond the device's end",
    ]
    assert {d.reference_words for d in report.damage} == {
        "got wrong block address - write beyond end"
    }


def test_data_beyond_the_end_is_damage(check: Verify) -> None:
    raw = archive({"a": DISK})
    at = extents_of(raw)[0].offset
    # The last cluster's mask: block 1 (within) becomes block 3 (beyond).
    slot = at + 40 + 8 * 7
    damaged = raw[:slot] + (0b1001).to_bytes(2, "big") + raw[slot + 2 :]
    report = check(resealed(damaged, at))
    assert [d.text for d in report.damage] == [
        "cluster 7 is reaching beyond the device's end with data",
        "cluster 7 is missing",
    ]


def test_a_device_that_the_header_does_not_list_is_damage(check: Verify) -> None:
    raw = archive({"a": DISK})
    at = extents_of(raw)[0].offset
    for slot in (2, 3):
        raw = flipped(raw, at + 40 + 8 * slot + 3)
    report = check(resealed(raw, at))
    assert [d.text for d in report.damage] == [
        "clusters 2..3 are of a device that the header does not list (17)",
        "clusters 2..3 are missing",
    ]
    assert report.damage[0].reference_words == "got wrong dev id 17"


def test_memory_that_is_out_of_order_is_damage(check: Verify) -> None:
    order = [ClusterAt("vmstate", n) for n in (0, 2, 1)]
    report = check(archive({"vmstate": STATE}, order=order))
    assert [d.text for d in report.damage] == [
        "cluster 1 is missing: this stream must be in order",
        "cluster 1 is out of order",
    ]
    assert {d.reference_words for d in report.damage} == {"found out of order vmstate data"}


def test_memory_of_another_length_than_announced_is_no_damage(check: Verify) -> None:
    order = [ClusterAt("vmstate", 0)]
    assert check(archive({"vmstate": STATE}, order=order)).ok


def test_a_list_of_damage_has_an_end_and_the_count_has_none(check: Verify) -> None:
    order = [ClusterAt("a", n) for n in range(0, 3000, 2)]
    report = check(archive({"a": bytes(3000 * CLUSTER_BYTES)}, order=order))
    assert len(report.damage) == MAX_DAMAGE
    assert report.damage_count == 1500


@pytest.mark.parametrize("pack", [one_frame, frames_with_table, members])
def test_compressed_data_that_is_cut_ends_the_search_and_the_rest_is_missing(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    packed = pack(RAW)
    path = tmp_path / "packed"
    path.write_bytes(packed[: len(packed) // 2])
    beside = tmp_path / "m"
    beside.write_bytes(manifest(RAW))
    report = report_of(path, VerifyOptions(manifest=str(beside)))
    assert "cut off" in words(report)[0]
    assert "what follows could not be checked" in words(report)[0]
    assert "'drive-ide0', bytes 0..511: cluster 0 is missing" in words(report)[-1]
    assert not report.data_checked


def test_a_manifest_of_another_archive_proves_nothing(check: Verify) -> None:
    other = manifest(archive(DISKS, CONFIGS, uuid=b"another archive!"))
    report = check(RAW, other)
    assert "belongs to another archive" in words(report)[0]
    assert not report.data_checked


def test_a_damaged_manifest_is_told_and_proves_nothing(check: Verify) -> None:
    good = manifest(RAW)
    for bad in (good[:-5], good[: len(good) // 2], b"{}\n", b"\xff\n", good + b"more\n"):
        report = check(RAW, bad)
        if bad.startswith(good):
            # The totals were read by then; who checks the manifest as a file sees it.
            assert report.ok
        else:
            assert "manifest" in words(report)[0]
            assert not report.data_checked


def test_devices_and_length_are_compared_with_the_manifest(check: Verify) -> None:
    good = manifest(RAW)
    report = check(RAW, good.replace(b'"name": "drive-ide0"', b'"name": "drive-ide1"'))
    assert words(report) == ["the manifest's list of devices is not the archive's"]
    longer = archive({**DISKS, "drive-scsi0": DISK}, CONFIGS, slots=2)
    report = check(RAW[: EXTENTS[-1].offset], manifest(longer))
    assert any("the manifest lists 1 more extents" in text for text in words(report))


def test_a_file_that_differs_where_no_data_is_is_found_on_request(tmp_path: Path) -> None:
    from tests.restore.support import skippable

    path = tmp_path / "vm.vma.zst"
    stored = one_frame(RAW)
    path.write_bytes(skippable(b"a note that was not there") + stored)
    Path(f"{path}.manifest.json").write_bytes(manifest(RAW, stored))
    assert report_of(path).ok
    report = report_of(path, VerifyOptions(file_digest=True))
    assert "is not, byte for byte, the one that was stored" in words(report)[0]


def test_what_has_no_beginning_raises(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    for data, error in (
        (b"", NotAnArchiveError),
        (b"\x7fELF" * 5000, NotAnArchiveError),
        (flipped(RAW, 5000), HeaderError),
        (RAW[:5000], HeaderError),
    ):
        path.write_bytes(data)
        with pytest.raises(error):
            report_of(path)


def test_a_stop_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    cancel = Cancel()
    cancel.ask("enough")
    with pytest.raises(Cancelled, match="enough"):
        verify(str(path), lambda event: None, cancel)
    cancel.close()


def test_progress_and_the_event_tell_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(RAW)
    events: list[Event] = []
    report = report_of(path, hear=events.append)
    assert events[-1] == {
        "event": "progress",
        "done_bytes": 12 * CLUSTER_BYTES,
        "total_bytes": 12 * CLUSTER_BYTES,
        "archive_bytes": len(RAW),
    }
    event = report.event()
    assert (event["ok"], event["data_checked"], event["damage"]) == (True, False, [])
    assert event["archive_bytes"] == len(RAW)


def test_only_headers_are_read_where_there_is_no_manifest(tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes(archive({"a": os.urandom(32 * MIB)}))
    before = _read_bytes()
    assert report_of(path).ok
    assert _read_bytes() - before < MIB


def _read_bytes() -> int:
    """What this process has read so far, from the page cache or not."""
    with open("/proc/self/io", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


def test_in_order_lists_every_cluster_once() -> None:
    assert len(set(in_order(DISKS))) == 12
