# SPDX-License-Identifier: Apache-2.0
"""Folders of our sockets: in use, left over, and somebody else's."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from vmapipe.runtime import folders
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import HeldFolder, OwnFolder

MAKES_ONE = (
    "from vmapipe.runtime.folders import OwnFolder; import sys; "
    "folder = OwnFolder('x', sys.argv[1]); print(folder.path, flush=True); sys.stdin.read()"
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_its_owner_can_enter_a_folder_and_it_is_gone_with_its_content_at_the_end(
    tmp_path: Path,
) -> None:
    with OwnFolder("x", str(tmp_path)) as folder:
        assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700
        assert os.path.basename(folder.path).startswith("vmapipe-x-")
        (Path(folder.path) / "socket").touch()
    assert names(tmp_path) == set()


def test_a_killed_process_leaves_its_folder_to_the_next_one_and_a_living_one_keeps_it(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAKES_ONE, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with OwnFolder("x", str(tmp_path)):
            assert theirs.is_dir()
        process.kill()
    assert names(tmp_path) == {theirs.name}
    OwnFolder("x", str(tmp_path)).remove()
    assert names(tmp_path) == set()


def test_what_is_of_another_kind_a_link_or_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "vmapipe-xy-1").mkdir()
    (tmp_path / "vmapipe-x-link").symlink_to(tmp_path / "kept")
    (tmp_path / "vmapipe-x-file").touch()
    before = names(tmp_path)
    OwnFolder("x", str(tmp_path)).remove()
    assert names(tmp_path) == before


def test_a_folder_of_another_user_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vmapipe-x-1").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    OwnFolder("x", str(tmp_path)).remove()
    assert names(tmp_path) == {"vmapipe-x-1"}


@pytest.mark.parametrize("opened", [False, True])
def test_a_folder_that_was_taken_for_a_leftover_before_its_lock_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    taken: list[str] = []

    def too_late(path: str, flags: int, *more: Any, **options: Any) -> int:
        first = not taken and os.path.basename(path).startswith("vmapipe-x-")
        if first:
            taken.append(path)
        if first and not opened:
            os.rmdir(path)
        fd = original(path, flags, *more, **options)
        if first and opened:
            os.rmdir(path)
        return fd

    original = os.open
    monkeypatch.setattr(os, "open", too_late)
    with OwnFolder("x", str(tmp_path)) as folder:
        assert taken
        assert folder.path != taken[0]
        assert names(tmp_path) == {os.path.basename(folder.path)}
    assert names(tmp_path) == set()


def test_a_tmpdir_too_long_for_a_socket_is_not_used_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("y" * 90)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with OwnFolder("storage") as folder:
        assert len(os.path.join(folder.path, "daemon.sock")) <= folders.MAX_SOCKET_PATH_BYTES
        assert names(long) == set()
    assert not os.path.exists(folder.path)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        assert folders.folder_for_sockets() == short


def test_a_tmpdir_in_which_others_can_rename_is_not_used_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        place = Path(short) / "t"
        place.mkdir()
        monkeypatch.setenv("TMPDIR", str(place))
        assert folders.folder_for_sockets() == str(place)
        place.chmod(0o777)
        with OwnFolder("x") as folder:
            assert os.path.dirname(folder.path) == "/tmp"
        assert names(place) == set()
        place.chmod(0o1777)
        assert folders.folder_for_sockets() == str(place)
        if os.geteuid() == 0:
            os.chown(place, 65534, -1)
            assert folders.folder_for_sockets() == "/tmp"
        # And where there is no other place either, that is said.
        place.chmod(0o777)
        monkeypatch.setattr(folders, "_SHORT_FOLDER", str(place))
        with pytest.raises(Failure, match="no safe place for sockets"):
            folders.folder_for_sockets()


NOBODY = 65534


def swapped_for_a_link(folder: Path, elsewhere: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(elsewhere)


def test_a_folder_swapped_for_a_link_is_still_the_folder_that_was_opened(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    (other / "victim").write_bytes(b"keep me")
    with HeldFolder(str(ours)) as folder:
        swapped_for_a_link(ours, other)
        os.close(folder.open("a", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        fd = folder.make_unnamed()
        folder.name_unnamed(fd, "b")
        os.close(fd)
        folder.rename_new("a", "c")
        folder.make_folder("d").close()
        victim = os.open(other / "victim", os.O_RDONLY)
        assert not folder.remove("victim", victim)
        os.close(victim)
        folder.sync()
        assert sorted(folder.names()) == ["b", "c", "d"]
    assert [path.name for path in other.iterdir()] == ["victim"]
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["b", "c", "d"]


def test_a_link_in_the_place_of_a_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with HeldFolder(str(tmp_path)) as folder:
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_RDONLY | os.O_DIRECTORY):
            with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
                folder.open("link", flags)
        with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
            folder.folder("link")
        status = folder.status("link")
        assert status is not None
        assert stat.S_ISLNK(status.st_mode)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd"])
def test_a_name_is_a_single_component(tmp_path: Path, name: str) -> None:
    with HeldFolder(str(tmp_path)) as folder:
        for use in (folder.status, folder.folder, folder.make_folder):
            with pytest.raises(OSError, match="not a name in a folder"):
                use(name)
        with pytest.raises(OSError, match="not a name in a folder"):
            folder.open(name, os.O_RDONLY)
        with pytest.raises(OSError, match="not a name in a folder"):
            folder.rename_new("x", name)


def test_what_has_another_inode_is_not_removed(tmp_path: Path) -> None:
    with HeldFolder(str(tmp_path)) as folder:
        fd = folder.open("a", os.O_WRONLY | os.O_CREAT)
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").write_bytes(b"another")
        assert not folder.remove("a", fd)
        assert folder.remove("b", fd)
        assert not folder.remove("b", fd)
        os.close(fd)
        made = folder.make_folder("d")
        (tmp_path / "d").rename(tmp_path / "e")
        (tmp_path / "d").mkdir()
        assert not folder.remove_folder("d", made)
        assert folder.remove_folder("e", made)
        made.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]


def test_a_folder_that_is_made_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with HeldFolder(str(tmp_path)) as folder:
            folder.make_folder("d").close()
            with pytest.raises(FileExistsError):
                folder.make_folder("d")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700


def test_a_taken_name_is_never_replaced_by_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"mine")
    with HeldFolder(str(tmp_path)) as folder:
        os.close(folder.open("a", os.O_WRONLY | os.O_CREAT))
        with pytest.raises(FileExistsError):
            folder.rename_new("a", "taken")
        fd = folder.make_unnamed()
        with pytest.raises(FileExistsError):
            folder.name_unnamed(fd, "taken")
        os.close(fd)
        folder.replace("a", "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken").read_bytes() == b""


@pytest.mark.parametrize("way", ["noreplace", "plain"])
def test_a_file_system_without_links_renames_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    def unknown(*words: object) -> None:
        raise OSError(errno.EINVAL, "what is that")

    monkeypatch.setattr(os, "link", refuse)
    if way == "plain":
        monkeypatch.setattr(folders, "rename_noreplace", unknown)
    (tmp_path / "taken").write_bytes(b"mine")
    with HeldFolder(str(tmp_path)) as folder:
        os.close(folder.open("a", os.O_WRONLY | os.O_CREAT))
        with pytest.raises(FileExistsError):
            folder.rename_new("a", "taken")
        folder.rename_new("a", "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "taken"]
    assert (tmp_path / "taken").read_bytes() == b"mine"


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path,
) -> None:
    makes = (
        "from vmapipe.runtime.folders import HeldFolder; import sys; "
        "print(HeldFolder(sys.argv[1]).make_locked('.x-', '.part')[0], flush=True); "
        "sys.stdin.read()"
    )
    words = [sys.executable, "-P", "-c", makes, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        (tmp_path / ".x-foreign.other").touch()
        (tmp_path / ".x-link.part").symlink_to("/etc/passwd")
        os.mkfifo(tmp_path / ".x-fifo.part")
        with HeldFolder(str(tmp_path)) as folder:
            assert folder.remove_leftovers(".x-", ".part") == []
            other.kill()
            other.wait()
            assert folder.remove_leftovers(".x-", ".part") == [name]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".x-fifo.part",
        ".x-foreign.other",
        ".x-link.part",
    ]


def test_a_folder_that_others_can_change_is_told_from_one_that_they_cannot(tmp_path: Path) -> None:
    def told(path: Path) -> str:
        with HeldFolder(str(path)) as folder:
            return folder.changeable_by_others()

    safe = tmp_path / "safe" / "in"
    safe.mkdir(parents=True)
    assert told(safe) == ""
    (tmp_path / "safe").chmod(0o1777)
    assert told(safe) == ""
    (tmp_path / "safe").chmod(0o777)
    assert told(safe) == str(tmp_path / "safe")
    (tmp_path / "safe").chmod(0o755)
    # A way over a link that others can change.
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "link").symlink_to(safe)
    assert told(tmp_path / "open" / "link") == str(tmp_path / "open")
    if os.geteuid() == 0:
        os.chown(tmp_path / "safe", NOBODY, NOBODY)
        assert told(safe) == str(tmp_path / "safe")
