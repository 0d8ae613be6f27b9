# SPDX-License-Identifier: Apache-2.0
"""`vmapipe list` on what can be done with an archive: seekable, checked, drilled."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.machine import Need, good, make_disk
from vmapipe.access.drill.result import DrillResult, write_result
from vmapipe.access.lzo import can_read_lzo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain.vma` and `own.vma.zst`, both with manifests."""
    folder = tmp_path_factory.mktemp("list")
    disk = make_disk(folder / "a", "A" * 90)
    good("backup", "--quiet", "--disk", disk, folder / "plain.vma")
    good("backup", "--quiet", "--compress", "zstd", "--disk", disk, folder / "own.vma.zst")
    return folder


def listed(path: str | Path, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(good("list", "--json", path, **more))
    return found


def test_plain_archives_and_those_of_frames_are_seekable_and_those_of_one_piece_are_not(
    folder: Path, tmp_path: Path, need: Need
) -> None:
    plain = (folder / "plain.vma").read_bytes()
    for program in need("zstd", "gzip", "lzop"):
        packed = subprocess.run([program, "-c"], input=plain, capture_output=True).stdout
        (tmp_path / Path(program).name).write_bytes(packed)
    expected = {
        folder / "plain.vma": ("none", True, True),
        folder / "own.vma.zst": ("zstd", True, True),
        tmp_path / "zstd": ("zstd", False, False),
        tmp_path / "gzip": ("gzip", False, False),
        tmp_path / "lzop": ("lzo", can_read_lzo(), False),
    }
    for path, wanted in expected.items():
        found = listed(path)
        assert (found["compression"], found["seekable"], found["digests"]) == wanted, path
        assert found["drill"] is None
        assert (found["frame_bytes"] is not None) == (wanted[:2] == ("zstd", True)), path
    text = good("list", tmp_path / "gzip").decode()
    assert "no, gzip in one piece" in text
    assert "its data cannot be checked" in text


def test_of_slow_random_reads_it_tells_why_and_the_way_out(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "a", "A" * 58 * 4)
    sizes, said, path = dict[int, int](), "", tmp_path
    for level in (1, 3, 9):
        path = tmp_path / f"{level}.vma.zst"
        good("backup", "--quiet", "--compress", f"zstd:{level}", "--disk", disk, path)
        sizes[level] = listed(path)["frame_bytes"]
        said = good("list", path).decode()
        assert ("random reads are slow" in said) == (level == 9)
    assert 2.5 * sizes[1] < sizes[9] < 2.1 * sizes[3]
    assert "half of 3.6 MiB: `vmapipe repack --compress zstd` makes" in said
    # The way out is one.
    good("repack", "--quiet", "--compress", "zstd", path, tmp_path / "again.vma.zst")
    assert listed(tmp_path / "again.vma.zst")["frame_bytes"] == sizes[3]
    assert "random reads" not in good("list", tmp_path / "again.vma.zst").decode()


def test_of_a_pipe_it_says_what_the_header_says_and_no_more(folder: Path) -> None:
    with (folder / "plain.vma").open("rb") as stdin:
        found = listed("-", stdin=stdin)
    assert (found["compression"], found["seekable"], found["digests"]) == (None, None, None)
    assert len(found["devices"]) == 1


def test_another_archives_manifest_is_not_its_own(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "vm.vma"
    path.write_bytes((folder / "plain.vma").read_bytes())
    other = (folder / "own.vma.zst.manifest.json").read_bytes()
    (tmp_path / "vm.vma.manifest.json").write_bytes(other)
    assert listed(path)["digests"] is False
    (tmp_path / "vm.vma.manifest.json").write_bytes(b"nonsense")
    assert listed(path)["digests"] is False


def test_the_latest_restore_test_is_told(folder: Path) -> None:
    path = folder / "plain.vma"
    number = listed(path)["uuid"]
    uuid = f"{number[:8]}-{number[8:12]}-{number[12:16]}-{number[16:20]}-{number[20:]}"
    result = DrillResult(
        archive_uuid=uuid,
        date="2026-11-30T10:00:00Z",
        verdict="booted",
        reason="the guest agent answers",
        seconds=12.34,
        proof="agent",
        steps=(),
        left_out=(),
        accelerator="tcg",
        firmware="bios",
        is_resumed=False,
        bytes_read=1,
        evidence="",
    )
    write_result(str(path), result)
    assert listed(path)["drill"] == {
        "verdict": "booted",
        "date": "2026-11-30T10:00:00Z",
        "seconds": 12.34,
    }
    assert "booted after 12.3 s, tested 2026-11-30" in good("list", path).decode()
    Path(f"{path}.drill.json").write_text('{"verdict": "booted"}')
    assert listed(path)["drill"] is None
