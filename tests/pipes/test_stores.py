# SPDX-License-Identifier: Apache-2.0
"""Archives in the stores of restic and borg, both ways, by the recipes of the manual."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, Need, end_of, good, make_disk, next_event, started

PATTERN = "ApA0h" * 30


@pytest.fixture
def restic(tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, which restic finds by its environment."""
    (program,) = need("restic")
    for name, value in (
        ("RESTIC_REPOSITORY", tmp_path / "repository"),
        ("RESTIC_CACHE_DIR", tmp_path / "cache"),
        ("RESTIC_PASSWORD", "x"),
    ):
        monkeypatch.setenv(name, str(value))
    subprocess.run([program, "-q", "init"], check=True, timeout=LIMIT_S)
    return tmp_path / "repository"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "sda.raw", PATTERN)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_archives_go_through_restic_and_what_is_the_same_is_stored_once(
    restic: Path, disk: Path, tmp_path: Path
) -> None:
    sizes = [_size(restic)]
    for night in ("1", "2"):
        manifest = f"exec:restic -q backup --stdin --stdin-filename m --tag m{night}"
        archive = f"exec:restic -q backup --stdin --stdin-filename a --tag a{night}"
        words = ("backup", "--quiet", "--stable", "--disk", f"sda={disk}")
        good(*words, "--manifest", manifest, archive)
        sizes.append(_size(restic))
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert second < first / 3
    manifest, archive = (
        "exec:restic -q dump --tag m2 latest m",
        "exec:restic -q dump --tag a2 latest a",
    )
    good("restore", "--quiet", "--manifest", manifest, archive, tmp_path / "back")
    (back,) = (tmp_path / "back").glob("*.raw")
    assert back.read_bytes() == disk.read_bytes()


def test_a_backup_that_is_cancelled_leaves_no_lock_and_no_snapshot_in_restic(
    restic: Path, disk: Path
) -> None:
    words = ("backup", "--json", "--speed", "1M", "--disk", f"sda={disk}")
    with started(*words, "exec:restic -q backup --stdin --stdin-filename a") as process:
        # More than the pipe takes: restic reads, so it has long made its lock.
        while next_event(process, "progress")["stored_bytes"] < 2 << 20:
            pass
        assert list((restic / "locks").iterdir())
        process.terminate()
        assert end_of(process)[0] != 0
    assert not list((restic / "locks").iterdir())
    assert not list((restic / "snapshots").iterdir())


def test_who_needs_only_the_beginning_of_an_archive_leaves_no_lock_in_restic(
    restic: Path, disk: Path
) -> None:
    make = "exec:restic -q backup --stdin --stdin-filename a"
    good("backup", "--quiet", "--no-manifest", "--disk", f"sda={disk}", make)
    assert b"sda" in good("list", "exec:restic -q dump latest a | cat")
    assert not list((restic / "locks").iterdir())


def test_archives_go_through_borg(
    need: Need, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (borg,) = need("borg")
    monkeypatch.setenv("BORG_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
    place = tmp_path / "repository"
    subprocess.run([borg, "init", "-e", "none", str(place)], check=True, timeout=LIMIT_S)
    small = "--chunker-params buzhash,14,20,16,4095"
    archive = f"exec:borg create -C zstd,3 {small} --stdin-name vm.vma {place}::n1 -"
    good("backup", "--quiet", "--stable", "--disk", f"sda={disk}", archive)
    good("restore", "--quiet", f"exec:borg extract --stdout {place}::n1 vm.vma", tmp_path / "back")
    (back,) = (tmp_path / "back").glob("*.raw")
    assert back.read_bytes() == disk.read_bytes()
