# SPDX-License-Identifier: Apache-2.0
"""New files appear when they are complete; existing targets must fit, and must not be in use."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine import Need
from vmapipe.restore.archive.errors import RestoreError, TargetError
from vmapipe.restore.targets.files import (
    ExistingTarget,
    Folders,
    NewFile,
    publish_all,
    write_configs,
)
from vmapipe.restore.targets.plan import Kind, TargetSpec
from vmapipe.runtime import folders as runtime_folders
from vmapipe.runtime.folders import HeldFolder
from vmapipe.vma.errors import HeaderError
from vmapipe.vma.header import Config, Device, Header

MIB = 1 << 20


def no_unnamed_files(folder: HeldFolder, mode: int = 0) -> int:
    raise OSError(errno.EOPNOTSUPP, "no unnamed files here")


def existing(path: Path | str, size_bytes: int, **more: Any) -> ExistingTarget:
    spec = TargetSpec(str(path), Kind.EXISTING, **more)
    return ExistingTarget(spec, Device(1, "d", size_bytes))


@pytest.fixture
def folders() -> Iterator[Folders]:
    with Folders() as held:
        yield held


@pytest.fixture(params=["unnamed", "partial"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a new file waits: without a name, or (NFS, FUSE) with another one."""
    if request.param == "partial":
        monkeypatch.setattr(HeldFolder, "make_unnamed", no_unnamed_files)
    return str(request.param)


def hidden(folder: Path) -> list[Path]:
    return list(folder.glob(".vmapipe-*.partial"))


@pytest.mark.usefixtures("way")
def test_a_new_file_appears_under_its_name_when_it_is_published(
    tmp_path: Path, folders: Folders
) -> None:
    path = tmp_path / "new"
    file = NewFile(str(path), folders)
    file.set_size(70_000)
    os.pwrite(file.fd, b"data", 10)
    assert not path.exists()
    file.publish()
    file.close()
    assert path.read_bytes() == (bytes(10) + b"data").ljust(70_000, b"\0")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_nlink == 1
    assert hidden(tmp_path) == []


def test_a_new_file_that_is_not_published_is_gone(
    tmp_path: Path, way: str, folders: Folders
) -> None:
    file = NewFile(str(tmp_path / "new"), folders)
    assert len(hidden(tmp_path)) == (1 if way == "partial" else 0)
    assert bool(file.partial) == (way == "partial")
    file.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("way")
def test_nothing_is_overwritten_neither_early_nor_late(tmp_path: Path, folders: Folders) -> None:
    path = tmp_path / "new"
    file = NewFile(str(path), folders)
    path.write_bytes(b"somebody else's")
    with pytest.raises(TargetError, match="has appeared meanwhile and is not overwritten"):
        file.publish()
    file.close()
    with pytest.raises(TargetError, match="exists already and is not overwritten"):
        NewFile(str(path), folders)
    path.unlink()
    path.symlink_to("/nonexistent/elsewhere")
    with pytest.raises(TargetError, match="exists already"):
        NewFile(str(path), folders)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("way")
def test_files_are_published_all_together_or_not_at_all(tmp_path: Path, folders: Folders) -> None:
    files = [NewFile(str(tmp_path / name), folders) for name in "abc"]
    (tmp_path / "c").write_bytes(b"mine")
    with pytest.raises(TargetError, match="has appeared meanwhile"):
        publish_all(files)
    for file in files:
        file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("rename", ["noreplace", "plain"])
def test_a_file_system_without_links_renames(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch, rename: str
) -> None:
    def refuse(*words: object, **more: object) -> int:
        raise OSError(errno.EPERM, "no links here")

    def refuse_noreplace(*words: object) -> None:
        raise OSError(errno.EINVAL, "what is that")

    monkeypatch.setattr(HeldFolder, "make_unnamed", no_unnamed_files)
    monkeypatch.setattr(os, "link", refuse)
    if rename == "plain":
        monkeypatch.setattr(runtime_folders, "rename_noreplace", refuse_noreplace)
    file = NewFile(str(tmp_path / "a"), folders)
    file.publish()
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    late = NewFile(str(tmp_path / "b"), folders)
    (tmp_path / "b").write_bytes(b"mine")
    with pytest.raises(TargetError, match="has appeared meanwhile"):
        late.publish()
    late.close()
    assert (tmp_path / "b").read_bytes() == b"mine"
    assert hidden(tmp_path) == []


def test_a_new_file_in_no_folder_is_refused(tmp_path: Path, folders: Folders) -> None:
    with pytest.raises(TargetError, match=r"cannot create .*: No such file or directory"):
        NewFile(str(tmp_path / "no" / "folder"), folders)


@pytest.mark.parametrize("surplus", [0, 1, 4 * MIB])
def test_an_existing_file_may_be_up_to_4_mib_larger(tmp_path: Path, surplus: int) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"x")
    os.truncate(path, MIB + surplus)
    existing(path, MIB).close()
    assert path.stat().st_size == MIB + surplus


@pytest.mark.parametrize(
    ("there", "words"), [(MIB - 1, "smaller"), (5 * MIB + 1, "more than 4 MiB larger")]
)
def test_an_existing_file_that_does_not_fit_is_refused(
    tmp_path: Path, there: int, words: str
) -> None:
    path = tmp_path / "old"
    path.touch()
    os.truncate(path, there)
    with pytest.raises(TargetError, match=words) as caught:
        existing(path, MIB)
    assert caught.value.reference_text == (
        f"vma_reader_register_bs for stream d failed - unexpected size {there} != {MIB}"
    )


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    for path in ("/dev/null", str(tmp_path)):
        with pytest.raises(TargetError, match="neither a file nor a block device"):
            existing(path, 512)
    with pytest.raises(TargetError, match="No such file"):
        existing(tmp_path / "absent", 512)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TargetError, match="neither a file nor a block device"):
        existing(tmp_path / "fifo", 512)
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_a_file_that_may_not_be_written_is_refused() -> None:
    # Not even root may write to a program that runs.
    with pytest.raises(TargetError, match=r"cannot write to .*: Text file busy"):
        existing(os.path.realpath("/proc/self/exe"), 512)


def test_a_block_device_that_is_in_use_is_refused(loop: str) -> None:
    holder = os.open(loop, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(TargetError, match=r"cannot write to .*: it is mounted or in use"):
        existing(loop, 16 * MIB)
    os.close(holder)
    target = existing(loop, 16 * MIB)
    assert target.identity[0] == "block"
    target.close()


def test_a_read_only_block_device_is_refused(loop: str, need: Need) -> None:
    (blockdev,) = need("blockdev")
    subprocess.run([blockdev, "--setro", loop], check=True)
    try:
        with pytest.raises(TargetError, match="is a read-only block device"):
            existing(loop, 16 * MIB)
    finally:
        # The mark would outlive the loop device's file.
        subprocess.run([blockdev, "--setrw", loop], check=True)


@pytest.mark.usefixtures("way")
def test_configs_are_written_by_their_names(tmp_path: Path, folders: Folders) -> None:
    header = Header(bytes(16), 0, (), (Config("a.conf", b"one\n"), Config("b", b"")))
    written = write_configs(header, str(tmp_path), folders)
    for file in written:
        file.close()
    assert [file.path for file in written] == [str(tmp_path / "a.conf"), str(tmp_path / "b")]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.conf": b"one\n",
        "b": b"",
    }


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["ok", "../evil"], HeaderError),
        (["ok", "/abs"], HeaderError),
        (["ok", "taken"], RestoreError),
    ],
)
def test_where_one_config_cannot_be_written_none_is(
    tmp_path: Path, folders: Folders, names: list[str], error: type[Exception]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "taken").write_bytes(b"mine")
    header = Header(bytes(16), 0, (), tuple(Config(name, b"x") for name in names))
    with pytest.raises(error):
        write_configs(header, str(folder), folders)
    assert [path.name for path in folder.iterdir()] == ["taken"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "taken").read_bytes() == b"mine"
