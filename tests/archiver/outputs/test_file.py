# SPDX-License-Identifier: Apache-2.0
"""Files: a name when complete and on disk, one writer at a time, nothing left after trouble."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmapipe.archiver.outputs import base, file
from vmapipe.archiver.outputs.base import OutputFailure
from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.open import open_output
from vmapipe.runtime.errors import Failure, UsageError

MB = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Empty at first: whatever is in it at the end was left there."""
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture
def archive(folder: Path) -> Path:
    return folder / "vm.vma"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(number: int) -> Callable[..., None]:
    def fail(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- the name ---


def test_the_name_appears_at_the_commit_and_not_before(archive: Path, folder: Path) -> None:
    output = FileOutput(str(archive))
    output.write([b"data"])
    assert names(folder) == ["vm.vma.partial"]
    output.commit()
    assert names(folder) == ["vm.vma"]


def test_only_the_owner_may_read_a_backup(archive: Path) -> None:
    output = FileOutput(str(archive))
    output.commit()
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600


def test_a_path_without_a_folder_means_the_current_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    output = open_output("vm.vma")
    # The folder is held open: a change of directory meanwhile does not matter.
    monkeypatch.chdir("/")
    output.commit()
    assert names(folder) == ["vm.vma"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_what_exists_is_not_overwritten(
    archive: Path, folder: Path, make: Callable[[Path], None]
) -> None:
    make(archive)
    with pytest.raises(Failure, match=r"vm\.vma (exists; vmapipe does not overwrite|is a folder)"):
        open_output(str(archive))
    assert names(folder) == ["vm.vma"]


def test_a_file_that_came_before_the_lock_is_not_overwritten(archive: Path, folder: Path) -> None:
    archive.write_bytes(b"precious")
    with pytest.raises(OutputFailure, match="exists"):
        FileOutput(str(archive))
    assert archive.read_bytes() == b"precious"
    assert names(folder) == ["vm.vma"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_is_not_overwritten(
    archive: Path, folder: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    output = FileOutput(str(archive))
    output.write([b"data"])
    archive.write_bytes(b"precious")
    with pytest.raises(OutputFailure, match="exists; vmapipe does not overwrite"):
        output.commit()
    output.abandon()
    assert archive.read_bytes() == b"precious"
    assert names(folder) == ["vm.vma"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_hard_links_the_file_gets_its_name_all_the_same(
    archive: Path, folder: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    output = FileOutput(str(archive))
    output.write([b"data"])
    output.commit()
    assert archive.read_bytes() == b"data"
    assert names(folder) == ["vm.vma"]


def test_a_manifest_replaces_a_stale_one_in_one_step(archive: Path, folder: Path) -> None:
    archive.write_bytes(b"stale")
    output = FileOutput(str(archive), replace=True)
    output.write([b"new"])
    assert archive.read_bytes() == b"stale"
    output.commit()
    assert archive.read_bytes() == b"new"
    assert names(folder) == ["vm.vma"]


def test_a_folder_is_not_replaced_and_that_is_said_at_once(archive: Path, folder: Path) -> None:
    archive.mkdir()
    with pytest.raises(OutputFailure, match=r"vm\.vma is not a file"):
        FileOutput(str(archive), replace=True)
    assert names(folder) == ["vm.vma"]


def test_data_and_folder_are_on_disk_before_the_commit_returns(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def note_fsync(fd: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "data")
        fsync(fd)

    def note_link(*args: str, src_dir_fd: int, dst_dir_fd: int) -> None:
        done.append("name")
        link(*args, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "link", note_link)
    output = FileOutput(str(archive))
    output.write([b"data"])
    output.commit()
    assert done == ["data", "name", "folder"]


@pytest.mark.parametrize("path", ["", ".", "..", "/", "folder/", "a\0b"])
def test_what_cannot_be_a_file_is_refused(
    path: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises((UsageError, OutputFailure)):
        open_output(path)
    assert names(folder) == []


def test_a_folder_that_does_not_exist_is_named(folder: Path) -> None:
    with pytest.raises(OutputFailure, match=r"missing/vm\.vma: No such file or directory"):
        open_output(str(folder / "missing" / "vm.vma"))


def test_a_name_that_is_too_long_gets_a_hint(folder: Path) -> None:
    with pytest.raises(OutputFailure, match=r"File name too long; choose a shorter name"):
        open_output(str(folder / ("x" * 250)))


# --- one writer at a time ---


def test_a_second_backup_of_the_same_name_is_refused(archive: Path) -> None:
    first = FileOutput(str(archive))
    first.write([b"first"])
    with pytest.raises(OutputFailure, match=r"vm\.vma: another backup is writing it"):
        FileOutput(str(archive))
    first.commit()
    assert archive.read_bytes() == b"first"


def test_the_name_is_free_again_after_an_abandoned_backup(archive: Path) -> None:
    FileOutput(str(archive)).abandon()
    output = FileOutput(str(archive))
    output.write([b"second"])
    output.commit()
    assert archive.read_bytes() == b"second"


WRITER = """
import sys
from vmapipe.archiver.outputs.file import FileOutput
output = FileOutput(sys.argv[1])
output.write([b"half an archive"])
print("written", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_backup_left_is_replaced(archive: Path, folder: Path) -> None:
    words = [sys.executable, "-P", "-c", WRITER, str(archive)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        with pytest.raises(OutputFailure, match="another backup is writing it"):
            FileOutput(str(archive))
        writer.send_signal(signal.SIGKILL)
    assert names(folder) == ["vm.vma.partial"]
    output = FileOutput(str(archive))
    output.write([b"whole"])
    output.commit()
    assert archive.read_bytes() == b"whole"
    assert names(folder) == ["vm.vma"]


def test_a_leftover_with_a_second_name_is_not_written_into(archive: Path, folder: Path) -> None:
    # A backup was killed between giving the name and removing .partial; then
    # the archive was moved away.
    partial_path = folder / "vm.vma.partial"
    partial_path.write_bytes(b"an older archive")
    os.link(partial_path, folder / "older.vma")
    output = FileOutput(str(archive))
    output.write([b"new"])
    output.commit()
    assert (folder / "older.vma").read_bytes() == b"an older archive"
    assert names(folder) == ["older.vma", "vm.vma"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: p.symlink_to("target"), id="link"),
        pytest.param(os.mkfifo, id="FIFO"),
        pytest.param(os.mkdir, id="folder"),
    ],
)
def test_a_partial_that_is_no_file_is_left_alone(
    archive: Path, folder: Path, make: Callable[[Path], None]
) -> None:
    (folder / "target").write_bytes(b"precious")
    make(folder / "vm.vma.partial")
    with pytest.raises(
        OutputFailure, match=r"vm\.vma\.partial is not a file of vmapipe; remove it"
    ):
        FileOutput(str(archive))
    assert (folder / "target").read_bytes() == b"precious"
    assert names(folder) == ["target", "vm.vma.partial"]


def test_a_file_that_was_taken_for_a_leftover_before_its_lock_is_made_again(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    removed: list[int] = []

    def remove_first(fd: int, operation: int) -> None:
        if not removed:
            removed.append(fd)
            os.unlink(f"{archive}.partial")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    output = FileOutput(str(archive))
    output.write([b"data"])
    output.commit()
    assert removed
    assert archive.read_bytes() == b"data"


def test_without_locks_an_existing_partial_is_not_touched(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    (folder / "vm.vma.partial").write_bytes(b"somebody's")
    with pytest.raises(OutputFailure, match="cannot tell whether it is being written"):
        FileOutput(str(archive))
    assert (folder / "vm.vma.partial").read_bytes() == b"somebody's"


def test_without_locks_a_file_can_be_written(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EOPNOTSUPP))
    output = FileOutput(str(archive))
    output.write([b"data"])
    output.commit()
    assert archive.read_bytes() == b"data"


# --- trouble with the disk ---


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """The largest file that this process may write, in bytes."""
    limit, hard = 4 * MB, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_fails_with_its_name_size_and_a_way_out(
    archive: Path, folder: Path, file_size_limit: int
) -> None:
    output = FileOutput(str(archive))
    with pytest.raises(OutputFailure) as caught:
        output.write([bytes(MB)] * 5)
    assert str(caught.value) == (
        f"cannot write {archive}: File too large after 3.8 MiB; "
        f"the file system or a limit (ulimit -f) allows no larger file"
    )
    assert caught.value.written_bytes == output.written_bytes == file_size_limit
    assert caught.value.errno == errno.EFBIG
    output.abandon()
    assert names(folder) == []


@pytest.fixture
def small_disk(tmp_path: Path, need: Callable[..., list[str]]) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount, umount = need("mount", "umount")
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=4M", "tmpfs", path])
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run([umount, path], check=True)


def test_a_full_disk_fails_with_the_way_out_and_gets_its_space_back(small_disk: Path) -> None:
    output = open_output(str(small_disk / "vm.vma"))
    output.write([bytes(3 << 20)])
    with pytest.raises(
        OutputFailure,
        match=r"small/vm\.vma: No space left on device after 4\.0 MiB; free space or choose an",
    ):
        output.write([bytes(3 << 20)])
    output.abandon()
    assert names(small_disk) == []
    usage = os.statvfs(small_disk)
    assert usage.f_bfree == usage.f_blocks


def test_an_error_of_the_disk_at_the_commit_leaves_nothing(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = FileOutput(str(archive))
    output.write([b"data"])
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OutputFailure, match=r"Input/output error after 4 bytes; the device is fa"):
        output.commit()
    output.abandon()
    assert names(folder) == []


def test_an_error_after_the_name_was_given_takes_the_name_back(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = FileOutput(str(archive))
    output.write([b"data"])
    monkeypatch.setattr("vmapipe.archiver.outputs.file.sync_folder", failing(errno.EIO))
    with pytest.raises(OutputFailure, match="Input/output error"):
        output.commit()
    output.abandon()
    assert names(folder) == []


def test_an_archive_that_is_abandoned_during_its_fsync_gets_no_name(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = FileOutput(str(archive))
    output.write([b"data"])
    monkeypatch.setattr("vmapipe.archiver.outputs.base.ABANDON_WAIT_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda fd: output.abandon())
    with pytest.raises(OutputFailure, match="abandoned"):
        output.commit()
    assert names(folder) == []


def test_a_folder_that_was_removed_meanwhile_is_an_error(archive: Path, folder: Path) -> None:
    output = FileOutput(str(archive))
    (folder / "vm.vma.partial").unlink()
    folder.rmdir()
    with pytest.raises(OutputFailure, match="No such file or directory"):
        output.commit()
    output.abandon()


def test_a_long_file_is_sent_to_the_disk_while_it_grows(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(base, "STEP_BYTES", 2 * MB)
    monkeypatch.setattr(base, "LAG_BYTES", 3 * MB)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, n, advice: asked.append((at, n)))
    output = FileOutput(str(archive))
    for _ in range(6):
        output.write([bytes(MB)])
    output.commit()
    assert asked == [(0, 2 * MB), (MB, 3 * MB), (3 * MB, 3 * MB)]


def test_a_file_system_without_advice_is_only_slower(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "STEP_BYTES", 1)
    monkeypatch.setattr(os, "posix_fadvise", failing(errno.ENOSYS))
    output = FileOutput(str(archive))
    output.write([b"data"])
    output.write([b"data"])
    output.commit()
    assert archive.read_bytes() == b"datadata"


def test_the_mode_of_a_backup_is_private() -> None:
    assert file.MODE & 0o077 == 0


@pytest.mark.parametrize("turn", [1, 2])
def test_a_close_that_fails_leaves_either_nothing_or_a_whole_archive_and_says_which(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """The first one is before the file has its name, the last one when all is done."""
    output = FileOutput(str(archive))
    output.write([b"data"])
    close = os.close
    seen: list[int] = []

    def failing(fd: int) -> None:
        is_file = os.path.samestat(os.fstat(fd), status)
        close(fd)
        if is_file:
            seen.append(fd)
            if len(seen) == turn:
                raise OSError(errno.EIO, "lost writes")

    (partial,) = folder.iterdir()
    status = partial.stat()
    monkeypatch.setattr(os, "close", failing)
    if turn == 1:
        with pytest.raises(OutputFailure):
            output.commit()
        output.abandon()
        monkeypatch.undo()
        assert list(folder.iterdir()) == []
    else:
        output.commit()
        monkeypatch.undo()
        assert archive.read_bytes() == b"data"


def test_what_is_withdrawn_after_its_commit_is_only_ever_the_file_itself(
    archive: Path, folder: Path
) -> None:
    output = FileOutput(str(archive))
    output.write([b"data"])
    output.commit()
    archive.rename(folder / "moved")
    archive.write_bytes(b"somebody else's")
    output.withdraw()
    assert archive.read_bytes() == b"somebody else's"
    os.replace(folder / "moved", archive)
    output.withdraw()
    assert list(folder.iterdir()) == []
