# SPDX-License-Identifier: Apache-2.0
"""Folders of our sockets: in use, left over, and somebody else's."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vmapipe.runtime import folders
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import OwnFolder

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

    def too_late(path: str) -> int:
        first = not taken
        if first:
            taken.append(path)
        if first and not opened:
            os.rmdir(path)
        fd = original(path)
        if first and opened:
            os.rmdir(path)
        return fd

    original = folders._open
    monkeypatch.setattr(folders, "_open", too_late)
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
