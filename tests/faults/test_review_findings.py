# SPDX-License-Identifier: Apache-2.0
"""What a critical reader broke once: nothing of it may come back."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.machine import (
    LIMIT_S,
    VMA,
    VMAPIPE,
    bad,
    children,
    end_of,
    good,
    make_disk,
    next_event,
    run,
    sha256,
    started,
    without_limit,
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", "Ap0A" * 8)


@pytest.mark.parametrize("target", ["/dev/stdout", "/dev/fd/1", "fd:01", "-"])
@pytest.mark.parametrize("tool", [VMAPIPE, VMA], ids=["vmapipe", "vma"])
def test_no_word_of_ours_gets_into_an_archive_on_stdout(
    disk: Path, tmp_path: Path, target: str, tool: tuple[str, ...]
) -> None:
    words = ["backup", "--disk", f"d={disk}", target]
    if tool is VMA:
        words = ["create", target, "-v", f"d={disk}"]
    with (
        (tmp_path / "out.vma").open("wb") as out,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as cat,
    ):
        good(*words, tool=tool, stdout=cat.stdin, stderr=subprocess.PIPE)
    good("verify", tmp_path / "out.vma")


def test_a_config_may_come_from_a_pipe(disk: Path, tmp_path: Path) -> None:
    archive = tmp_path / "vm.vma"
    words = ("backup", "--config", "c=/dev/stdin", "--disk", f"d={disk}", archive)
    good(*words, input=b"memory: 1024\n")
    assert good("config", archive) == b"memory: 1024\n"


def test_a_descriptor_that_nobody_opened_is_refused(disk: Path) -> None:
    for number in range(900, 906):
        text = bad("backup", "--disk", f"d={disk}", f"fd:{number}", code=2)
        assert "no such descriptor is open here" in text
        assert "no such descriptor" in bad("list", f"fd:{number}", code=2)


def test_an_archive_on_stdin_cannot_be_the_target_of_its_own_restore(
    disk: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "self.vma"
    good("backup", "--disk", f"d={disk}", archive)
    os.truncate(disk, archive.stat().st_size)
    before = sha256(archive)
    with archive.open("rb") as stdin:
        done = run("restore", "-", tmp_path / "out", "--device", f"d={archive}", stdin=stdin)
    assert done.returncode != 0
    assert sha256(archive) == before


def test_listening_never_takes_the_place_of_a_file_or_of_another_listener(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    out = tmp_path / "vm.vma"
    words = ("--expect", "1", "--output", out)
    assert "exists" in bad("archiver", "--listen", f"ipc://{precious}", *words)
    assert precious.read_text() == "x"
    endpoint = f"ipc://{tmp_path / 's'}"
    with started("archiver", "--listen", endpoint, *words) as first:
        assert first.stderr is not None
        first.stderr.readline()
        text = bad("archiver", "--listen", endpoint, "--expect", "1", "--output", tmp_path / "b")
        assert "another process listens there" in text


def test_compressed_reproducible_backups_are_the_same_bytes(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "pA0hhppA0pAphhh0" * 60)
    digests = set()
    for index in range(4):
        archive = tmp_path / f"{index}.zst"
        good("backup", "--reproducible", "--compress", "zstd:1", "--disk", f"d={disk}", archive)
        digests.add(sha256(archive))
    assert len(digests) == 1


def test_a_reader_of_reports_that_goes_away_does_not_end_the_backup(
    disk: Path, tmp_path: Path
) -> None:
    with open("/dev/full", "wb") as full:
        done = run("backup", "--disk", f"d={disk}", tmp_path / "vm.vma", stdout=full, stderr=-1)
    assert done.returncode == 0, done.stderr
    good("verify", tmp_path / "vm.vma")


@pytest.mark.parametrize("words", [("extract", "ok", "-r", "map", "out")])
def test_a_signal_ends_the_wait_for_a_map(
    disk: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    archive, fifo = tmp_path / "ok", tmp_path / "map"
    good("backup", "--disk", f"d={disk}", "--config", f"c={__file__}", archive)
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [*VMA, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"CTIME"):
        pass
    process.send_signal(signal.SIGTERM)
    code, _ = end_of(process)
    assert code == 143
    assert not (tmp_path / "out").exists(), "neither folder nor configs are left"


def test_a_hung_archiver_leaves_nothing_when_the_job_is_cancelled(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 64)
    out = tmp_path / "out"
    out.mkdir()
    with started(
        "backup", "--json", "--speed", "64K", "--disk", f"d={disk}", out / "vm.vma"
    ) as backup:
        next_event(backup, "begun")
        children(backup, "vmapipe.archiver.main")[0].suspend()
        backup.send_signal(signal.SIGTERM)
        code, _ = end_of(backup)
    assert code == 143
    assert list(out.iterdir()) == []


def test_nohup_is_honoured(tmp_path: Path, disk: Path) -> None:
    words = ("backup", "--json", "--speed", "1K", "--disk", f"d={disk}")
    process = subprocess.Popen(
        ["nohup", *VMAPIPE, *words, str(tmp_path / "vm.vma")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    next_event(process, "begun")
    process.send_signal(signal.SIGHUP)
    without_limit(process)
    _, text = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, text


def test_odd_environments_are_no_traceback(tmp_path: Path, disk: Path) -> None:
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    good("backup", "--disk", f"ü={disk}", tmp_path / "ü.vma", env=plain)
    odd = {**os.environ, "SOURCE_DATE_EPOCH": "²"}
    text = bad(
        "backup", "--reproducible", "--disk", f"d={disk}", tmp_path / "x.vma", env=odd, code=2
    )
    assert "SOURCE_DATE_EPOCH" in text
    (tmp_path / "map").write_bytes(b"1:d\xe9=x\n")
    text = bad("restore", "--map", tmp_path / "map", tmp_path / "ü.vma", tmp_path / "o", code=2)
    assert "no device" in text


def test_a_disk_cannot_have_the_name_of_the_memory(tmp_path: Path, disk: Path) -> None:
    text = bad("backup", "--disk", f"vmstate={disk}", tmp_path / "x.vma", code=2)
    assert "'vmstate' is the memory's" in text


@pytest.mark.parametrize(
    ("words", "code"),
    [("backup --quiet --disk d={disk} - >&-", 2), ("verify - <&-", 1), ("restore - out <&-", 1)],
)
def test_a_closed_standard_descriptor_fails_the_command_and_hangs_nothing(
    disk: Path, tmp_path: Path, words: str, code: int
) -> None:
    line = " ".join([*VMAPIPE, words.format(disk=disk)])
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, timeout=LIMIT_S)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr


def test_an_image_that_is_not_raw_is_not_backed_up_as_if_it_were(
    tmp_path: Path, disk: Path
) -> None:
    image = tmp_path / "vm.qcow2"
    image.write_bytes(b"QFI\xfb" + bytes(65536))
    text = bad("backup", "--disk", f"d={image}", tmp_path / "x.vma", code=2)
    assert "looks like a qcow2 image" in text
    good("backup", "--disk", f"d={image},format=raw", tmp_path / "x.vma")
