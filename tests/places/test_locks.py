# SPDX-License-Identifier: Apache-2.0
"""`--lock` in folders: files that not even root removes until they are due, and prune that waits for it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.archives import archive, manifest
from tests.machine import bad, good, make_disk
from vmapipe.places.place import ArchiveFolder
from vmapipe.places.removal import remove
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.immutable import WITHOUT_END_S, check_folder, lift, lock_files, locked_until

RAW = archive({"a": b"data" * 30000})
NAME = "vm-2026-01-01.vma"
_CAP_LINUX_IMMUTABLE, _PR_CAPBSET_DROP = 9, 24


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder whose files can be made immutable, and are not any more afterwards."""
    folder = tmp_path / "place"
    folder.mkdir()
    try:
        check_folder(str(folder))
    except Failure as failure:
        pytest.skip(str(failure))
    yield folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: WITHOUT_END_S + 1)
        with HeldFolder(str(folder)) as held:
            for name in sorted(held.names(), key=lambda each: each.endswith(".lock.json")):
                lift(held, name)


def _without_the_right() -> None:
    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_LINUX_IMMUTABLE, 0, 0, 0)


def test_a_locked_backup_stays_whoever_wants_to_remove_it_until_it_is_due(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(tmp_path / "d.raw", "A0p")
    other = place / "vm-2026-01-02.vma"
    good("backup", "--quiet", "--disk", f"d={disk}", "--lock=30d", place / NAME)
    good("copy", "--quiet", place / NAME, tmp_path)
    good("backup", "--quiet", "--disk", f"d={disk}", other)
    for name in (NAME, f"{NAME}.manifest.json", f"{NAME}.lock.json"):
        with pytest.raises(PermissionError):
            os.unlink(place / name)
        with pytest.raises(PermissionError):
            (place / name).write_bytes(b"")
    (listed, _) = (json.loads(line) for line in good("list", "--json", place).splitlines())
    assert listed["locked_until"] - time.time() > 29 * 86400
    assert "locked until" in good("list", place).decode()
    said = good("prune", "--keep-last=1", "--yes", place).decode().splitlines()
    assert said[1].startswith("keep (locked until 20")
    assert (place / NAME).exists()
    # A copy elsewhere is not locked, and nothing else of the place is.
    assert not (tmp_path / f"{NAME}.lock.json").exists()
    with contextlib.closing(ArchiveFolder(str(place))) as kept:
        with pytest.raises(Failure, match="locked until"):
            remove(kept, NAME)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 31 * 86400)
        remove(kept, NAME)
    assert sorted(os.listdir(place)) == [other.name, f"{other.name}.manifest.json"]


def test_what_a_backup_puts_beside_it_is_locked_and_goes_with_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(tmp_path / "d.raw", "A0p")
    words = ("--disk", f"drive-scsi0={disk}", "--lock=30d", "--vmid=100", "--notes=mine")
    (tmp_path / "100.conf").write_text(f"scsi0: local:{disk}\n")
    good("backup", "--quiet", *words, "--config", tmp_path / "100.conf", place)
    names = sorted(os.listdir(place))
    archive_name = next(name for name in names if name.endswith(".vma"))
    endings = ("", ".lock.json", ".manifest.json", ".notes")
    log = archive_name.replace(".vma", ".log")
    assert names == [log, *(f"{archive_name}{ending}" for ending in endings)]
    for name in names:
        with pytest.raises(PermissionError):
            os.unlink(place / name)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 31 * 86400)
    with contextlib.closing(ArchiveFolder(str(place))) as kept:
        remove(kept, archive_name)
    assert os.listdir(place) == []


def test_repack_and_copy_lock_what_they_store(place: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(RAW)
    other = "vm-2026-01-03.vma"
    (tmp_path / other).write_bytes(RAW)
    for name in (NAME, other):
        (tmp_path / f"{name}.manifest.json").write_bytes(manifest(RAW))
        for ending in (".vma.notes", ".vma.protected", ".vma.verified.json", ".log"):
            (tmp_path / name.replace(".vma", ending)).write_bytes(b"what stands beside it")
    good("copy", "--quiet", "--lock=1h", tmp_path / NAME, place)
    good("copy", "--quiet", "--lock=1h", "--compress=zstd:1", tmp_path / other, place)
    good("repack", "--quiet", "--lock=1h", tmp_path / NAME, place / "other.vma")
    marks = {f"{NAME}.protected", f"{other}.zst.protected"}
    beside = {f"{NAME}.notes", f"{other}.zst.notes", *(n[:-4] + ".log" for n in (NAME, other))}
    with HeldFolder(str(place)) as held:
        names = set(held.names())
        assert names > beside | marks
        for name in names:
            # Who has protected it takes that back by hand, and lifts nothing for it.
            assert (locked_until(held, name) > time.time()) == (name not in marks), name


def test_who_may_not_lock_is_told_before_the_backup_begins(place: Path, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A0p")
    words = ["--disk", f"d={disk}", "--lock=30d", str(place / NAME)]
    text = bad("backup", *words, preexec_fn=_without_the_right)
    assert "cannot be made immutable: that takes root" in text
    assert os.listdir(place) == []
    assert "stream" in bad("backup", "--disk", f"d={disk}", "--lock=30d", "exec:cat", code=2)
    assert "--lock-mode" in bad("backup", *words, "--lock-mode=governance", code=2)
    (tmp_path / NAME).write_bytes(RAW)
    assert "give --lock" in bad("copy", tmp_path / NAME, place, "--lock-mode=governance", code=2)
    assert "cannot be made" in bad(
        "copy", tmp_path / NAME, place, "--lock=1d", preexec_fn=_without_the_right
    )
    service = ["archiver", "--listen", f"ipc://{tmp_path}/s", "--directory", str(place)]
    assert "cannot be made" in bad(*service, "--lock=1d", preexec_fn=_without_the_right)


@pytest.mark.parametrize(
    "record", [b"", b"[]", b'{"format": "vmapipe-lock", "until": "x"}', b"\xff" * 9000]
)
def test_a_record_that_says_nothing_leaves_it_locked_without_an_end(
    record: bytes, place: Path
) -> None:
    (place / NAME).write_bytes(RAW)
    lock_files(str(place / NAME), [], time.time() + 3600)
    with HeldFolder(str(place)) as held:
        assert 0 < locked_until(held, NAME) - time.time() <= 3600
        # As root may; then somebody writes what he likes, and it is not immutable any more.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: WITHOUT_END_S + 1)
            lift(held, f"{NAME}.lock.json")
        (place / f"{NAME}.lock.json").write_bytes(record)
        assert locked_until(held, NAME) == WITHOUT_END_S
