# SPDX-License-Identifier: Apache-2.0
"""Archives that are made of a compressed base: what has not changed is taken from it as it is stored there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.archiver.test_base import change, restored
from tests.machine import VMAPIPE, good, make_disk
from vmapipe.archiver.outputs.compress import CUT_BYTES
from vmapipe.archiver.outputs.manifests import beside
from vmapipe.vma.seektable import FOOTER_BYTES, Frame, parse_seek_table, seek_table_bytes

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
    backup(disk, first, "--compress", "zstd:9")
    change(disk, 60, 200)
    # Another level: frames that are taken over keep theirs.
    told = backup(disk, second, "--compress", "zstd:1")
    assert told["base"]["devices"] == [{"name": "a", "incremental": True, "reason": ""}]
    assert told["transfer"]["sent_bytes"] <= 1.1 * 2 * 65536
    base_data = [raw for frame, raw in frames_of(first) if frame.plain_bytes >= CUT_BYTES]
    new_data = [raw for frame, raw in frames_of(second) if frame.plain_bytes >= CUT_BYTES]
    same = [one == other for one, other in zip(base_data, new_data, strict=True)]
    assert (len(same), same.count(True), same[1]) == (len(base_data), len(base_data) - 1, False)
    assert len(base_data) >= 3
    # A plain archive of a compressed one, and the other way round.
    change(disk, 3)
    told = backup(disk, tmp_path / "vm-2026-01-03.vma")
    assert told["base"]["archive"] == str(second)
    told = backup(disk, tmp_path / "vm-2026-01-04.vma.zst", "--compress", "zstd")
    assert told["base"]["archive"] == str(tmp_path / "vm-2026-01-03.vma")
    assert told["transfer"]["sent_bytes"] == 0
    for name in ("vm-2026-01-03.vma", "vm-2026-01-04.vma.zst"):
        assert restored(tmp_path / name, tmp_path / f"out-{name}") == disk.read_bytes()
    # The reference's way: `zstd -dc | vma`.
    plain = subprocess.run([zstd, "-dc", second], capture_output=True, check=True).stdout
    done = subprocess.run([*VMAPIPE, "verify", "-"], input=plain, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_used_means_a_full_backup_whose_successor_can(
    disk: Path, tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    (zstd,) = need("zstd")
    plain = tmp_path / "plain.vma"
    good("backup", "--disk", f"a={disk}", plain)
    old, piece = tmp_path / "old-2026-01-01.vma.zst", tmp_path / "piece-2026-01-01.vma.zst"
    good("backup", "--compress", "zstd", "--disk", f"a={disk}", old)
    raw = bytearray(old.read_bytes())
    raw[-5] = 0  # the mark of its cut
    old.write_bytes(raw)
    subprocess.run([zstd, "-q", plain, "-o", piece], check=True)
    text = Path(beside(str(plain))).read_text()
    size = plain.stat().st_size
    text = text.replace(f'"file": {{"bytes": {size}', f'"file": {{"bytes": {piece.stat().st_size}')
    Path(beside(str(piece))).write_text(text)
    for machine, reason in (("old", "older versions"), ("piece", "in one piece")):
        new = tmp_path / f"{machine}-2026-01-02.vma.zst"
        told = backup(disk, new, "--compress", "zstd")
        (device,) = told["base"]["devices"]
        assert not device["incremental"]
        assert reason in device["reason"]
        change(disk, 7)
        told = backup(disk, tmp_path / f"{machine}-2026-01-03.vma.zst", "--compress", "zstd")
        assert told["base"]["devices"][0]["incremental"]
        assert told["base"]["archive"] == str(new)


def test_a_compressed_base_that_is_damaged_makes_a_full_backup(disk: Path, tmp_path: Path) -> None:
    first = tmp_path / "vm-2026-01-01.vma.zst"
    backup(disk, first, "--compress", "zstd:1")
    sound = first.read_bytes()
    change(disk, 1)
    for name, at in (("start", 60), ("middle", len(sound) // 2), ("table", len(sound) - 40)):
        raw = bytearray(sound)
        raw[at] ^= 0x10
        first.write_bytes(raw)
        new = tmp_path / f"{name}.vma.zst"
        told = backup(disk, new, "--compress", "zstd:1", "--base", first)
        said = json.dumps(told["base"]) + json.dumps(told.get("notice", ""))
        assert str(first) in said
        assert not told["base"]["devices"][0]["incremental"] or "full backup instead" in said
        good("verify", new)
