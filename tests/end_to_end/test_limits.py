# SPDX-License-Identifier: Apache-2.0
"""Backups and restores where the host allows little: few descriptors, a TMPDIR that is too long."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import VMA, VMAPIPE, bad, good, make_disk


def limited(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_soft_limit_of_24_descriptors_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    disks = [make_disk(tmp_path / f"{letter}.raw", "A0h") for letter in "abcdefgh"]
    words = [word for disk in disks for word in ("--disk", disk)]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    archive = tmp_path / "v.vma"
    good("backup", *words, archive, preexec_fn=limited(24, hard))
    good("restore", archive, tmp_path / "out", preexec_fn=limited(24, hard))
    good("extract", archive, tmp_path / "vma", tool=VMA, preexec_fn=limited(24, hard))
    for disk in disks:
        assert (tmp_path / "out" / f"disk-{disk.name}.raw").read_bytes() == disk.read_bytes()
        assert (tmp_path / "vma" / f"disk-{disk.name}.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("hard", [20, 14])
def test_a_hard_limit_below_what_a_job_needs_is_said_at_once(tmp_path: Path, hard: int) -> None:
    disk = make_disk(tmp_path / "a.raw", "A")
    good("backup", "--disk", disk, tmp_path / "v.vma")
    for tool, words in (
        (VMAPIPE, ("backup", "--disk", disk, tmp_path / "w.vma")),
        (VMAPIPE, ("restore", tmp_path / "v.vma", tmp_path / "o")),
        (VMA, ("extract", tmp_path / "v.vma", tmp_path / "o")),
    ):
        text = bad(*words, tool=tool, preexec_fn=limited(hard, hard))
        assert f"only {hard} files may be open here" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.raw",
        "v.vma",
        "v.vma.manifest.json",
    ]


def test_descriptors_that_do_not_reach_for_all_disks_are_said_as_that(tmp_path: Path) -> None:
    disks = [make_disk(tmp_path / f"{number}.raw", "A") for number in range(24)]
    words = [word for disk in disks for word in ("--disk", disk)]
    text = bad("backup", *words, tmp_path / "v.vma", preexec_fn=limited(34, 34))
    assert text.splitlines()[-1] == (
        "vmapipe backup: no more files can be opened here: raise the limit (`ulimit -n`, "
        "LimitNOFILE= of a unit)"
    )
    assert not list(tmp_path.glob("v.vma*"))


def test_a_tmpdir_too_long_for_sockets_does_not_matter(tmp_path: Path) -> None:
    long = tmp_path / ("y" * 90)
    long.mkdir()
    environment = {**os.environ, "TMPDIR": str(long)}
    disk = make_disk(tmp_path / "a.raw", "A0h")
    good("backup", "--disk", disk, tmp_path / "v.vma", env=environment)
    good("restore", tmp_path / "v.vma", tmp_path / "out", env=environment)
    assert (tmp_path / "out" / "disk-a.raw.raw").read_bytes() == disk.read_bytes()
    assert list(long.iterdir()) == []
