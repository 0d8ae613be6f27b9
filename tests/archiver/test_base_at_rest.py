# SPDX-License-Identifier: Apache-2.0
"""Backups of disks at rest that build on a base, as a user runs them: what is sent, and what damage and deaths cost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.archiver.changing import PATTERN, change, restored
from tests.archiver.job.world import read_images
from tests.machine import (
    LIMIT_S,
    bad,
    children,
    eventually,
    good,
    make_disk,
    next_event,
    started,
    without_limit,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES


def incremental(disk: Path, new: Path, *more: str | Path) -> dict[str, dict[str, Any]]:
    """Back up with `--base auto`; the last event of each name."""
    out = good("backup", "--json", "--base", "auto", *more, "--disk", f"a={disk}", new)
    return {event["event"]: event for event in map(json.loads, out.splitlines())}


def test_of_a_disk_at_rest_little_more_than_what_has_changed_is_sent(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN, tail_bytes=5000)
    first = incremental(disk, tmp_path / "vm-2026-01-01.vma")
    assert not first["base"]["devices"][0]["incremental"]
    changed = change(disk, 0, 1, 58, 120, 299 - 4)
    with disk.open("r+b") as file:  # one that becomes zero
        file.seek(5 * CLUSTER_BYTES)
        file.write(bytes(CLUSTER_BYTES))
    for day, clusters in ((2, len(changed)), (3, 0)):
        told = incremental(disk, tmp_path / f"vm-2026-01-0{day}.vma")
        assert told["base"]["devices"] == [{"name": "a", "incremental": True, "reason": ""}]
        assert told["base"]["archive"] == str(tmp_path / f"vm-2026-01-0{day - 1}.vma")
        assert told["transfer"]["sent_bytes"] <= 1.1 * clusters * CLUSTER_BYTES
    assert restored(tmp_path / "vm-2026-01-03.vma", tmp_path / "out") == disk.read_bytes()


def test_digests_that_are_damaged_or_lost_cost_time_and_nothing_else(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    digests = tmp_path / "vm-2026-01-01.vma.digests"
    raw = bytearray(digests.read_bytes())
    change(disk, 3)
    damages = {"1": raw[:-1], "2": b"", "3": bytes(len(raw)), "4": None}
    raw[4096 : 4096 + 16 * 20] = random.Random(3).randbytes(16 * 20)
    damages["5"] = raw
    for name, content in damages.items():
        digests.unlink(missing_ok=True)
        if content is not None:
            digests.write_bytes(content)
        words = ("--base", tmp_path / "vm-2026-01-01.vma", "--disk", f"a={disk}")
        good("backup", *words, tmp_path / f"new{name}.vma")
        out = tmp_path / f"out{name}"
        assert restored(tmp_path / f"new{name}.vma", out) == disk.read_bytes()


def test_several_disks_of_which_one_is_new(tmp_path: Path) -> None:
    a = make_disk(tmp_path / "a", PATTERN)
    b = make_disk(tmp_path / "b", "A0p" * 30, seed=2)
    incremental(a, tmp_path / "vm-2026-01-01.vma")
    change(a, 7)
    told = incremental(a, tmp_path / "vm-2026-01-02.vma", "--disk", f"0={b}")
    reasons = {device["name"]: device["reason"] for device in told["base"]["devices"]}
    assert reasons["a"] == ""
    assert "does not have this device" in reasons["0"]
    good("verify", tmp_path / "vm-2026-01-02.vma")
    change(b, 4)
    told = incremental(a, tmp_path / "vm-2026-01-03.vma", "--disk", f"0={b}")
    assert all(device["incremental"] for device in told["base"]["devices"])
    good("verify", tmp_path / "vm-2026-01-03.vma")
    good("restore", tmp_path / "vm-2026-01-03.vma", tmp_path / "out")
    assert (tmp_path / "out" / "disk-a.raw").read_bytes() == a.read_bytes()
    assert (tmp_path / "out" / "disk-0.raw").read_bytes() == b.read_bytes()


def test_a_disk_of_zeroes_that_takes_anothers_number_does_not_take_its_digests(
    tmp_path: Path,
) -> None:
    a, b = (make_disk(tmp_path / name, "A" * 9, seed=seed) for seed, name in enumerate("ab"))
    empty = make_disk(tmp_path / "c", "h" * 9)
    archives = [tmp_path / f"vm-2026-01-0{day}.vma" for day in (1, 2, 3)]
    incremental(a, archives[0], "--disk", f"b={b}")
    told = incremental(a, archives[1], "--disk", f"c={empty}")
    assert [device["incremental"] for device in told["base"]["devices"]] == [False, True]
    # The data that had that number: nothing of it is in the base.
    words = ("--json", "--base", "auto", "--disk", f"c={b}", "--disk", f"a={a}", archives[2])
    events = [json.loads(line) for line in good("backup", *words).splitlines()]
    (base,) = [event for event in events if event["event"] == "base"]
    assert [device["incremental"] for device in base["devices"]] == [True, True]
    sent = {e["device"]: e["sent_bytes"] for e in events if e["event"] == "transfer"}
    assert sent == {"a": 0, "c": b.stat().st_size}
    disks = read_images(archives[2].read_bytes())
    assert disks == {"a": a.read_bytes(), "c": b.read_bytes()}


def test_damage_in_the_base_makes_a_full_backup_by_itself_and_says_so(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    with (tmp_path / "vm-2026-01-01.vma").open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"damage")
    told = incremental(disk, tmp_path / "vm-2026-01-02.vma")
    assert "This is a full backup instead" in told["notice"]["text"]
    assert "at offset" in told["notice"]["text"]
    assert restored(tmp_path / "vm-2026-01-02.vma", tmp_path / "out") == disk.read_bytes()


@pytest.mark.parametrize("victim", ["vmapipe.archiver.main", "vmapipe.producer.main", ""])
def test_a_kill_in_the_middle_leaves_nothing_and_the_base_as_it_was(
    tmp_path: Path, victim: str
) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    before = {path.name for path in tmp_path.iterdir()}
    change(disk, *range(0, 300, 2))
    new = tmp_path / "vm-2026-01-02.vma"
    words = ("backup", "--json", "--speed", "1M", "--base", "auto", "--disk", f"a={disk}", new)
    with started(*words) as process:
        next_event(process, "progress")
        for child in children(process, victim) if victim else [psutil.Process(process.pid)]:
            child.kill()
        process.wait(LIMIT_S)
    assert eventually(lambda: {path.name for path in tmp_path.iterdir()} == before)
    incremental(disk, new)
    assert restored(new, tmp_path / "out") == disk.read_bytes()


def test_a_base_that_vanishes_in_the_middle_is_used_to_its_end(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    new = tmp_path / "vm-2026-01-02.vma"
    words = ("backup", "--json", "--speed", "1M", "--base", "auto", "--disk", f"a={disk}", new)
    with started(*words) as process:
        next_event(process, "progress")
        for path in tmp_path.glob("vm-2026-01-01*"):
            path.unlink()
        without_limit(process)
        _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, said
    assert restored(new, tmp_path / "out") == disk.read_bytes()


def test_a_base_may_lie_on_another_file_system(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN, tail_bytes=5000)
    first = tmp_path / "vm-2026-01-01.vma"
    incremental(disk, first)
    change(disk, 3)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
        assert os.stat(there).st_dev != tmp_path.stat().st_dev, "one file system"
        new = Path(there) / "vm-2026-01-02.vma"
        good("backup", "--base", first, "--disk", f"a={disk}", new)
        assert restored(new, tmp_path / "out") == disk.read_bytes()
        # The digests came over, too: nothing but them would tell what is unchanged.
        told = incremental(disk, Path(there) / "vm-2026-01-03.vma")
        assert told["transfer"]["sent_bytes"] == 0


def test_two_backups_with_one_base_at_once_both_end_well(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", PATTERN)
    incremental(disk, tmp_path / "vm-2026-01-01.vma")
    change(disk, 9)
    words = ("backup", "--base", tmp_path / "vm-2026-01-01.vma", "--disk", f"a={disk}")
    with started(*words, tmp_path / "x.vma") as one, started(*words, tmp_path / "y.vma") as other:
        for process in (one, other):
            _, said = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, said
    for name in ("x", "y"):
        assert restored(tmp_path / f"{name}.vma", tmp_path / name) == disk.read_bytes()


def test_an_archive_that_cannot_be_a_base_says_so_when_it_is_made(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A")
    first = tmp_path / "vm-2026-01-01.vma"
    told = incremental(disk, first, "--manifest", tmp_path / "elsewhere.json")
    assert "cannot be the base of a later one" in told["notice"]["text"]
    told = incremental(disk, tmp_path / "vm-2026-01-02.vma")
    assert "no manifest" in told["base"]["devices"][0]["reason"]
    for word, value in (("--full-every", "3"), ("--sample", "2")):
        said = bad("backup", word, value, "--disk", f"a={disk}", tmp_path / "x.vma", code=2)
        assert f"{word} says something of --base" in said


def test_a_disk_that_is_full_before_all_is_taken_from_the_base_leaves_the_base_alone(
    tmp_path: Path,
) -> None:
    if os.geteuid():
        pytest.skip("mounting needs root")
    disk = make_disk(tmp_path / "disk", "A" * 150)
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=15M", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        first, new = folder / "vm-2026-01-01.vma", folder / "vm-2026-01-02.vma"
        incremental(disk, first)
        before = sorted(path.name for path in folder.iterdir())
        change(disk, 3)
        said = bad("backup", "--base", "auto", "--disk", f"a={disk}", new)
        assert "No space left on device" in said
        assert "free space or choose another folder" in said
        assert sorted(path.name for path in folder.iterdir()) == before
        good("verify", first)
    finally:
        subprocess.run(["umount", folder], check=True, timeout=LIMIT_S)


# --- file systems on which files share blocks ---


@pytest.fixture(params=["xfs", "btrfs"])
def sharing(
    request: pytest.FixtureRequest, tmp_path: Path, need: Callable[..., list[str]]
) -> Iterator[Path]:
    """A folder on a file system in which files can share blocks."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    (mkfs,) = need(f"mkfs.{request.param}")
    image, folder = tmp_path / "image", tmp_path / "fs"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([mkfs, "-q", image], check=True, capture_output=True, timeout=LIMIT_S)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=LIMIT_S)


def used_bytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_where_blocks_can_be_shared_an_archive_takes_what_has_changed(
    sharing: Path, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 1000)
    config = tmp_path / "config"
    config.write_text("x")
    incremental(disk, sharing / "vm-2026-01-01.vma")
    changed = change(disk, 5, 444, 900, 901)
    for day, clusters, text in ((2, len(changed), "x"), (3, 0, "y" * 3000)):
        # The second one's header is longer: what follows is brought into phase again.
        config.write_text(text)
        before = used_bytes(sharing)
        told = incremental(disk, sharing / f"vm-2026-01-0{day}.vma", "--config", config)
        extents = 1000 // 58 + 1
        # A block for each extent's header, the archive's own, and what lies beside it.
        besides = extents * 4096 + 300 * 1024
        assert used_bytes(sharing) - before <= 1.05 * clusters * CLUSTER_BYTES + besides
        assert (
            told["stored"]["shared_bytes"] > (999 - clusters) * CLUSTER_BYTES - 3 * extents * 4096
        )
        out = tmp_path / str(day)
        assert restored(sharing / f"vm-2026-01-0{day}.vma", out) == disk.read_bytes()
