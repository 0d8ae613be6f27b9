# SPDX-License-Identifier: Apache-2.0
"""What is done in a folder that is held is done in it, whatever stands at its path by then."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vmapipe.runtime import heldfolder
from vmapipe.runtime.heldfolder import HeldFolder

NOBODY = 65534


@pytest.fixture(params=["openat2", "by component"])
def way_down(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by component":

        def unknown(*words: object) -> int:
            raise OSError(errno.ENOSYS, "no such call")

        monkeypatch.setattr(heldfolder, "openat2", unknown)


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


@pytest.mark.usefixtures("way_down")
def test_a_path_below_a_folder_leads_neither_out_of_it_nor_over_a_link(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "file").write_bytes(b"mine")
    (tmp_path / "out").write_bytes(b"not mine")
    (tmp_path / "in" / "up").symlink_to("..")
    (tmp_path / "in" / "end").symlink_to("deep/file")
    with HeldFolder(str(tmp_path / "in")) as folder:
        fd = folder.open_below("deep/file", os.O_RDONLY)
        assert os.read(fd, 9) == b"mine"
        os.close(fd)
        os.close(folder.open_below("deep/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        refused = r"symbolic|cross-device|No such file|Not a directory|not a name"
        for path in ("../out", "deep/../../out", "up/out", "end", "/etc/passwd", ""):
            with pytest.raises(OSError, match=refused):
                folder.open_below(path, os.O_RDONLY)
    assert stat.S_IMODE((tmp_path / "in" / "deep" / "new").stat().st_mode) == 0o600


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
        monkeypatch.setattr(heldfolder, "rename_noreplace", unknown)
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
        "from vmapipe.runtime.heldfolder import HeldFolder; import sys; "
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
