# SPDX-License-Identifier: Apache-2.0
"""Disks into a store and back, through the commands, as a user runs them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.machine import (
    VMA,
    bad,
    children,
    end_of,
    good,
    make_disk,
    next_event,
    run,
    sha256,
    started,
)
from tests.s3.proxy import FaultyProxy
from tests.s3.server import BUCKET, S3Server
from vmapipe.archiver.outputs.object import PART_BYTES

# More than a part: 400 clusters are 25 MiB.
PATTERN = "A" * 400 + "h" * 50 + "0pA"
NAME = f"s3://{BUCKET}/vm/vm.vma"
Disks = dict[str, Path]


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Disks:
    folder = tmp_path_factory.mktemp("disks")
    return {
        "sda": make_disk(folder / "a.raw", PATTERN, 70_001 - 65536, seed=1),
        "sdb": make_disk(folder / "b.raw", "Ap0h", seed=2),
    }


@pytest.fixture
def small(disks: Disks) -> list[str]:
    """The words for the disk that is no part long."""
    return words({"sdb": disks["sdb"]})


def words(disks: Disks) -> list[str]:
    return [word for name, path in disks.items() for word in ("--disk", f"{name}={path}")]


def test_disks_go_into_a_store_and_come_back_as_they_were(
    s3: S3Server, disks: Disks, tmp_path: Path
) -> None:
    config = tmp_path / "vm.conf"
    config.write_text("memory: 512\n")
    good("backup", "--quiet", *words(disks), "--config", config, NAME)
    assert set(s3.objects()) == {"vm/vm.vma", "vm/vm.vma.manifest.json"}
    assert s3.uploads() == []
    listed = json.loads(good("list", "--json", NAME))
    assert [device["name"] for device in listed["devices"]] == ["sda", "sdb"]
    assert good("config", NAME) == b"memory: 512\n"
    done = json.loads(good("verify", "--json", "--require-manifest", NAME).splitlines()[-1])
    assert (done["ok"], done["data_checked"]) == (True, True)
    assert done["manifest"] == f"{NAME}.manifest.json"
    good("restore", "--quiet", NAME, tmp_path / "out")
    for name, path in disks.items():
        assert sha256(tmp_path / "out" / f"disk-{name}.raw") == sha256(path)
    assert bad("backup", *words(disks), NAME) == (
        f"vmapipe backup: {NAME} exists; vmapipe does not overwrite archives: remove it or "
        "choose another name"
    )


def test_a_compressed_archive_goes_there_and_comes_back(
    s3: S3Server, disks: Disks, tmp_path: Path
) -> None:
    good("backup", "--quiet", *words(disks), "--compress", "zstd:1", f"{NAME}.zst")
    good("restore", "--quiet", f"{NAME}.zst", tmp_path / "out")
    for name, path in disks.items():
        assert sha256(tmp_path / "out" / f"disk-{name}.raw") == sha256(path)


def test_the_drop_in_reads_and_writes_objects_too(
    s3: S3Server, disks: Disks, tmp_path: Path
) -> None:
    good("create", NAME, f"drive-a={disks['sdb']}", tool=VMA)
    assert b"drive-a" in good("list", NAME, tool=VMA)
    good("extract", NAME, tmp_path / "out", tool=VMA)
    assert sha256(tmp_path / "out" / "disk-drive-a.raw") == sha256(disks["sdb"])


def test_damage_in_a_store_is_found_with_its_place(s3: S3Server, small: list[str]) -> None:
    good("backup", "--quiet", *small, NAME)
    raw = bytearray(s3.data("vm/vm.vma"))
    raw[len(raw) // 2] ^= 1
    s3.put("vm/vm.vma", bytes(raw))
    done = run("verify", "--json", NAME)
    assert done.returncode == 4
    report = json.loads(done.stdout.splitlines()[-1])
    assert [find["device"] for find in report["damage"]] == ["sdb"]


def test_the_whole_object_is_compared_where_that_was_asked_for(
    s3: S3Server, small: list[str], tmp_path: Path
) -> None:
    good("backup", "--quiet", *small, "--compress", "zstd:1", f"{NAME}.zst")
    words = ("verify", "--json", "--whole-file", f"{NAME}.zst")
    assert json.loads(good(*words).splitlines()[-1])["file_checked"]
    # Behind the last frame: what unpacks it passes over that.
    s3.put("vm/vm.vma.zst", s3.data("vm/vm.vma.zst") + b"\x50\x2a\x4d\x18" + bytes(4))
    done = run(*words)
    assert done.returncode == 4
    (damage,) = json.loads(done.stdout.splitlines()[-1])["damage"]
    assert f"the file {NAME}.zst is not, byte for byte" in damage["text"]
    good("backup", "--quiet", *small, tmp_path / "a.vma")
    text = bad("verify", "--whole-file", f"exec:cat {tmp_path}/a.vma", code=2)
    assert "can be read only once" in text


def test_a_manifest_without_its_archive_is_stale_and_replaced(
    s3: S3Server, small: list[str]
) -> None:
    s3.put("vm/vm.vma.manifest.json", b"of a backup that was killed in its last moment")
    good("backup", "--quiet", *small, NAME)
    good("verify", "--quiet", "--require-manifest", NAME)


def test_a_job_that_fails_leaves_nothing_in_the_store(
    s3: S3Server, disks: Disks, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.plan(r"POST /backups/vm/vm\.vma\?uploadId=", "503")
    text = bad("backup", *words(disks), NAME)
    assert f"cannot complete {NAME}: 503" in text
    assert s3.objects() == {}
    assert s3.uploads() == []


@pytest.mark.parametrize("victim", ["archiver", "producer", "backup"])
def test_whoever_is_killed_nothing_is_left_in_the_store(
    s3: S3Server, disks: Disks, proxy: FaultyProxy, victim: str
) -> None:
    # The first part is stuck: the upload has begun, and the backup cannot end.
    stuck = proxy.plan("PUT .*partNumber=1", "stall")
    with started("backup", "--json", *words(disks), NAME) as process:
        next_event(process, "begun")
        assert stuck.fired.wait(60)
        assert s3.uploads() == ["vm/vm.vma"]
        if victim == "backup":
            process.send_signal(signal.SIGTERM)
        else:
            children(process, f"vmapipe.{victim}")[0].kill()
        code, _ = end_of(process)
        assert code == (143 if victim == "backup" else 1)
    assert s3.objects() == {}
    assert s3.uploads() == []


def test_a_manifest_may_be_an_object_beside_no_object(
    s3: S3Server, small: list[str], tmp_path: Path
) -> None:
    manifest = f"s3://{BUCKET}/m.json"
    good("backup", "--quiet", *small, "--manifest", manifest, tmp_path / "a.vma")
    good("verify", "--quiet", "--require-manifest", "--manifest", manifest, tmp_path / "a.vma")
    text = bad("backup", *small, "--manifest", manifest, tmp_path / "b.vma")
    assert f"{manifest} exists; vmapipe does not overwrite" in text
    assert not (tmp_path / "b.vma").exists()


def test_wrong_use_is_said_in_one_line(s3: S3Server, small: list[str]) -> None:
    assert "--vmid" in bad("backup", *small, "--vmid", "100", f"s3://{BUCKET}/x", code=2)
    assert "NoSuchBucket" in bad("backup", "--no-manifest", *small, "s3://no-bucket-here/x")


@pytest.mark.slow
def test_the_archivers_memory_is_bounded(s3: S3Server, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "big.raw", "A" * 1800)  # 112 MiB: 8 parts
    events = good("backup", "--json", "--no-manifest", "--disk", f"sda={disk}", NAME)
    done = json.loads(events.splitlines()[-1])
    # All processes together: the producer has 16 MiB of ring, five parts are 80 MiB.
    assert done["peak_rss_bytes"] < 300 << 20
    assert s3.objects()["vm/vm.vma"] > 7 * PART_BYTES
