# SPDX-License-Identifier: Apache-2.0
"""A folder of archives as one thing: listed, verified, and what was verified when."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.archives import archive, manifest
from tests.machine import bad, good, run
from vmapipe.places.archives import condition, find_archives
from vmapipe.places.place import ArchiveFolder, is_place
from vmapipe.places.verified import (
    MAX_BYTES,
    Candidate,
    Verified,
    choose_due,
    decode_verified,
    encode_verified,
)

RAW = archive({"a": bytes(65536) + b"data" * 30000}, {"c": b"1"})


def _kept(folder: Path, name: str, *, damaged: bool = False) -> Path:
    path = folder / name
    path.write_bytes(RAW[:-1] + b"!" if damaged else RAW)
    (folder / f"{name}.manifest.json").write_bytes(manifest(RAW))
    return path


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    lines = good("list", "--json", folder).splitlines()
    return {Path(each["archive"]).name: each for each in map(json.loads, lines)}


def test_a_folder_is_listed_with_all_that_is_known_of_each_archive(tmp_path: Path) -> None:
    _kept(tmp_path, "vm-2026-01-02.vma")
    _kept(tmp_path, "vm-2026-01-01.vma")
    (tmp_path / "vm-2026-01-01.vma.protected").touch()
    (tmp_path / "db-2026-01-01.vma.age").write_bytes(b"age-encryption.org/v1\n")
    (tmp_path / "evil\x1b[2J\nname.vma").write_bytes(b"")
    (tmp_path / "vm-2026-01-01.vma.verified.json").write_text('{"format": "vmapipe-verified"')
    os.mkfifo(tmp_path / "fifo.vma")
    os.mkfifo(tmp_path / "vm-2026-01-02.vma.verified.json")
    (tmp_path / "folder.vma").mkdir()
    (tmp_path / "link.vma").symlink_to("vm-2026-01-01.vma")
    (tmp_path / "other.txt").touch()
    text = good("list", tmp_path).decode()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].endswith(": 4 archives")
    assert lines[1].split() == ["MACHINE", "TIME", "SIZE", "VERIFIED", "SHARED", "STATE", "ARCHIVE"]
    assert [line.split()[-1] for line in lines[2:]] == [
        "db-2026-01-01.vma.age",
        "evil\\x1b[2J\\nname.vma",
        "vm-2026-01-01.vma",
        "vm-2026-01-02.vma",
    ]
    assert "encrypted" in lines[2]
    assert "no manifest" in lines[2]
    assert "protected" in lines[4]
    assert "2026-01-01 00:00:00" in lines[4]
    assert "never" in lines[4]
    found = _listed(tmp_path)["vm-2026-01-01.vma"]
    assert (found["machine"], found["bytes"], found["protected"]) == ("vm", len(RAW), True)
    # Several on one command line, archives and folders; one that is nowhere ends nothing.
    done = run("list", tmp_path, tmp_path / "missing", tmp_path / "vm-2026-01-01.vma")
    assert done.returncode == 1
    assert b"device   1" in done.stdout
    assert b"missing" in done.stderr


def test_a_name_as_long_as_a_name_can_be_is_listed_verified_and_removed(tmp_path: Path) -> None:
    name = f"{'n' * 240}-2026-01-01.vma"
    (tmp_path / name).write_bytes(RAW)
    (tmp_path / f"{'n' * 240}-2026-01-02.vma").write_bytes(RAW)
    assert _listed(tmp_path)[name]["manifest"] is False
    done = run("verify", "--quiet", tmp_path)
    assert done.returncode == 0
    (line,) = done.stderr.decode().splitlines()  # not one for each
    assert "is not kept there" in line
    good("prune", "--keep-last=1", "--yes", tmp_path)
    assert os.listdir(tmp_path) == [f"{'n' * 240}-2026-01-02.vma"]


def test_a_damaged_archive_does_not_end_the_walk_and_verdicts_stay_beside_them(
    tmp_path: Path,
) -> None:
    for day in (1, 2, 3):
        _kept(tmp_path, f"vm-2026-01-0{day}.vma", damaged=day == 2)
    (tmp_path / "cut-2026-01-01.vma").write_bytes(RAW[:100])
    done = run("verify", "--quiet", tmp_path)
    assert done.returncode == 4
    told = done.stderr.decode().splitlines()
    assert [Path(line.split(": ")[1].split(" is ")[0]).name for line in told[:2]] == [
        "cut-2026-01-01.vma",
        "vm-2026-01-02.vma",
    ]
    assert told[-1] == "vmapipe verify: something is wrong with 2 of 4 archives"
    state = {name: each["verified"] for name, each in _listed(tmp_path).items()}
    assert {name: each["ok"] for name, each in state.items()} == {
        "cut-2026-01-01.vma": False,
        "vm-2026-01-01.vma": True,
        "vm-2026-01-02.vma": False,
        "vm-2026-01-03.vma": True,
    }
    assert state["vm-2026-01-01.vma"]["data_checked"]
    # What was whole just now is not due; what is damaged is, and what has changed since.
    (tmp_path / "vm-2026-01-03.vma").write_bytes(RAW)
    os.utime(tmp_path / "vm-2026-01-03.vma", (1, 1))
    os.unlink(tmp_path / "cut-2026-01-01.vma")
    text = run("verify", "--older-than", "7d", tmp_path).stdout.decode()
    assert "2 of 3 archives are due" in text
    assert "1 of 3 archives are due" in run("verify", "--sample=10%", tmp_path).stdout.decode()
    assert "one archive" in bad("verify", "--sample=5%", tmp_path / "vm-2026-01-01.vma", code=2)


def test_a_place_without_any_archive_is_no_success_of_a_verification(tmp_path: Path) -> None:
    """Else a folder that is not mounted would be sound each night."""
    whole, empty = tmp_path / "whole", tmp_path / "empty"
    for folder in (whole, empty):
        folder.mkdir()
    (whole / "vm-2026-01-01.vma").write_bytes(RAW)
    good("verify", whole)
    assert f"there is no archive in {empty}" in bad("verify", "--older-than", "7d", empty)
    done = run("verify", empty, whole)
    assert done.returncode == 1
    assert b"1 of 1 archives are due" in done.stdout
    assert b"something is wrong with 1 of 2 archives" in done.stderr


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 100), max_size=9),
    st.one_of(st.none(), st.integers(0, 100)),
    st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_as_many_runs_as_make_a_whole_see_every_archive(
    seen: dict[str, int], older_s: float | None, sample: float | None
) -> None:
    now = 1000.0
    times = {name: float(at) for name, at in seen.items()}
    runs = 0
    while due := choose_due(
        [Candidate(*each) for each in times.items()], older_s or 1, sample, now
    ):
        if sample is not None:
            assert len(due) <= max(1, sample * len(times) + 1)
        times.update(dict.fromkeys(due, now))
        runs += 1
    assert all(at > now - (older_s or 1) for at in times.values())
    assert runs <= 1 if sample is None else runs <= 1 / sample + 1


@pytest.mark.parametrize(
    "raw",
    [
        None,
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 3000,
        b"x" * (MAX_BYTES + 1),
        b'{"format": "vmapipe-verified", "version": 1, "time_s": 1e999, "identity": "i"}',
        b'{"format": "vmapipe-verified", "version": 1, "time_s": "NaN", "identity": "i"}',
        encode_verified(Verified(2**40, True, True, "i")),
        encode_verified(Verified(-5, True, True, "i")),
        encode_verified(Verified(5, True, True, "another")),
    ],
)
def test_a_hostile_verdict_is_none(raw: bytes | None) -> None:
    assert decode_verified(raw, "i", 1000.0) is None


def test_a_verdict_is_what_was_written_and_counts_for_that_file_only() -> None:
    verified = Verified(999, True, False, "i")
    assert decode_verified(encode_verified(verified), "i", 1000.0) == verified


def test_shared_blocks_are_counted_where_the_file_system_tells(tmp_path: Path) -> None:
    _kept(tmp_path, "vm-2026-01-01.vma")
    shutil.copy(tmp_path / "vm-2026-01-01.vma", tmp_path / "vm-2026-01-02.vma")
    with contextlib.closing(ArchiveFolder(str(tmp_path))) as place:
        for each in find_archives(place):
            assert condition(place, each).shared_bytes in (None, 0)


def test_a_name_in_a_store_is_an_archive_by_its_ending() -> None:
    assert not is_place("s3://bucket/vm.vma.zst.age")
    assert is_place("s3://bucket")
    assert is_place("s3://bucket/prefix/")
