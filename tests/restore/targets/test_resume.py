# SPDX-License-Identifier: Apache-2.0
"""A restore that was interrupted goes on: what is there and right is not written again."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.archives import archive
from tests.machine import LIMIT_S, VMAPIPE, Need, bad, good, next_event
from vmapipe.restore.workers.work import Marks, Work

MIB = 1 << 20


@functools.cache
def mixed_disk() -> bytes:
    # Data, holes and mixed clusters; an end that is not a whole block.
    chance = random.Random(11)
    return b"".join(
        chance.randbytes(5 * 65536) + bytes(3 * 65536) + (bytes(4096) + b"x" * 4096) * 8
        for _ in range(48)
    ) + chance.randbytes(70_001)


@functools.cache
def random_disk() -> bytes:
    return random.Random(12).randbytes(3 * MIB)


@functools.cache
def both_disks() -> dict[str, bytes]:
    return {"d": mixed_disk(), "e": random_disk()}


CONFIG = b"name: web\n"
DATA_BYTES = 8 * MIB


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive whose disks are mixed, with its manifest."""
    folder = tmp_path_factory.mktemp("stored")
    for name, data in both_disks().items():
        (folder / name).write_bytes(data)
    (folder / "vm.conf").write_bytes(CONFIG)
    disks = [word for name in both_disks() for word in ("--disk", f"{name}={folder / name}")]
    good("backup", *disks, "--config", folder / "vm.conf", folder / "vm.vma")
    return folder / "vm.vma"


def interrupted(
    archive_path: str | Path,
    out: Path,
    *words: str | Path,
    after_bytes: int = DATA_BYTES,
    stdin: Path | None = None,
) -> None:
    """A restore all whose processes are killed when it has come so far, and noted something."""
    words = (archive_path, out, *words)
    command = [*VMAPIPE, "restore", "--resume", "--json", "--speed", "24M", *map(str, words)]
    source = stdin.open("rb") if stdin is not None else None
    process = subprocess.Popen(
        command,
        stdin=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while next_event(process, "progress")["done_bytes"] < after_bytes or not mark_of(out):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=LIMIT_S)
        if source is not None:
            source.close()


def mark_of(out: Path) -> int:
    lines = (out / ".vmapipe-resume").read_text().split("\n")
    return int(lines[2]) if len(lines) > 3 else 0


def resumed(*words: str | Path, **more: Any) -> tuple[dict[str, Any], list[str]]:
    """The event of a restore that went on to its end, and what it had to say."""
    lines = good("restore", "--resume", "--json", *words, **more).splitlines()
    events = [json.loads(line) for line in lines]
    (end,) = [event for event in events if event["event"] == "restored"]
    return end, [event["text"] for event in events if event["event"] == "notice"]


def check_folder(out: Path) -> None:
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert found == {"disk-d.raw": mixed_disk(), "disk-e.raw": random_disk(), "vm.conf": CONFIG}


def test_new_files_are_kept_and_gone_on_with(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "out"
    interrupted(stored, out)
    assert sorted(path.name for path in out.iterdir()) == [
        ".vmapipe-resume",
        "disk-d.raw.unfinished",
        "disk-e.raw.unfinished",
    ]
    end, said = resumed(stored, out)
    assert end["kept_bytes"] > 0
    assert any("is checked with the manifest" in text for text in said)
    check_folder(out)


def test_it_may_be_killed_again_and_again(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "out"
    for after_bytes in (1, 6 * MIB, 12 * MIB, 18 * MIB):
        interrupted(stored, out, after_bytes=after_bytes)
    resumed(stored, out)
    check_folder(out)


def test_from_a_pipe_and_without_a_manifest_the_archives_data_is_compared(
    tmp_path: Path, stored: Path
) -> None:
    out = tmp_path / "out"
    interrupted("-", out, stdin=stored)
    with stored.open("rb") as stream:
        end, said = resumed("-", out, stdin=stream)
    assert end["kept_bytes"] > 0
    assert any("there is no manifest" in text for text in said)
    check_folder(out)
    interrupted(stored, tmp_path / "out2", "--no-manifest")
    end, _ = resumed(stored, tmp_path / "out2", "--no-manifest")
    assert end["kept_bytes"] > 0
    check_folder(tmp_path / "out2")


@pytest.mark.parametrize("option", ["--manifest-or-not", "--no-manifest"])
def test_what_was_changed_meanwhile_is_written_again(
    tmp_path: Path, stored: Path, option: str
) -> None:
    options = [option] if option == "--no-manifest" else []
    out = tmp_path / "out"
    interrupted(stored, out, *options, after_bytes=16 * MIB)
    with (out / "disk-d.raw.unfinished").open("r+b") as file:
        for at in (0, 5 * 65536 + 100, 9 * 65536, 30 * 65536 + 5):
            file.seek(at)
            file.write(b"!")
    end, _ = resumed(stored, out, *options)
    assert end["kept_bytes"] > 0
    check_folder(out)


@pytest.mark.parametrize("mark", [1, 10 * MIB, 10**18])
def test_a_journal_that_lies_is_not_believed(tmp_path: Path, stored: Path, mark: int) -> None:
    out = tmp_path / "out"
    interrupted(stored, out)
    journal = out / ".vmapipe-resume"
    lines = journal.read_text().split("\n")
    journal.write_text("\n".join([*lines[:2], f"{mark:020d}", ""]))
    with (out / "disk-e.raw.unfinished").open("r+b") as file:
        file.write(os.urandom(len(random_disk())))
    resumed(stored, out)
    check_folder(out)


def test_an_existing_file_and_a_block_device_are_gone_on_with(
    tmp_path: Path, stored: Path, loop: str
) -> None:
    target = tmp_path / "old.raw"
    target.write_bytes(b"\x77" * len(mixed_disk()))
    words = ("--device", f"d={target}", "--device", f"e={loop}")
    interrupted(stored, tmp_path / "out", *words, after_bytes=12 * MIB)
    end, _ = resumed(stored, tmp_path / "out", *words)
    assert end["kept_bytes"] > 0
    assert target.read_bytes() == mixed_disk()
    assert Path(loop).read_bytes()[: len(random_disk())] == random_disk()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vm.conf"]


def test_nothing_that_is_complete_is_written_again(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # All is written, and then a configuration cannot be.
    interrupted(stored, out, after_bytes=1)
    (out / "vm.conf").write_bytes(b"another\n")
    bad("restore", "--resume", stored, out)
    (out / "vm.conf").unlink()
    lines = good("restore", "--resume", "--json", stored, out).splitlines()
    check_folder(out)
    whole = json.loads(lines[-1])
    # Once more over existing files: every byte of data is there.
    words = ["--no-configs"]
    words += [w for n in both_disks() for w in ("--device", f"{n}={out / f'disk-{n}.raw'}")]
    interrupted(stored, out, *words, after_bytes=1)
    journal = out / ".vmapipe-resume"
    first, second, _, _ = journal.read_text().split("\n")
    journal.write_text(f"{first}\n{second}\n{10**18:020d}\n")
    before = {name: (out / f"disk-{name}.raw").stat().st_mtime_ns for name in both_disks()}
    end, _ = resumed(stored, out, *words)
    assert end["kept_bytes"] == whole["data_bytes"]
    assert before == {name: (out / f"disk-{name}.raw").stat().st_mtime_ns for name in both_disks()}
    check_folder(out)


@pytest.mark.parametrize("both", [False, True])
def test_killed_between_two_names_it_ends_well(tmp_path: Path, stored: Path, both: bool) -> None:
    out = tmp_path / "out"
    interrupted(stored, out)
    os.link(out / "disk-e.raw.unfinished", out / "disk-e.raw")
    if not both:
        (out / "disk-e.raw.unfinished").unlink()
    resumed(stored, out)
    check_folder(out)


def test_a_file_of_somebody_elses_under_the_final_name_is_not_overwritten(
    tmp_path: Path, stored: Path
) -> None:
    out = tmp_path / "out"
    interrupted(stored, out)
    (out / "disk-e.raw").write_bytes(b"mine")
    assert "exists already" in bad("restore", "--resume", stored, out)
    assert (out / "disk-e.raw").read_bytes() == b"mine"
    (out / "disk-e.raw").unlink()
    resumed(stored, out)
    check_folder(out)


def test_another_archive_or_other_targets_do_not_go_on_with_it(
    tmp_path: Path, stored: Path
) -> None:
    out = tmp_path / "out"
    interrupted(stored, out)
    (tmp_path / "other.vma").write_bytes(archive(both_disks(), {"vm.conf": CONFIG}))
    kept = (out / "disk-d.raw.unfinished").read_bytes()
    for words in ([tmp_path / "other.vma", out], [stored, out, "--device", "d"]):
        text = bad("restore", "--resume", *words, code=2)
        assert "tells of another restore that was interrupted" in text
    assert (out / "disk-d.raw.unfinished").read_bytes() == kept
    resumed(stored, out)
    check_folder(out)


def test_a_file_that_no_journal_tells_of_is_not_taken(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "disk-d.raw.unfinished").write_bytes(b"mine")
    text = bad("restore", "--resume", stored, out)
    assert "no journal" in text
    assert [path.name for path in out.iterdir()] == ["disk-d.raw.unfinished"]
    assert (out / "disk-d.raw.unfinished").read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["", "{", '{"vmapipe-resume": 1', "\0" * 5000])
def test_a_journal_that_was_cut_is_begun_anew(tmp_path: Path, stored: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".vmapipe-resume").write_text(text)
    resumed(stored, out)
    check_folder(out)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "junk"])
def test_what_is_not_a_journal_is_named(tmp_path: Path, stored: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    journal = out / ".vmapipe-resume"
    match kind:
        case "link":
            (tmp_path / "secret").write_bytes(b"keep")
            journal.symlink_to(tmp_path / "secret")
        case "folder":
            journal.mkdir()
        case "fifo":
            os.mkfifo(journal)
        case "junk":
            journal.write_text("all of it\nis junk\n")
    done = subprocess.run(
        [*VMAPIPE, "restore", "--resume", stored, out], capture_output=True, timeout=LIMIT_S
    )
    assert done.returncode in (1, 2)
    assert str(journal) in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    if kind == "link":
        assert (tmp_path / "secret").read_bytes() == b"keep"


def test_two_do_not_go_on_with_one(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "out"
    command = [*VMAPIPE, "restore", "--resume", "--json", "--speed", "4M", str(stored), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        next_event(process, "progress")
        assert "another restore goes on there" in bad("restore", "--resume", stored, out)
        process.terminate()
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == 143
    resumed(stored, out)
    check_folder(out)


def test_a_damaged_archive_leaves_what_was_good_and_a_sound_copy_goes_on(
    tmp_path: Path, stored: Path
) -> None:
    raw = stored.read_bytes()
    out = tmp_path / "out"
    # From a pipe the end comes when the beginning is long written.
    words = [*VMAPIPE, "restore", "--resume", "-", str(out)]
    cut = raw[: 2 * len(raw) // 3]
    done = subprocess.run(words, input=cut, capture_output=True, timeout=LIMIT_S)
    assert done.returncode != 0
    assert "what was written is kept" in done.stdout.decode()
    end, _ = resumed("-", out, input=raw)
    assert end["kept_bytes"] > 0
    check_folder(out)


def test_images_of_other_formats_are_begun_anew(tmp_path: Path, stored: Path, need: Need) -> None:
    qemu_img, _ = need("qemu-img", "qemu-storage-daemon")
    image, out = tmp_path / "d.qcow2", tmp_path / "out"
    words = ("--device", f"d={image},format=qcow2", "--device", "e")
    interrupted(stored, out, *words)
    resumed(stored, out, *words)
    raw = tmp_path / "raw"
    convert = [qemu_img, "convert", "-O", "raw", str(image), str(raw)]
    subprocess.run(convert, check=True, timeout=LIMIT_S)
    assert raw.read_bytes()[: len(mixed_disk())] == mixed_disk()
    assert (out / "disk-e.raw").read_bytes() == random_disk()


def test_without_the_option_nothing_is_kept(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "out"
    command = [*VMAPIPE, "restore", "--json", "--speed", "4M", str(stored), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        next_event(process, "progress")
        process.terminate()
        process.communicate(timeout=LIMIT_S)
    assert not out.exists()


def test_a_speed_limit_holds_for_all_disks_together(tmp_path: Path) -> None:
    """By what is handed out, not by a clock: nothing of it depends on the machine."""
    (tmp_path / "vm.vma").write_bytes(archive({"a": b"\1" * (6 * MIB), "b": b"\2" * (6 * MIB)}))
    end = json.loads(
        good(
            "restore", "--json", "--speed", "8M", tmp_path / "vm.vma", tmp_path / "o"
        ).splitlines()[-1]
    )
    # 12 MiB at 8 MiB/s; the last piece is not waited for.
    assert end["seconds"] > 0.4
    sparse = archive({"a": bytes(512 * MIB), "b": b"\2" * 65536})
    (tmp_path / "sparse.vma").write_bytes(sparse)
    good("restore", "--speed", "1M", tmp_path / "sparse.vma", tmp_path / "o2", timeout=30)


def test_the_io_priority_is_that_of_all_its_processes(tmp_path: Path) -> None:
    (tmp_path / "vm.vma").write_bytes(archive({"a": b"\1" * MIB}))
    shown = f"exec:ionice > {tmp_path / 'io'}; cat {tmp_path / 'vm.vma'}"
    good("restore", "--ionice", "idle", shown, tmp_path / "o")
    assert (tmp_path / "io").read_text().strip() == "idle"
    assert "is neither idle nor" in bad("restore", "--ionice", "fast", "x", "o", code=2)


@given(st.permutations(list(range(1, 20))), st.integers(0, 19))
def test_a_mark_is_never_beyond_work_that_is_under_way(order: list[int], count: int) -> None:
    marks = Marks()
    for seq in order[:count]:
        marks.done(Work(seq, [], 1, 0, {}, end=seq * 100))
    done = set(order[:count])
    first_open = next(seq for seq in range(1, 21) if seq not in done)
    assert marks.mark == (first_open - 1) * 100
