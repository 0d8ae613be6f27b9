# SPDX-License-Identifier: Apache-2.0
"""`vmapipe prune` on real folders, and the names that it reads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, VMAPIPE, bad, good, run
from vmapipe.archiver.base.choice import read_name
from vmapipe.archiver.service.storage import mark_as_service
from vmapipe.places.place import ArchiveFolder
from vmapipe.places.removal import remove


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
    assert read_name(name) == (group, when)


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
    assert read_name(name) is None


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
        (["--keep-last", "-1"], "is not a number of archives"),
        (["--keep-daily", "x"], "is not a number of archives"),
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
    # And all else of that archive, its log, too.
    assert [path.name for path in folder.glob("vzdump-qemu-100-2026_01_01*")] == [stuck.name]
    assert days(folder) == {"01", "02", "05"}


def archive(folder: Path, name: str, age_s: float) -> Path:
    """One that was stored so long ago."""
    path = folder / name
    path.write_text("x")
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def dated(age_s: float, group: str = "vm") -> str:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(time.time() - age_s))
    return f"{group}-{stamp}.vma"


DAY = 86400.0


@pytest.fixture
def month(tmp_path: Path) -> Path:
    """Thirty days of one client, stored by a service."""
    folder = tmp_path / "client"
    folder.mkdir()
    mark_as_service(str(folder))
    for days_ago in range(1, 31):
        archive(folder, dated(days_ago * DAY), days_ago * DAY)
    return folder


RULES = ("--keep-last", "3", "--keep-daily", "7", "--keep-weekly", "4", "--keep-monthly", "6")


@pytest.mark.parametrize(
    "false_names",
    [
        ["vm-9999-12-29.vma", "vm-9999-12-30.vma", "vm-9999-12-31.vma"],
        [dated(-n * 40 * DAY) for n in range(1, 50)],
        [dated(-n * 3600) for n in range(40)],
        [dated(n * 60) for n in range(60)],
        # A later hour of each day, week and month that has one.
        [dated(n * DAY - 1800) for n in range(1, 31)],
        [dated(n * DAY + 1800) for n in range(1, 31)],
        [dated(n * DAY) + ".zst" for n in range(1, 400)],
        ["vm-0001-01-01.vma", "vm-1970-01-01.vma"],
    ],
    ids=["9999", "years", "hours ahead", "now", "each day", "before", "all days", "old"],
)
def test_names_that_a_thief_stores_now_push_no_true_archive_out(
    tmp_path: Path, month: Path, false_names: list[str]
) -> None:
    """What goes is what would have gone without them, and they are told."""
    untouched = tmp_path / "untouched"
    shutil.copytree(month, untouched, copy_function=shutil.copy2)
    mark_as_service(str(untouched))
    good("prune", untouched, *RULES, "--yes")
    expected = {path.name for path in untouched.iterdir()}
    assert 10 < len(expected) < 30
    for name in false_names:
        archive(month, name, 0)
    done = run("prune", month, *RULES, "--yes")
    assert done.returncode == 0, done.stderr
    left = {path.name for path in month.iterdir()}
    assert left == expected | set(false_names)
    if len(false_names) > 2:
        assert done.stderr.count(b"\n") >= 1


def test_a_name_from_a_time_to_come_counts_for_no_rule_wherever_it_is(tmp_path: Path) -> None:
    """As by a host whose clock was wrong once."""
    for name in ("vm-2026-01-01.vma", "vm-2026-01-02.vma", "vm-2999-01-01.vma"):
        archive(tmp_path, name, 0)
    done = run("prune", tmp_path, "--keep-last", "1", "--yes")
    assert b"keep (future)" in done.stdout
    assert b"1 archives are from a time to come" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"vm-2026-01-02.vma", "vm-2999-01-01.vma"}


def test_what_was_stored_less_long_ago_than_asked_stays_and_counts_for_nothing(
    tmp_path: Path,
) -> None:
    for hours in (1, 20, 30, 60, 90):
        archive(tmp_path, dated(hours * 3600), hours * 3600)
    text = good("prune", tmp_path, "--keep-within", "1d", "--keep-last", "1", "--yes").decode()
    assert text.count("keep (within)") == 2
    assert text.count("keep (last)") == 1
    assert len(list(tmp_path.iterdir())) == 3
    good("prune", tmp_path, "--keep-within", "0", "--keep-last", "1", "--yes")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("time_word", ["x", "-1d", "1y", "", "999999d"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, time_word: str) -> None:
    words = ("prune", tmp_path, "--keep-last", "1", f"--keep-within={time_word}")
    assert "is not a valid time" in bad(*words, code=2)


def test_archives_that_were_copied_without_their_times_stay_until_their_names_are_believed(
    month: Path,
) -> None:
    for path in month.iterdir():
        os.utime(path)
    done = run("prune", month, "--keep-last", "1", "--keep-within", "0", "--yes")
    assert done.returncode == 0
    assert b"stored at another time than their names say" in done.stderr
    assert len(list(month.iterdir())) >= 27
    good("prune", month, "--keep-last", "1", "--keep-within", "0", "--by-name", "--yes")
    assert len(list(month.iterdir())) == 1


def test_a_sudden_flood_of_names_is_told(month: Path) -> None:
    assert run("prune", month, *RULES).stderr == b""
    for minute in range(12):
        archive(month, dated(minute * 60), minute * 60)
    told = run("prune", month, *RULES).stderr
    assert b"'vm': 12 archives were stored within 24 hours, where at most 1 a day" in told


def test_two_prunes_at_once_both_end_well(tmp_path: Path) -> None:
    for turn in range(3):
        for day in range(1, 29):
            for month in (1, 2, 3):
                stem = tmp_path / f"vm-2026-{month:02}-{day:02}"
                for ending in (".vma", ".vma.manifest.json", ".vma.notes", ".log"):
                    Path(f"{stem}{ending}").write_text("x")
        words = [*VMAPIPE, "prune", str(tmp_path), "--keep-last", "1", "--yes"]
        both = [
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(3)
        ]
        for process in both:
            _, said = process.communicate(timeout=LIMIT_S)
            assert (process.returncode, said) == (0, b""), turn
        assert len(list(tmp_path.iterdir())) == 4


def test_links_are_removed_themselves_and_folders_swapped_for_links_lead_nowhere(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "log").write_text("mine")
    (outside / "vm-2026-01-01.vma").write_text("mine")
    place = tmp_path / "in"
    place.mkdir()
    for day in (1, 2):
        archive(place, f"vm-2026-01-0{day}.vma", 0)
    (place / "vm-2026-01-01.log").symlink_to(outside / "log")
    with contextlib.closing(ArchiveFolder(str(place))) as held:
        # As somebody does who may rename above it, in the middle of a prune.
        place.rename(tmp_path / "moved")
        place.symlink_to(outside)
        remove(held, "vm-2026-01-01.vma")
    assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == ["vm-2026-01-02.vma"]
    assert sorted(p.name for p in outside.iterdir()) == ["log", "vm-2026-01-01.vma"]


def test_digits_of_another_alphabet_are_no_date() -> None:
    assert read_name("vm-\u0662\u0660\u0662\u0660-01-01.vma") is None
