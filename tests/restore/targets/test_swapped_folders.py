# SPDX-License-Identifier: Apache-2.0
"""Another user's folder, swapped for a link while we restore into it: nothing happens elsewhere."""

from __future__ import annotations

import functools
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.archives import archive
from tests.machine import LIMIT_S, VMA, VMAPIPE, Need, bad, good, next_event, run
from tests.restore.support import is_root
from tests.restore.test_faults import program, workers_of
from vmapipe.restore.archive.errors import TargetError
from vmapipe.restore.targets.files import Folders, NewFile, publish_all
from vmapipe.runtime.folders import HeldFolder


@functools.cache
def disk_data() -> bytes:
    return b"\xaa" * (64 * 65536)


@functools.cache
def whole_archive() -> bytes:
    return archive(
        {"d": disk_data()}, {"passwd": b"stranger::0:0\n", "cron-job": b"* * * * * evil\n"}
    )


@functools.cache
def cut() -> int:
    # All of the first extent, which is worked on then, and some of the second.
    return len(whole_archive()) - 2 * 65536


class Home:
    """A user's folder with the target in it, and a folder of root's that it is swapped for."""

    def __init__(self, base: Path) -> None:
        self.user = base / "home"
        self.target = self.user / "restored"
        self.other = base / "etc-like"
        self.user.mkdir()
        self.other.mkdir()
        (self.other / "passwd").write_bytes(b"root:x:0:0\n")

    def swap(self) -> None:
        self.target.rename(self.user / "moved")
        self.target.symlink_to(self.other)

    def check_other(self) -> None:
        found = {path.name: path.read_bytes() for path in self.other.iterdir()}
        assert found == {"passwd": b"root:x:0:0\n"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@contextmanager
def reading_a_fifo(
    tool: Sequence[str], words: Sequence[str | Path], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[bytes], None], Callable[[], None]]]:
    """(the process, a way to send it data, a way to end that)."""
    fifo = tmp_path / "archive.vma"
    os.mkfifo(fifo)
    command = [*tool, *[str(fifo) if word == "ARCHIVE" else str(word) for word in words]]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        fifo.open("wb", buffering=0) as writer,
    ):

        def send(data: bytes) -> None:
            while data:
                data = data[writer.write(data) :]

        try:
            yield process, send, writer.close
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_restore_goes_on_into_the_folder_that_it_was_given(tmp_path: Path, home: Home) -> None:
    with reading_a_fifo(VMAPIPE, ["restore", "ARCHIVE", home.target], tmp_path) as (
        process,
        send,
        end,
    ):
        send(whole_archive()[: cut()])
        wait_for(home.target.is_dir)
        home.swap()
        send(whole_archive()[cut() :])
        end()
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    home.check_other()
    moved = home.user / "moved"
    assert (moved / "disk-d.raw").read_bytes() == disk_data()
    assert (moved / "passwd").read_bytes() == b"stranger::0:0\n"


def test_an_extract_that_fails_takes_back_its_own_and_nothing_elsewhere(
    tmp_path: Path, home: Home
) -> None:
    with reading_a_fifo(VMA, ["extract", "ARCHIVE", home.target], tmp_path) as (process, send, end):
        send(whole_archive()[: cut()])
        wait_for((home.target / "passwd").exists)
        home.swap()
        end()
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, errors
    home.check_other()
    assert list((home.user / "moved").iterdir()) == []


@pytest.mark.parametrize("way", ["unnamed", "partial"])
def test_a_restore_that_fails_removes_its_own_and_nothing_elsewhere(
    tmp_path: Path, home: Home, way: str
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    home.target.mkdir()
    with program(fifo, home.target, way, tmp_path) as process:
        with fifo.open("wb", buffering=0) as writer:
            writer.write(whole_archive()[: cut()])
            next_event(process, "progress")
            hidden = [path.name for path in home.target.iterdir()]
            assert bool(hidden) == (way == "partial")
            home.swap()
            for name in hidden:
                (home.other / name).write_bytes(b"not theirs")
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    for name in hidden:
        assert (home.other / name).read_bytes() == b"not theirs"
        (home.other / name).unlink()
    home.check_other()
    assert list((home.user / "moved").iterdir()) == []


def test_a_killed_readers_workers_remove_its_own_and_nothing_elsewhere(
    tmp_path: Path, home: Home
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    home.target.mkdir()
    with program(fifo, home.target, "partial", tmp_path) as process:
        with fifo.open("wb", buffering=0) as writer:
            writer.write(whole_archive()[: cut()])
            next_event(process, "progress")
            hidden = [path.name for path in home.target.iterdir()]
            assert len(hidden) == 3
            home.swap()
            for name in hidden:
                (home.other / name).write_bytes(b"not theirs")
            process.kill()
            process.communicate(timeout=LIMIT_S)
        wait_for(lambda: list((home.user / "moved").iterdir()) == [])
    for name in hidden:
        assert (home.other / name).read_bytes() == b"not theirs"


@pytest.mark.parametrize("unnamed", [True, False])
def test_what_cannot_be_published_whole_is_taken_back_where_it_was_published(
    home: Home, monkeypatch: pytest.MonkeyPatch, *, unnamed: bool
) -> None:
    if not unnamed:

        def refuse(folder: HeldFolder, mode: int = 0) -> int:
            raise OSError("no unnamed files here")

        monkeypatch.setattr(HeldFolder, "make_unnamed", refuse)
    home.target.mkdir()
    with Folders() as folders:
        files = [NewFile(str(home.target / name), folders) for name in ("passwd", "b", "c")]
        (home.target / "c").write_bytes(b"taken")
        home.swap()
        with pytest.raises(TargetError, match="has appeared meanwhile"):
            publish_all(files)
        for file in files:
            file.close()
    home.check_other()
    assert [path.name for path in (home.user / "moved").iterdir()] == ["c"]


def test_a_published_file_that_somebody_replaced_is_not_taken_back(tmp_path: Path) -> None:
    with Folders() as folders:
        file = NewFile(str(tmp_path / "a"), folders)
        file.publish()
        (tmp_path / "a").unlink()
        (tmp_path / "a").write_bytes(b"another")
        file.withdraw()
        file.close()
    assert (tmp_path / "a").read_bytes() == b"another"


def test_without_unnamed_files_the_next_restore_removes_what_killed_ones_have_left(
    tmp_path: Path,
) -> None:
    fifo, out = tmp_path / "fifo", tmp_path / "out"
    os.mkfifo(fifo)
    out.mkdir()
    with (
        program(fifo, out, "partial", tmp_path) as process,
        fifo.open("wb", buffering=0) as writer,
    ):
        writer.write(whole_archive()[: cut()])
        next_event(process, "progress")
        workers = psutil.Process(process.pid).children()
        assert len(workers) > len(workers_of(process.pid)) > 0
        # All at once: nobody is left who could remove anything.
        for worker in workers:
            worker.suspend()
        process.kill()
        for worker in workers:
            worker.kill()
        process.communicate(timeout=LIMIT_S)
    left = list(out.iterdir())
    assert len(left) == 3
    (tmp_path / "vm.vma").write_bytes(whole_archive())
    said = good("restore", tmp_path / "vm.vma", out).decode()
    for path in left:
        assert f"removed {path}, which a killed restore had left" in said
    assert sorted(path.name for path in out.iterdir()) == ["cron-job", "disk-d.raw", "passwd"]


@pytest.mark.parametrize("moment", ["start_workers", "welcome"])
def test_a_reader_killed_before_its_workers_know_of_the_files_leaves_none(
    tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "vm.vma").write_bytes(whole_archive())
    with program(tmp_path / "vm.vma", out, moment, tmp_path) as process:
        assert process.wait(LIMIT_S) == -signal.SIGKILL
        wait_for(lambda: list(out.iterdir()) == [])


def test_a_partial_file_of_a_restore_under_way_is_let_be(tmp_path: Path) -> None:
    fifo, out = tmp_path / "fifo", tmp_path / "out"
    os.mkfifo(fifo)
    out.mkdir()
    (tmp_path / "other.vma").write_bytes(archive({"e": disk_data()}))
    with program(fifo, out, "partial", tmp_path) as process:
        with fifo.open("wb", buffering=0) as writer:
            writer.write(whole_archive()[: cut()])
            next_event(process, "progress")
            good("restore", tmp_path / "other.vma", out)
            rest = whole_archive()[cut() :]
            while rest:
                rest = rest[writer.write(rest) :]
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert (out / "disk-d.raw").read_bytes() == disk_data()
    assert (out / "disk-e.raw").read_bytes() == disk_data()


@pytest.mark.parametrize("umask", [0, 0o22])
def test_the_folder_that_is_made_is_its_owners_alone(tmp_path: Path, umask: int) -> None:
    (tmp_path / "vm.vma").write_bytes(whole_archive())
    for number, (tool, word) in enumerate(((VMAPIPE, "restore"), (VMA, "extract"))):
        out = tmp_path / str(number)
        good(word, tmp_path / "vm.vma", out, tool=tool, umask=umask)
        assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_a_folder_below_one_that_others_can_change_is_named(tmp_path: Path) -> None:
    (tmp_path / "vm.vma").write_bytes(whole_archive())
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    text = f"other users can change {tmp_path / 'open'}"
    done = run("restore", tmp_path / "vm.vma", tmp_path / "open" / "a")
    assert done.returncode == 0
    assert text in done.stdout.decode()
    done = run("extract", tmp_path / "vm.vma", tmp_path / "open" / "b", tool=VMA)
    assert done.returncode == 0
    assert text in done.stderr.decode()
    target = tmp_path / "open" / "old.raw"
    target.write_bytes(bytes(len(disk_data())))
    done = run("restore", tmp_path / "vm.vma", tmp_path / "c", "--device", f"d={target}")
    assert done.returncode == 0
    assert text in done.stdout.decode()
    done = run("restore", tmp_path / "vm.vma", tmp_path / "safe")
    assert "other users" not in done.stdout.decode()


def test_the_second_disk_goes_into_the_same_folder(tmp_path: Path) -> None:
    disks = {"a": b"\1" * 65536, "b": b"\2" * 70000}
    (tmp_path / "vm.vma").write_bytes(archive(disks, {"vm.conf": b"name: web\n"}))
    for name in disks:
        good("restore", tmp_path / "vm.vma", tmp_path / "out", "--device", name)
    for name, data in disks.items():
        assert (tmp_path / "out" / f"disk-{name}.raw").read_bytes() == data


@pytest.mark.parametrize("there", ["other", "longer", "link", "folder", "fifo"])
def test_a_config_that_is_another_one_is_in_the_way_and_the_option_is_named(
    tmp_path: Path, there: str
) -> None:
    (tmp_path / "vm.vma").write_bytes(archive({"a": b"\1" * 65536}, {"vm.conf": b"name: web\n"}))
    out = tmp_path / "out"
    out.mkdir()
    match there:
        case "other":
            (out / "vm.conf").write_bytes(b"name: ftp\n")
        case "longer":
            (out / "vm.conf").write_bytes(b"name: web\n\n")
        case "link":
            (tmp_path / "same").write_bytes(b"name: web\n")
            (out / "vm.conf").symlink_to(tmp_path / "same")
        case "folder":
            (out / "vm.conf").mkdir()
        case "fifo":
            os.mkfifo(out / "vm.conf")
    text = bad("restore", tmp_path / "vm.vma", out)
    assert "vm.conf exists already with another content and is not overwritten" in text
    assert "--no-configs" in text
    assert [path.name for path in out.iterdir()] == ["vm.conf"]
    good("restore", tmp_path / "vm.vma", out, "--no-configs")


def test_as_root_below_a_users_folder_nothing_is_made_by_a_path_of_theirs(
    tmp_path: Path, need: Need
) -> None:
    """Whoever watches every system call sees no name below the folder without its descriptor."""
    (strace,) = need("strace")
    if not is_root():
        pytest.skip("restoring into another user's folder needs root")
    (tmp_path / "vm.vma").write_bytes(whole_archive())
    user = tmp_path / "home"
    user.mkdir()
    os.chown(user, 65534, 65534)
    trace = tmp_path / "trace"
    calls = "linkat,link,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,chmod,chown"
    words = [strace, "-f", "-y", "-e", f"trace={calls}", "-o", str(trace), *VMAPIPE]
    good("restore", tmp_path / "vm.vma", user / "restored", tool=words)
    lines = [line for line in trace.read_text().splitlines() if str(user) in line]
    assert lines
    by_path = [line for line in lines if f'"{user}' in line]
    assert by_path == []
