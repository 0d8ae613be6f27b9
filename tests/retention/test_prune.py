# SPDX-License-Identifier: Apache-2.0
"""`vmapipe prune` on real folders, and the names that it reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.machine import bad, good, run
from vmapipe.control.retention.names import parse


@pytest.mark.parametrize(
    ("name", "group", "when"),
    [
        (
            "vzdump-qemu-100-2026_01_31-02_03_04.vma.zst",
            "vzdump-qemu-100",
            (2026, 1, 31, 2, 3, 4),
        ),
        ("vzdump-qemu-7-2012_11_30-09_22_00.vma", "vzdump-qemu-7", (2012, 11, 30, 9, 22, 0)),
        ("vm-2026-01-31.vma", "vm", (2026, 1, 31, 0, 0, 0)),
        ("my-vm_20260131T0203.vma.gz", "my-vm", (2026, 1, 31, 2, 3, 0)),
        ("a.b-2026-01-31T02:03:04Z.vma.lzo", "a.b", (2026, 1, 31, 2, 3, 4)),
    ],
)
def test_names_with_a_date_are_understood(name: str, group: str, when: tuple[int, ...]) -> None:
    assert parse(name) == (group, when)


@pytest.mark.parametrize(
    "name",
    [
        "vm.vma",
        "vm-2026-02-30.vma",
        "vm-2026-01-31-25_00_00.vma",
        "vm-2026-01-31.vma.partial",
        "vm-2026-01-31.vma.zst.notes",
        "2026-01-31.vma",
        "vm-2026-01-31.raw",
        "vm-2026-01-31.vma\n",
    ],
)
def test_what_says_no_time_is_left_alone(name: str) -> None:
    assert parse(name) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five days of one machine, with all that lies beside an archive; and other things."""
    for day in range(1, 6):
        stem = tmp_path / f"vzdump-qemu-100-2026_01_0{day}-02_00_00"
        for ending in (".vma.zst", ".vma.zst.notes", ".vma.zst.manifest.json", ".log"):
            Path(f"{stem}{ending}").write_text("x")
    (tmp_path / "vzdump-qemu-100-2026_01_02-02_00_00.vma.zst.protected").touch()
    (tmp_path / "db-2020-01-01.vma").write_text("x")
    (tmp_path / "vm.vma").write_text("x")
    (tmp_path / "db-2020-01-02.vma").symlink_to(tmp_path / "vm.vma")
    (tmp_path / "db-2020-01-03.vma").mkdir()
    return tmp_path


def days(folder: Path) -> set[str]:
    return {path.name[24:26] for path in folder.glob("vzdump-*")}


def test_without_yes_it_is_only_said(folder: Path) -> None:
    before = sorted(folder.iterdir())
    text = good("prune", folder, "--keep-last", "1").decode()
    assert "remove             " + str(folder / "vzdump-qemu-100-2026_01_04") in text
    assert "keep (last)        " + str(folder / "vzdump-qemu-100-2026_01_05") in text
    assert "keep (protected)   " + str(folder / "vzdump-qemu-100-2026_01_02") in text
    assert text.endswith("nothing was removed: --yes does it\n")
    assert sorted(folder.iterdir()) == before


def test_with_yes_an_archive_goes_with_all_that_belongs_to_it(folder: Path) -> None:
    good("prune", folder, "--keep-last", "1", "--yes")
    assert days(folder) == {"02", "05"}
    assert len(list(folder.glob("vzdump-*"))) == 2 * 4 + 1
    # One of its machine; no date; no files.
    for name in ("db-2020-01-01.vma", "vm.vma", "db-2020-01-02.vma", "db-2020-01-03.vma"):
        assert os.path.lexists(folder / name)


def test_one_machine_alone_may_be_chosen(folder: Path) -> None:
    (folder / "db-2020-01-05.vma").write_text("x")
    good("prune", folder, "--only", "db", "--keep-yearly", "1", "--yes")
    assert days(folder) == {"01", "02", "03", "04", "05"}
    assert not (folder / "db-2020-01-01.vma").exists()
    text = bad("prune", folder, "--only", "dx", "--keep-last", "1", code=2)
    assert "no archives of it" in text


def test_json_says_the_same(folder: Path) -> None:
    lines = good("prune", folder, "--json", "--keep-last", "1", "--yes").splitlines()
    found = {line["archive"]: line for line in map(json.loads, lines)}
    line = found[str(folder / "vzdump-qemu-100-2026_01_04-02_00_00.vma.zst")]
    assert line == {
        "archive": str(folder / "vzdump-qemu-100-2026_01_04-02_00_00.vma.zst"),
        "group": "vzdump-qemu-100",
        "mark": "remove",
        "rule": "",
        "bytes": 1,
        "removed": True,
    }
    assert found[str(folder / "db-2020-01-01.vma")]["mark"] == "keep"


def test_keep_all_keeps_all(folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert b"keep (all)" in good("prune", folder, "--keep-all", "--yes")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "say what to keep"),
        (["--keep-last", "0"], "say what to keep"),
        (["--keep-all", "--keep-last", "1"], "leaves nothing"),
        (["--keep-last", "-1"], "is no number of archives"),
        (["--keep-daily", "x"], "is no number of archives"),
    ],
)
def test_what_would_be_a_mistake_is_refused(folder: Path, words: list[str], text: str) -> None:
    assert text in bad("prune", folder, "--yes", *words, code=2)
    assert days(folder) == {"01", "02", "03", "04", "05"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    text = bad("prune", tmp_path / "none", "--keep-last", "1")
    assert text.endswith("none: No such file or directory")


def test_what_cannot_be_removed_is_named_and_the_rest_goes(folder: Path) -> None:
    stuck = folder / "vzdump-qemu-100-2026_01_01-02_00_00.vma.zst.notes"
    stuck.unlink()
    stuck.mkdir()
    words = ("prune", folder, "--keep-last", "1", "--yes", "--only", "vzdump-qemu-100")
    done = run(*words)
    assert done.returncode == 1
    assert f"cannot remove {stuck}" in done.stderr.decode()
    assert "1 archives could not be removed" in done.stderr.decode()
    assert days(folder) == {"01", "02", "05"}
