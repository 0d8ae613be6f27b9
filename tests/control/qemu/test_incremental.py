# SPDX-License-Identifier: Apache-2.0
"""Incremental backups of a running QEMU: only what has changed is sent, and every archive is whole."""

from __future__ import annotations

import itertools
import random
import subprocess
from pathlib import Path

import pytest

from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.paused_machine import paused_machine
from tests.control.qemu.storage_daemon import storage_daemon
from tests.control.qemu.tracked_machine import (
    NAMES,
    RAW,
    SIZE,
    SLOWED,
    THIN,
    Report,
    TrackedMachine,
    check_archive,
    make_images,
    tracked_machine,
    tracked_options,
)
from tests.machine import Need, eventually, good, next_event, started, without_limit
from tests.protocol.nbd.client import Client
from vmapipe.control.qemu.bitmaps import bitmap_name


@pytest.mark.every_qemu
def test_only_what_has_changed_is_sent_and_the_archive_shows_the_instant(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """With a filter of ours in the job's place (7.2, 10.0), with an I/O thread, below a throttle filter."""
    need("qemu-img", "qemu-system-x86_64")
    contents = make_images(tmp_path)
    first, second = out / "vm-2026-01-01.vma", out / "vm-2026-01-02.vma"
    with tracked_machine(need, tmp_path, contents) as tracked:
        report = Report(good(*tracked.command(first)))
        assert all("no earlier archive" in reason for reason in report.reasons.values())
        for name in NAMES:
            tracked.write(name, 3, 77)
            tracked.write(name, 5, 0)
            tracked.write(name, 40, 78)
        before = {name: bytes(content) for name, content in contents.items()}
        with started(*tracked.command(second, "--speed", "64K")) as process:
            next_event(process, "instant")
            for name in NAMES:  # what has changed before, and what has not, twice
                for pattern in (99, 98):
                    tracked.write(name, 3, pattern)
                    tracked.write(name, 20, pattern, 2)
            without_limit(process)
            said, complaints = process.communicate()
        assert process.returncode == 0, complaints
        report = Report(said)
        assert report.reasons == dict.fromkeys(NAMES, "")
        changed = {device["name"]: device["changed_bytes"] for device in report["base"]["devices"]}
        assert changed == dict.fromkeys(NAMES, 3 * CLUSTER)
        check_archive(second, before, tmp_path / "restored")
        assert tracked.machine.is_untouched()
        records = tracked.records()
        archive = bytes.fromhex(report["stored"]["uuid"])
        kept = {f"disk{n}": [bitmap_name(archive, name)] for n, name in enumerate(NAMES)}
        assert records == kept


class Days:
    """The backups of one machine, day after day; each archive must hold what its disks hold."""

    def __init__(self, contents: dict[str, bytearray], out: Path, folder: Path) -> None:
        self._contents, self._out, self._folder = contents, out, folder
        self._day = 0
        self._patterns = itertools.cycle(range(100, 250))

    def write_some(self, tracked: TrackedMachine) -> None:
        for name in NAMES:
            for cluster in (9, 30):
                tracked.write(name, cluster, next(self._patterns))

    def back_up(self, tracked: TrackedMachine) -> dict[str, str]:
        """Return why each disk was backed up in full; empty: it was not."""
        self.write_some(tracked)
        self._day += 1
        archive = self._out / f"vm-2026-01-{self._day:02}.vma"
        reasons = Report(good(*tracked.command(archive))).reasons
        if not all(reasons.values()):
            check_archive(archive, self._contents, self._folder / "restored")
        return reasons


def test_a_record_lasts_as_long_as_qemu_keeps_it_and_the_report_says_why_not(
    need: Need, tmp_path: Path, out: Path
) -> None:
    """QEMU ends, and later it is killed."""
    need("qemu-img", "qemu-system-x86_64")
    contents = make_images(tmp_path)
    days = Days(contents, out, tmp_path)
    with tracked_machine(need, tmp_path, contents) as tracked:
        days.back_up(tracked)
        days.write_some(tracked)
        tracked.machine.quit()
    with tracked_machine(need, tmp_path, contents) as tracked:
        reasons = days.back_up(tracked)
        assert "lost whenever QEMU ends" in reasons.pop(RAW)
        assert reasons == {THIN: "", SLOWED: ""}
        days.write_some(tracked)
        tracked.machine.process.kill()
        tracked.machine.process.wait()
    with tracked_machine(need, tmp_path, contents) as tracked:
        reasons = days.back_up(tracked)
        assert "lost whenever QEMU ends" in reasons.pop(RAW)
        assert all("QEMU was killed" in reason for reason in reasons.values())
        assert days.back_up(tracked) == dict.fromkeys(NAMES, "")
        (ours,) = tracked.records()["disk0"]
        add = tracked.machine.ask
        stale = f"vmapipe-{'0' * 32}"
        add("block-dirty-bitmap-add", node="disk0", name=stale, disabled=True)
        add("block-dirty-bitmap-add", node="disk1", name="vmapipe-mine")
        words = clean_up(tracked).splitlines()
        assert words[0] == f"removed {stale}"
        assert ours in words[1]
        assert words[1].endswith("(--bitmaps removes them)")
        removed = clean_up(tracked, "--bitmaps").removeprefix("removed ").split(", ")
        assert len(removed) == len(NAMES)
        assert ours in [name.strip() for name in removed]
        assert tracked.records() == {"disk1": ["vmapipe-mine"]}


def test_a_snapshot_its_commit_another_size_and_a_meddler_make_the_next_archive_a_full_one(
    need: Need, tmp_path: Path, out: Path
) -> None:
    need("qemu-img", "qemu-system-x86_64")
    contents = make_images(tmp_path)
    days = Days(contents, out, tmp_path)
    with tracked_machine(need, tmp_path, contents) as tracked:
        ask = tracked.machine.ask
        days.back_up(tracked)
        ask("block-dirty-bitmap-add", node="disk0", name="somebody-elses")
        overlay = {"snapshot-file": str(tmp_path / "overlay.qcow2"), "format": "qcow2"}
        ask(
            "blockdev-snapshot-sync",
            **{"node-name": "disk1", "snapshot-node-name": "overlay1", **overlay},
        )
        reasons = days.back_up(tracked)
        assert "a snapshot was taken" in reasons.pop(THIN)
        assert reasons == {RAW: "", SLOWED: ""}

        days.write_some(tracked)
        tracked.machine.commit("overlay1", "disk1")
        (ours,) = tracked.records()["disk2"]
        ask("block-dirty-bitmap-disable", node="disk2", name=ours)
        ask("block_resize", **{"node-name": "disk0", "size": SIZE + CLUSTER})
        contents[RAW] += bytes(CLUSTER)
        reasons = days.back_up(tracked)
        assert "its size has changed" in reasons[RAW]
        assert "since another archive" in reasons[THIN]
        assert "somebody has disabled" in reasons[SLOWED]
        assert days.back_up(tracked) == dict.fromkeys(NAMES, "")
        assert "somebody-elses" in tracked.records()["disk0"]


@pytest.mark.every_qemu
def test_a_disk_that_was_shrunk_and_grown_is_found_by_the_sample_and_backed_up_in_full_at_once(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """QEMU has recorded nothing of it. Of so small a disk all is in the sample."""
    need("qemu-storage-daemon")
    image = tmp_path / "a.raw"
    image.write_bytes(random.Random(1).randbytes(40 * CLUSTER + 512))
    with storage_daemon(tmp_path, a=image) as daemon:
        backup = ("backup", "--json", "--qmp", daemon.qmp, "--disk", "a", "--base", "auto")
        good(*backup, out / "vm-2026-01-01.vma")
        with Client(daemon.path, "a") as guest:
            guest.write(5 * CLUSTER, b"x" * 4096)
        report = Report(good(*backup, out / "vm-2026-01-02.vma"))
        assert report.reasons == {"a": ""}
        assert (report.notices, report["base"]["devices"][0]["changed_bytes"]) == ("", CLUSTER)
        daemon.ask("block-export-del", id="e-a", mode="hard")
        for size in (20 * CLUSTER, 40 * CLUSTER + 512):
            daemon.ask("block_resize", **{"node-name": "a", "size": size})
        report = Report(good(*backup, out / "vm-2026-01-03.vma"))
        assert "its record is wrong" in report.notices
        assert "This is a full backup instead" in report.notices
        assert "its record is wrong" in report.reasons["a"]
        check_archive(out / "vm-2026-01-03.vma", {"a": image.read_bytes()}, tmp_path / "restored")


def test_a_mirror_takes_the_record_away_and_a_migration_keeps_what_is_in_the_images(
    need: Need, tmp_path: Path, out: Path
) -> None:
    need("qemu-img", "qemu-system-x86_64")
    contents = make_images(tmp_path)
    days = Days(contents, out, tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    with tracked_machine(need, tmp_path, contents) as tracked:
        ask = tracked.machine.ask
        days.back_up(tracked)
        assert days.back_up(tracked) == dict.fromkeys(NAMES, "")
        (tmp_path / "copy.raw").write_bytes(bytes(SIZE))
        file = {"driver": "file", "filename": str(tmp_path / "copy.raw")}
        ask("blockdev-add", **{"driver": "raw", "node-name": "copy", "file": file})
        ask(
            "blockdev-mirror",
            **{"job-id": "m", "device": "disk0", "target": "copy", "sync": "full"},
        )
        tracked.machine.complete("m")
        reasons = days.back_up(tracked)
        assert "QEMU has no record" in reasons.pop(RAW)
        assert set(reasons.values()) == {""}
        assert days.back_up(tracked) == dict.fromkeys(NAMES, "")
        # To a QEMU that has the same images: a raw one keeps no record.
        uri = f"unix:{there}/incoming"
        words = [word.replace(f"{RAW}.raw", "copy.raw") for word in tracked_options(tmp_path)]
        with paused_machine(need, there, *words, "-incoming", uri) as machine:
            ask("migrate", uri=uri)
            assert eventually(lambda: ask("query-migrate").get("status") == "completed")
            tracked.machine.quit()
            # Disks belong to it for sure when it runs; a write before that is QEMU's end (an assertion).
            machine.ask("cont")
            assert eventually(lambda: machine.ask("query-status")["status"] == "running")
            machine.ask("stop")
            moved = TrackedMachine(machine, contents)
            reasons = days.back_up(moved)
            assert "QEMU has no record" in reasons.pop(RAW)
            assert set(reasons.values()) == {""}


def test_the_record_of_one_disk_is_not_taken_for_that_of_another_whose_image_took_its_place(
    need: Need, tmp_path: Path, out: Path
) -> None:
    """Two disks that differ at one place, which no sample would find."""
    need("qemu-img", "qemu-storage-daemon")
    names = ("a", "b")
    images = {name: tmp_path / f"{name}.qcow2" for name in names}
    contents = {name: bytearray(random.Random(1).randbytes(40 * CLUSTER)) for name in names}
    contents["b"][CLUSTER : CLUSTER + 8] = b"the bad!"
    for name, image in images.items():
        (tmp_path / "raw").write_bytes(contents[name])
        words = ["qemu-img", "convert", "-O", "qcow2", "-f", "raw"]
        subprocess.run([*words, tmp_path / "raw", image], check=True)
    backup = ("backup", "--json", "--disk", "a", "--disk", "b", "--base", "auto", "--sample", "0")
    with storage_daemon(tmp_path, **images) as daemon:
        good(*backup, "--qmp", daemon.qmp, out / "vm-2026-01-01.vma")
    with storage_daemon(tmp_path, a=images["b"], b=images["a"]) as daemon:
        archive = out / "vm-2026-01-02.vma"
        report = Report(good(*backup, "--qmp", daemon.qmp, archive))
        assert "that of another disk in the base ('b')" in report.reasons["a"]
        assert "that of another disk in the base ('a')" in report.reasons["b"]
        swapped = {"a": contents["b"], "b": contents["a"]}
        check_archive(archive, swapped, tmp_path / "restored")


def clean_up(tracked: TrackedMachine, *options: str) -> str:
    return good("cleanup", "--qmp", tracked.machine.qmp, *options).decode()
