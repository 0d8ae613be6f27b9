# SPDX-License-Identifier: Apache-2.0
"""A user's mistakes: one clear line, the right exit code, nothing half-made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import VMA, VMAPIPE, bad, good, make_disk, run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", "Ap0")


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {
    "missing disk": (lambda d: ["--disk", "a=/nonexistent"], 1, "disk 'a': cannot open /nonexist"),
    "a folder": (lambda d: ["--disk", f"a={d.parent}"], 1, "is a folder"),
    "two of one name": (
        lambda d: ["--disk", f"a={d}", "--disk", f"a={d}"],
        2,
        "two devices have the name 'a'",
    ),
    "control character": (lambda d: ["--disk", f"a\nb={d}"], 2, "is not safe"),
    "no text": (lambda d: ["--disk", f"a\udcff={d}"], 2, "is not UTF-8 text"),
    "no disk": (lambda d: [], 2, "name a disk with --disk"),
    "missing config": (
        lambda d: ["--disk", f"a={d}", "--config", "/nonexistent"],
        1,
        "unable to read file '/nonexistent'",
    ),
    "large config": (
        lambda d: ["--disk", f"a={d}", "--config", str(d)],
        1,
        "the limit is 65535",
    ),
    "unknown format": (lambda d: ["--disk", f"a={d},format=no.such"], 2, "is not a valid format"),
    "bad level": (lambda d: ["--disk", f"a={d}", "--compress", "zstd:99"], 2, "zstd:1 to zstd:19"),
    "bad compressor": (lambda d: ["--disk", f"a={d}", "--compress", "xz"], 2, "use zstd"),
    "bad speed": (lambda d: ["--disk", f"a={d}", "--speed", "fast"], 2, "is not a valid size"),
    "manifest and none": (
        lambda d: ["--disk", f"a={d}", "--manifest", "x", "--no-manifest"],
        2,
        "exclude each other",
    ),
    "bad descriptor name": (
        lambda d: ["--disk", f"a={d}", "--uuid", "x"],
        2,
        "is not a valid uuid",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(disk: Path, out: Path, mistake: str) -> None:
    words, code, text = MISTAKES[mistake]
    assert text in bad("backup", *words(disk), out / "vm.vma", code=code)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("archive", "text"),
    [
        ("/nonexistent/folder/vm.vma", "/nonexistent/folder/vm.vma"),
        ("fd:99", "no such descriptor"),
        ("fd:x", "fd:"),
        ("exec:", "exec"),
    ],
)
def test_an_archive_that_cannot_be_made_is_named(disk: Path, archive: str, text: str) -> None:
    done = run("backup", "--disk", f"a={disk}", archive)
    assert done.returncode in (1, 2)
    assert text in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_an_unreadable_disk_is_named(disk: Path, out: Path, tmp_path: Path) -> None:
    # Root reads anything: a link that leads to itself is unreadable for everybody.
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    text = bad("backup", "--disk", f"a={loop}", out / "vm.vma")
    assert str(loop) in text
    assert "symbolic links" in text


@pytest.mark.parametrize("tool", [VMAPIPE, VMA], ids=["vmapipe", "vma"])
def test_help_goes_to_stdout_and_wrong_use_to_stderr_with_exit_code_2(tool: tuple[str]) -> None:
    helped = run("-h", tool=tool)
    assert (helped.returncode, helped.stderr) == (0, b"")
    assert b"verify" in helped.stdout
    for words in ([], ["nonsense"], ["verify"]):
        done = run(*words, tool=tool)
        assert done.returncode == 2, words
        assert done.stdout == b""
        assert done.stderr


@pytest.mark.parametrize(
    "command",
    ["backup", "restore", "list", "config", "verify", "producer", "archiver"],
)
def test_every_command_explains_itself(command: str) -> None:
    text = good(command, "--help").decode()
    assert f"vmapipe {command}" in text
    assert "example" in text


def test_a_closed_stdout_is_no_traceback(tmp_path: Path, golden: Path) -> None:
    archive = golden / "g02-two-disks-cfg.vma"
    with open("/dev/full", "wb") as full:
        done = run("list", archive, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"No space left" in done.stderr


def test_a_failure_is_the_last_json_event(tmp_path: Path) -> None:
    done = run("verify", "--json", tmp_path / "none.vma")
    event = json.loads(done.stdout.splitlines()[-1])
    assert event["event"] == "failed"
    assert event["exit_code"] == done.returncode
    assert "none.vma" in event["text"]


def test_a_check_for_cron_fails_where_the_data_cannot_be_checked(tmp_path: Path) -> None:
    disk, archive = make_disk(tmp_path / "d.raw", "A"), tmp_path / "vm.vma"
    good("backup", "--no-manifest", "--disk", f"d={disk}", archive)
    good("verify", archive)
    assert "no manifest" in bad("verify", "--require-manifest", archive).replace("there is ", "")
    good("backup", "--disk", f"d={disk}", tmp_path / "with.vma")
    good("verify", "--require-manifest", tmp_path / "with.vma")


def test_a_foreign_file_is_named_by_every_command_and_from_a_pipe(tmp_path: Path) -> None:
    page = tmp_path / "vm.vma.zst"
    page.write_bytes(b"<!DOCTYPE html>\n<html><title>Sign in</title></html>\n")
    words = "an HTML page: the download failed"
    assert words in bad("list", page)
    assert words in bad("config", f"exec:cat {page}")
    assert words in bad("verify", page, code=4)
    assert words in bad("restore", page, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = run("list", page, tool=VMA)
    assert done.returncode == 1
    assert words in done.stderr.decode()
    assert "not a vma file - wrong magic number" in done.stderr.decode()


def test_of_several_archives_each_is_told_and_the_worst_one_counts(
    disk: Path, tmp_path: Path
) -> None:
    first, second, gone = (tmp_path / name for name in ("a.vma", "b.vma", "gone.vma"))
    good("backup", "--quiet", "--disk", f"a={disk}", first)
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    second.write_bytes(raw)
    second.with_name("b.vma.manifest.json").write_bytes(
        first.with_name("a.vma.manifest.json").read_bytes()
    )
    assert good("verify", first, first).decode().count("nothing is wrong") == 2
    done = run("verify", gone, second, first)
    assert done.returncode == 4
    assert "nothing is wrong" in done.stdout.decode()
    told = done.stderr.decode()
    assert "cannot open the archive" in told
    assert f"{second} is damaged" in told
    assert told.endswith("something is wrong with 2 of 3 archives\n")
    assert run("verify", gone, first).returncode == 1
    lines = good("list", "--json", first, second).splitlines()
    assert [json.loads(line)["devices"][0]["name"] for line in lines] == ["a", "a"]
    events = [json.loads(line) for line in run("verify", "--json", gone, first).stdout.splitlines()]
    assert [e["event"] for e in events if e["event"] != "progress"] == ["failed", "verified"]
    assert "named twice" in bad("verify", "-", "-", code=2)
    assert "of one archive" in bad("verify", "--manifest", "x", first, second, code=2)
