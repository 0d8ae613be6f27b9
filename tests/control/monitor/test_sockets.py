# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: what a crash left is taken over, by one, and nobody else's is touched."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from pathlib import Path

import pytest

from vmapipe.control.qmp import sockets as module
from vmapipe.control.qmp.sockets import Listener, listen_unix, private_folder
from vmapipe.runtime.errors import Failure


def leave_behind(path: Path) -> None:
    """As a process that was killed does."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


def test_of_many_that_find_the_same_left_over_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(20):
        leave_behind(path)
        got: list[Listener] = []
        refused: list[str] = []
        together = threading.Barrier(4)

        def take(
            got: list[Listener] = got,
            refused: list[str] = refused,
            together: threading.Barrier = together,
        ) -> None:
            together.wait()
            try:
                got.append(listen_unix(str(path), 0o600, socket.SOCK_STREAM))
            except Failure as failure:
                refused.append(str(failure))

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (listener,) = got
        assert refused == [f"cannot listen on {path}: another process does"] * 3
        # It is the one whose name is there.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            listener.socket.accept()[0].close()
        listener.close()
        assert not path.exists()


def test_somebody_elses_lock_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TURN_S", 0.05)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Failure, match="another process locks it"):
            listen_unix(str(tmp_path / "s"), 0o600, socket.SOCK_STREAM)
    finally:
        os.close(fd)


def test_a_private_folder_is_taken_over_only_when_it_is_private(tmp_path: Path) -> None:
    path = tmp_path / "p"
    assert private_folder(str(path)) == str(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert private_folder(str(path)) == str(path)
    path.chmod(0o755)
    assert private_folder(str(path), others_may_look=True) == str(path)
    with pytest.raises(Failure, match="not a folder that only this user can enter"):
        private_folder(str(path))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(Failure, match="not a folder that only this user can enter"):
        private_folder(str(tmp_path / "link"))
    with pytest.raises(Failure, match="cannot make the folder"):
        private_folder(str(tmp_path / "nix" / "p"))
