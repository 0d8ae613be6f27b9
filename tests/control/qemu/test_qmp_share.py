# SPDX-License-Identifier: Apache-2.0
"""A backup that borrows QEMU's only monitor for each command: others who ask it are answered."""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control.qemu.daemon_backup import BOTH, busy_guest, restored
from tests.control.qemu.neighbour import Neighbour, visiting
from tests.control.qemu.storage_daemon import StorageDaemon
from tests.machine import LIMIT_S, bad, end_of, eventually, good, next_event, started, without_limit
from vmapipe.control.qmp.addresses import Address
from vmapipe.control.qmp.client import QmpClient, SharedQmp, _SharedPeer
from vmapipe.control.qmp.connection import Command, QmpGone, QmpPeer


class Meter(threading.Thread):
    """Between a backup and its monitor: what was asked over each connection, and how long it stayed."""

    def __init__(self, path: Path, qmp: Path) -> None:
        super().__init__(daemon=True)
        self._qmp = str(qmp)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        #: Of each connection: the commands, and the seconds from QEMU's greeting to its end.
        self.turns: list[tuple[list[str], float]] = []

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(self._qmp)
                self._pass_on(client, qemu)

    def _pass_on(self, client: socket.socket, qemu: socket.socket) -> None:
        asked: list[str] = []
        greeted_at = 0.0
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
            selector.register(client, selectors.EVENT_READ, qemu)
            selector.register(qemu, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                    if not data:
                        seconds = time.monotonic() - greeted_at if greeted_at else 0.0
                        self.turns.append((asked, seconds))
                        return
                    if key.data is qemu:
                        asked += [json.loads(line)["execute"] for line in data.splitlines()]
                    else:
                        greeted_at = greeted_at or time.monotonic()
                    key.data.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join(LIMIT_S)
        self._listener.close()


@pytest.fixture
def meter(daemon: StorageDaemon, tmp_path: Path) -> Iterator[Meter]:
    meter = Meter(tmp_path / "meter.sock", daemon.qmp)
    meter.start()
    yield meter
    meter.close()


@pytest.mark.every_qemu
def test_whoever_asks_meanwhile_is_answered_and_the_archive_is_right(
    daemon: StorageDaemon, contents: dict[str, bytes], out: Path, tmp_path: Path
) -> None:
    words = ("backup", "--json", "--qmp", daemon.qmp, "--qmp-share", *BOTH, "--speed", "2M")
    with visiting(Neighbour(daemon.qmp, 0.2)) as asking, started(*words, out / "vm.vma") as process:
        next_event(process, "instant")
        before = len(asking.took_s)
        assert eventually(lambda: len(asking.took_s) > before + 10)
        assert process.poll() is None
        without_limit(process)
        code, said = end_of(process)
    assert code == 0, said
    print(f"{len(asking.took_s)} questions, the slowest took {max(asking.took_s):.2f} s")
    assert float("inf") not in asking.took_s
    assert restored(out / "vm.vma", tmp_path / "restored") == contents
    assert daemon.ours() == []


def test_each_connection_is_for_one_command_only(
    daemon: StorageDaemon, meter: Meter, out: Path, tmp_path: Path
) -> None:
    good("backup", "--qmp", tmp_path / "meter.sock", "--qmp-share", *BOTH, out / "vm.vma")
    asked = [commands for commands, _ in meter.turns]
    assert all(commands[0] == "qmp_capabilities" for commands in asked)
    assert all(len(commands) <= 2 for commands in asked)
    assert ["qmp_capabilities", "transaction"] in asked
    held_s, longest = max((seconds, commands[-1]) for commands, seconds in meter.turns)
    print(f"{len(asked)} turns, the longest {held_s * 1000:.0f} ms for {longest}")


def test_a_guest_that_writes_meanwhile_sees_no_error_and_the_archive_is_of_one_instant(
    daemon: StorageDaemon, out: Path, tmp_path: Path
) -> None:
    words = ("backup", "--json", "--qmp", daemon.qmp, "--qmp-share", *BOTH, "--speed", "1M")
    with visiting(Neighbour(daemon.qmp, 0.5)) as asking, busy_guest(daemon) as guest:
        guest.wait_for(20)
        with started(*words, out / "vm.vma") as process:
            next_event(process, "instant")
            guest.wait_for(100)
            without_limit(process)
            code, said = end_of(process)
        guest.wait_for(20)
    assert code == 0, said
    assert float("inf") not in asking.took_s
    good("verify", out / "vm.vma")


def test_a_coordinator_that_is_killed_is_cleaned_up_after_while_others_ask(
    daemon: StorageDaemon, out: Path
) -> None:
    words = ("backup", "--json", "--qmp", daemon.qmp, "--qmp-share", *BOTH, "--speed", "64K")
    with (
        visiting(Neighbour(daemon.qmp, 0.2)) as asking,
        busy_guest(daemon) as guest,
        started(*words, out / "vm.vma") as process,
    ):
        next_event(process, "instant")
        guest.wait_for(20)
        process.send_signal(signal.SIGKILL)
        assert eventually(lambda: daemon.ours() == [])
        guest.wait_for(20)
    assert float("inf") not in asking.took_s


def test_cleanup_and_a_cancelled_backup_share_the_monitor_too(
    daemon: StorageDaemon, out: Path
) -> None:
    words = ("backup", "--json", "--qmp", daemon.qmp, "--qmp-share", *BOTH, "--speed", "64K")
    with visiting(Neighbour(daemon.qmp, 0.2)) as asking, started(*words, out / "vm.vma") as process:
        next_event(process, "instant")
        process.terminate()
        assert end_of(process)[0] == 143
        assert good("cleanup", "--qmp", daemon.qmp, "--qmp-share").startswith(b"there was nothing")
    assert daemon.ours() == []
    assert float("inf") not in asking.took_s
    assert list(out.iterdir()) == []


def test_a_job_that_somebody_cancels_fails_the_backup(daemon: StorageDaemon, out: Path) -> None:
    words = ("backup", "--json", "--qmp", daemon.qmp, "--qmp-share", *BOTH, "--speed", "64K")
    with started(*words, out / "vm.vma") as process:
        next_event(process, "instant")
        job = next(name for name in daemon.ours() if name.endswith("-0"))
        daemon.ask("job-cancel", id=job)
        code, said = end_of(process)
    assert code == 1
    assert "cancelled" in said
    assert daemon.ours() == []
    assert list(out.iterdir()) == []


def test_somebody_who_stays_connected_is_named(
    daemon: StorageDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_SharedPeer, "greeting_s", 0.5)
    with (
        contextlib.closing(QmpClient(str(daemon.qmp))),
        pytest.raises(QmpGone, match="has served another client for 30 s, which does not share it"),
    ):
        SharedQmp(Address(str(daemon.qmp)))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--qmp-share"], "--qmp-share says how --qmp is used"),
        (["--qmp", "x", "--qmp-share", "--state"], "--state needs QEMU's monitor for itself"),
    ],
)
def test_what_cannot_be_shared_is_refused(out: Path, words: list[str], text: str) -> None:
    assert text in bad("backup", *words, out / "vm.vma", code=2)


def test_a_monitor_that_shares_answers_while_its_backup_runs(
    daemon: StorageDaemon, out: Path, tmp_path: Path
) -> None:
    words = ("monitor", "--json", "--listen", tmp_path / "m.sock", "--qmp", daemon.qmp)

    def ask(name: str, **arguments: Any) -> Any:
        peer = QmpPeer()
        peer.answer_s = LIMIT_S
        client = QmpClient(str(tmp_path / "m.sock"), peer)
        try:
            return client.execute(Command(name, arguments))
        finally:
            client.close()

    with started(*words, "--qmp-share") as process:
        next_event(process, "ready")
        archive = str(out / "vm.vma")
        ask("backup", **{"backup-file": archive, "devlist": "a,b", "speed": 1 << 16})
        assert ask("query-backup")["status"] == "active"
        assert ask("query-block") == []
        ask("backup-set-speed", speed=0)
        assert eventually(lambda: ask("query-backup")["status"] != "active")
        assert ask("query-backup")["status"] == "done"
