# SPDX-License-Identifier: Apache-2.0
"""Archives that are made of a compressed base: what has not changed is taken from it as it is stored there."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.archiver.changing import change, restored
from tests.archiver.job.world import read_images
from tests.machine import good, make_disk
from vmapipe.archiver.base import extents
from vmapipe.archiver.base.check import Base, check_base
from vmapipe.archiver.base.choice import choose_base
from vmapipe.archiver.outputs.manifests import beside
from vmapipe.vma.seektable import FOOTER_BYTES, Frame, parse_seek_table, seek_table_bytes

# Of the data of a dense extent, in bytes: level 1 makes three frames of it.
THIRDS = (310 * 4096, 308 * 4096)
# Dense extents, then some with little data, then zeroes.
PATTERN = "A" * 58 * 3 + "p0" * 58 + "0" * 116 + "A" * 20


def frames_of(archive: Path) -> list[tuple[Frame, bytes]]:
    raw = archive.read_bytes()
    length = seek_table_bytes(raw[-FOOTER_BYTES:])
    assert length is not None
    found, at = [], 0
    for frame in parse_seek_table(raw[-length:]):
        found.append((frame, raw[at : at + frame.compressed_bytes]))
        at += frame.compressed_bytes
    return found


def backup(disk: Path, new: Path, *more: str | Path) -> dict[str, dict[str, Any]]:
    """Back up with `--base auto`; the last event of each name."""
    out = good("backup", "--json", "--base", "auto", *more, "--disk", f"a={disk}", new)
    return {event["event"]: event for event in map(json.loads, out.splitlines())}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", PATTERN, tail_bytes=5000)


def test_what_has_not_changed_is_taken_as_it_is_and_all_read_the_result(
    disk: Path, tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    (zstd,) = need("zstd")
    first, second = (tmp_path / f"vm-2026-01-0{day}.vma.zst" for day in (1, 2))
    backup(disk, first, "--compress", "zstd:1")
    change(disk, 60, 200)
    # Another level: frames that are taken over keep theirs, and are three for an extent.
    told = backup(disk, second, "--compress", "zstd:9")
    assert told["base"]["devices"] == [{"name": "a", "incremental": True, "reason": ""}]
    assert told["transfer"]["sent_bytes"] <= 1.1 * 2 * 65536
    base_data = [raw for frame, raw in frames_of(first) if frame.plain_bytes in THIRDS]
    new_data = [raw for _, raw in frames_of(second)]
    assert [raw in new_data for raw in base_data] == [True] * 3 + [False] * 3 + [True] * 3
    # The reference's way: `zstd -dc | vma`.
    plain = subprocess.run([zstd, "-dc", second], capture_output=True, check=True).stdout
    assert read_images(plain) == {"a": disk.read_bytes()}
    good("verify", "-", input=plain)
    # A plain archive of a compressed one, and the other way round.
    change(disk, 3)
    told = backup(disk, tmp_path / "vm-2026-01-03.vma")
    assert told["base"]["archive"] == str(second)
    told = backup(disk, tmp_path / "vm-2026-01-04.vma.zst", "--compress", "zstd")
    assert told["base"]["archive"] == str(tmp_path / "vm-2026-01-03.vma")
    # So what it holds, the one before holds, too.
    assert told["transfer"]["sent_bytes"] == 0
    assert restored(tmp_path / "vm-2026-01-04.vma.zst", tmp_path / "out") == disk.read_bytes()


def test_what_cannot_be_used_means_a_full_backup_whose_successor_can(
    disk: Path, tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    (zstd,) = need("zstd")
    old, piece = tmp_path / "old-2026-01-01.vma.zst", tmp_path / "piece-2026-01-01.vma.zst"
    good("backup", "--compress", "zstd", "--disk", f"a={disk}", old)
    plain = subprocess.run([zstd, "-dc", old], capture_output=True, check=True).stdout
    subprocess.run([zstd, "-q", "-o", piece], input=plain, check=True)
    text = Path(beside(str(old))).read_text()
    is_of, is_now = (f'"file": {{"bytes": {path.stat().st_size}' for path in (old, piece))
    assert is_of in text
    Path(beside(str(piece))).write_text(text.replace(is_of, is_now))
    raw = bytearray(old.read_bytes())
    raw[-5] = 0  # the mark of its cut
    old.write_bytes(raw)
    assert "in one piece" in str(check_base(str(piece)))
    new = tmp_path / "old-2026-01-02.vma.zst"
    (device,) = backup(disk, new, "--compress", "zstd")["base"]["devices"]
    assert not device["incremental"]
    assert "older versions" in device["reason"]
    found = choose_base(str(tmp_path / "old-2026-01-03.vma.zst"), ["a"])
    assert isinstance(found, Base)
    assert found.archive == str(new)


def test_a_compressed_base_that_is_damaged_makes_a_full_backup(disk: Path, tmp_path: Path) -> None:
    first, new = tmp_path / "vm-2026-01-01.vma.zst", tmp_path / "vm-2026-01-02.vma.zst"
    backup(disk, first, "--compress", "zstd:1")
    sound = first.read_bytes()
    assert read_through(first) == ""
    # Its start and its table, and places all over its frames.
    places = {0, 60, len(sound) - 5, len(sound) - 40, *range(100, len(sound), len(sound) // 40)}
    for at in places:
        raw = bytearray(sound)
        raw[at] ^= 0x10
        first.write_bytes(raw)
        assert str(first) in read_through(first), at
    raw = bytearray(sound)
    raw[len(sound) // 2] ^= 0x10
    first.write_bytes(raw)
    change(disk, 1)
    told = backup(disk, new, "--compress", "zstd:1", "--base", first)
    assert str(first) in told["notice"]["text"]
    assert "full backup instead" in told["notice"]["text"]
    assert restored(new, tmp_path / "out") == disk.read_bytes()


def test_a_manifest_that_cannot_be_read_to_its_end_is_damage_of_the_base(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readline(size)

    first = tmp_path / "vm-2026-01-01.vma.zst"
    backup(disk, first, "--compress", "zstd:1")
    monkeypatch.setattr(extents, "open_side_file", lambda name: Dying(Path(name).read_bytes()))
    said = read_through(first)
    assert str(first) in said
    assert "its manifest cannot be read: Input/output error" in said


def read_through(archive: Path) -> str:
    """Use all of a base; what is said against it, empty: nothing."""
    found = check_base(str(archive))
    if isinstance(found, str):
        return found
    try:
        with contextlib.closing(extents.BaseExtents(found)) as opened:
            while opened.peek() is not None:
                opened.take()
    except extents.DamagedBase as error:
        return str(error)
    return ""
