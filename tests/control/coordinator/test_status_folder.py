# SPDX-License-Identifier: Apache-2.0
"""The folder with the sockets of running backups."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import LIMIT_S
from vmapipe.control.coordinator.status_socket import listen, runtime_folder, sockets
from vmapipe.runtime.errors import Failure

JOB, OTHER = "1" * 32, "2" * 32


@pytest.fixture
def folder(runtime_folder: Path) -> Path:
    return runtime_folder


def test_a_job_is_found_by_its_id_while_it_listens_and_leaves_nothing(folder: Path) -> None:
    listener = listen(JOB)
    assert sockets() == {JOB: str(folder / f"{JOB}.sock")}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / f"{JOB}.sock").stat().st_mode & 0o777 == 0o600
    listener.close()
    assert sockets() == {}
    assert list(folder.iterdir()) == []


def test_the_socket_of_a_killed_job_is_removed_by_the_next_one(folder: Path) -> None:
    folder.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / f"{OTHER}.sock"))
    listener = listen(JOB)
    assert [path.name for path in folder.iterdir()] == [f"{JOB}.sock"]
    listener.close()


def test_a_job_that_is_killed_while_it_makes_its_socket_leaves_nothing_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call that makes it one, in a process of its own."""
    for call in ("bind", "listen"):
        pid = os.fork()
        if not pid:
            monkeypatch.setattr(socket.socket, call, _killed_behind(getattr(socket.socket, call)))
            listen(OTHER)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert len(list(folder.iterdir())) == 1
        assert sockets() == {}
        assert list(folder.iterdir()) == []


def _killed_behind(call: Callable[..., object]) -> Callable[..., None]:
    def killed(*arguments: object) -> None:
        call(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    return killed


def test_a_socket_that_is_there_before_somebody_listens_is_not_taken_for_a_dead_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, str]] = []
    looking: list[threading.Thread] = []
    probed = threading.Event()
    bind, connect = socket.socket.bind, socket.socket.connect

    def slow_bind(sock: socket.socket, address: str) -> None:
        bind(sock, address)
        looking.append(threading.Thread(target=lambda: found.append(sockets())))
        looking[0].start()
        # It has seen that nobody listens yet.
        assert probed.wait(LIMIT_S)

    def told(sock: socket.socket, address: str) -> None:
        try:
            connect(sock, address)
        finally:
            probed.set()

    monkeypatch.setattr(socket.socket, "bind", slow_bind)
    monkeypatch.setattr(socket.socket, "connect", told)
    listener = listen(JOB)
    looking[0].join(LIMIT_S)
    assert found == [{JOB: str(folder / f"{JOB}.sock")}]
    listener.close()


def test_what_is_no_socket_of_a_job_is_left_alone(folder: Path) -> None:
    folder.mkdir(0o700)
    (folder / "notes").write_text("mine")
    assert sockets() == {}
    assert (folder / "notes").read_text() == "mine"


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(Failure, match="not a folder that only this user can write to"):
        listen(JOB)


def test_a_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    folder.symlink_to(tmp_path)
    with pytest.raises(Failure, match="not a folder that only this user can write to"):
        listen(JOB)


def test_a_path_that_is_too_long_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMAPIPE_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(Failure, match=r"a socket's path has 1\.\.107 bytes"):
        listen(JOB)


def test_each_user_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMAPIPE_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime_folder() == "/run/vmapipe"
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert runtime_folder() == "/run/user/7/vmapipe"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_folder().endswith("/vmapipe-7")
