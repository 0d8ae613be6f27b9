# SPDX-License-Identifier: Apache-2.0
"""File systems that somebody made to harm: nothing leaves the parser or the folder, all ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.access import hostile
from tests.machine import Need, good, run


@pytest.mark.parametrize("name", hostile.names())
def test_an_image_that_nobody_changed_is_read_whole(name: str) -> None:
    outcome = hostile.run(hostile.image(name))
    assert not outcome.has_parser_ended
    assert not [word for word in outcome.words if "could not be read" in word]


def test_changed_images_cost_one_command_at_most_and_little_memory() -> None:
    """What mutation found that reaches something of its own; see hostile.py."""
    for name, changes in hostile.kept():
        outcome = hostile.run(hostile.changed(name, changes))
        assert outcome.peak_bytes < 600 << 20
        # The parser's own words: no error of Python's reaches it that is not expected.
        assert not [word for word in outcome.words if "Error:" in word and "exit code" in word]


def test_a_parser_that_is_sent_round_in_a_circle_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 2^55 bytes whose blocks are looked up one by one, in C."""
    monkeypatch.setattr(hostile, "_SILENCE_S", 2.0)
    size = (11782, bytes.fromhex("db8fa66a"))
    outcome = hostile.run(hostile.changed("ext2", [size]))
    assert outcome.has_parser_ended
    assert [word for word in outcome.words if "it has been silent for N s" in word]


def test_odd_names_and_folders_in_circles_stay_where_they_are_put(
    need: Need, tmp_path: Path
) -> None:
    mke2fs, debugfs = need("mke2fs", "debugfs")
    tree, image, archive = tmp_path / "tree", tmp_path / "disk", tmp_path / "vm.vma"
    (tree / "folder/below").mkdir(parents=True)
    odd = [
        "slash_name",
        "Twin",
        "twin",
        "new\nline",
        "\x1b[2Jescape",
        "n" * 255,
        "dots",
        "null_name",
    ]
    for name in odd:
        (tree / "folder" / name).write_text(name)
    (tree / "folder/setuid").write_text("run me")
    (tree / "folder/setuid").chmod(0o4755)
    (tree / "folder/way").symlink_to("/etc")
    subprocess.run([mke2fs, "-q", "-t", "ext2", "-d", tree, image, "1M"], check=True)
    # A folder that is inside itself, and one that has two names.
    script = "ln folder folder/below/circle\nln folder/below second\nmknod folder/node b 8 0\n"
    subprocess.run([debugfs, "-w", image], input=script.encode(), check=True, capture_output=True)
    raw = image.read_bytes()
    for old, new in ((b"slash_name", b"../../evil"), (b"null_name", b"null\0name")):
        assert raw.count(old) == 2  # the name, and the content
        raw = raw.replace(old, new)
    image.write_bytes(raw.replace(b"\x04\x01dots", b"\x02\x01..ts"))
    good("backup", "--quiet", "--disk", image, archive)
    before = {path.name for path in tmp_path.iterdir()}
    done = run("files", "cp", archive, "/", tmp_path / "copy")
    assert done.returncode == 1
    assert b"there twice, inside itself, or too deep" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"\x1b" not in done.stderr
    folder = tmp_path / "copy/folder"
    there = {path.name for path in folder.iterdir()}
    assert {"Twin", "twin", "new\nline", "\x1b[2Jescape", "n" * 255, "setuid", "way"} <= there
    assert there <= {*odd, "below", "setuid", "way"}
    assert (folder / "setuid").stat().st_mode & 0o7777 == 0o755
    assert (folder / "way").readlink() == Path("/etc")
    assert {path.name for path in tmp_path.iterdir()} == before | {"copy"}
    done = run("files", "ls", archive, "/folder")
    assert done.returncode == 1
    assert b"'/folder/..?..?evil': its name has a slash or a zero byte" in done.stderr
    listed = done.stdout.decode()
    assert "\x1b" not in listed
    assert "new\\nline" in listed


def test_a_file_that_says_it_is_an_exbibyte_large_is_a_hole(need: Need, tmp_path: Path) -> None:
    mke2fs, debugfs = need("mke2fs", "debugfs")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/huge").touch()
    image, archive = tmp_path / "disk", tmp_path / "vm.vma"
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", tmp_path / "tree", image, "1M"], check=True)
    subprocess.run(
        [debugfs, "-w", "-R", f"sif /huge size {1 << 60}", image], check=True, capture_output=True
    )
    good("backup", "--quiet", "--disk", image, archive)
    assert str(1 << 60).encode() in good("files", "ls", "-l", archive, "/huge")
    assert len(good("files", "tar", archive, "/huge")) <= 20480
    done = run("files", "cp", archive, "/huge", tmp_path / "huge")
    if done.returncode:
        assert b"cannot be made here" in done.stderr
    else:
        assert os.stat(tmp_path / "huge").st_blocks == 0


def test_a_file_with_more_content_than_there_is_room_for_is_refused(
    need: Need, tmp_path: Path
) -> None:
    """Else a tar stream would be filled up with as many zeroes as it says."""
    mke2fs, debugfs = need("mke2fs", "debugfs")
    (tmp_path / "tree").mkdir()
    for name in ("good", "large"):
        (tmp_path / "tree" / name).write_bytes(name.encode() * 500)
    image, archive = tmp_path / "disk", tmp_path / "vm.vma"
    words = ["-q", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum", "-d", str(tmp_path / "tree")]
    subprocess.run([mke2fs, *words, image, "1M"], check=True)
    text = subprocess.check_output([debugfs, "-R", "imap /large", image], text=True)
    # "located at block 5, offset 0x0b00"
    place = text.partition("located at block ")[2].split(", offset ")
    block, offset = int(place[0]), int(place[1], 16)
    raw = bytearray(image.read_bytes())
    at = block * 1024 + offset
    assert raw[at + 40 : at + 42] == b"\x0a\xf3"  # an extent's header
    raw[at + 4 : at + 8] = (32 << 20).to_bytes(4, "little")
    raw[at + 56 : at + 58] = (0x8000).to_bytes(2, "little")  # 32 MiB of blocks
    image.write_bytes(raw)
    good("backup", "--quiet", "--disk", image, archive)
    done = run("files", "tar", archive, "/")
    assert done.returncode == 1
    assert b"'/large': it says that it has more content" in done.stderr
    assert len(done.stdout) < 1 << 20
    assert good("files", "cat", archive, "/good") == b"good" * 500
