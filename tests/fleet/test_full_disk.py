# SPDX-License-Identifier: Apache-2.0
"""The disk of a fleet's database, or catalogue, is really full: one line says so, no archive is lost, and it goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.namespaces import need_postgres
from tests.machine import LIMIT_S, VMAPIPE, Need
from vmapipe.fleet import serve, worker
from vmapipe.fleet.carrier import Ending
from vmapipe.fleet.configuration import parse
from vmapipe.fleet.engine import open_database
from vmapipe.fleet.postgres import PrivatePostgres, private_dsn
from vmapipe.fleet.records import ArchiveRecord, RunRecord, Standing
from vmapipe.runtime.cancel import Cancel

# What a new PostgreSQL needs is some 38 MiB.
_POSTGRES_MIB = 64


class SmallDisk:
    """A file system that can be filled, and emptied again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filling = folder, folder / "filling"

    def fill(self) -> None:
        with self._filling.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass

    def empty(self) -> None:
        self._filling.unlink()


@pytest.fixture
def small_disk(short_folder: Path, need: Need) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount, umount = need("mount", "umount")
    short_folder.chmod(0o755)
    options = f"size={_POSTGRES_MIB}M,mode=755"
    if subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", short_folder]).returncode:
        pytest.skip("mounting is not allowed here")
    yield SmallDisk(short_folder)
    subprocess.run([umount, short_folder], check=True)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_and_a_worker_outlast_a_full_disk_of_their_postgres_and_its_end(
    small_disk: SmallDisk, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_postgres(need)
    for module in (serve, worker):
        monkeypatch.setattr(module, "_RETRY_S", 0.1)
    fleet, _ = parse(b'[defaults]\ntarget = "b"\n[host.h]\n[target.b]\ndirectory = "/b"\n')
    state, said, cancel = small_disk.folder / "pg", list[str](), Cancel()

    def backup(host: object, request: object, tell: Callable[..., None], stop: object) -> Ending:
        small_disk.fill()
        stored = {"archive": "/b/web.vma", "uuid": "u", "stored_bytes": 1}
        tell({"event": "ended", "exit_code": 0, "result": {"stored": stored}})
        return Ending(0, "", is_down=False)

    def start(own: PrivatePostgres) -> None:
        if is_full.is_set():
            small_disk.fill()  # with what it has freed when it ended
        really_start(own)

    is_full, really_start = threading.Event(), PrivatePostgres.start
    monkeypatch.setattr(PrivatePostgres, "start", start)
    monkeypatch.setattr(worker, "call", backup)
    served = _thread(serve.serve, fleet, "", str(state), said.append, cancel)
    try:
        until(lambda: "serving 1 hosts" in said)
        with contextlib.closing(open_database(dsn := private_dsn(str(state)))) as catalogue:
            run = RunRecord("r", "backup", "web", "h", "b", "web.vma", planned_s=catalogue.now_s())
            catalogue.put(run)
        request = {"verb": "backup", "run": "r", "limit_s": 60, "kind": "qmp", "socket": "/web.qmp"}
        job = {"run": "r", "request": {**request, "archive": "web.vma", "directory": "/b"}}
        told = list[str]()
        host = worker._HostWorker(fleet, "h", dsn, told.append)
        done = _thread(host.do, job, threading.Event())
        until(lambda: len(told) == 2)
        assert "No space left on device: its disk is full: with room again" in told[1]
        is_full.set()
        os.kill(int((state / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGINT)
        until(lambda: "did not start" in said[-1])
        assert said[-1].endswith("(its disk is full: with room again it goes on); trying again")
        is_full.clear()
        small_disk.empty()
        until(lambda: said[-1] == "the fleet's database does its work again")
        done.join(LIMIT_S)
        assert told[2:] == ["r: backup of web done"]
        with contextlib.closing(open_database(dsn)) as catalogue:
            assert [run.state for run in catalogue.select(RunRecord)] == ["done"]
            assert [found.archive for found in catalogue.select(ArchiveRecord)] == ["web.vma"]
            assert [found.failures for found in catalogue.select(Standing)] == [0]
    finally:
        cancel.ask("enough")
        served.join(LIMIT_S)
        cancel.close()


def test_a_round_on_a_full_disk_starts_nothing_and_the_next_one_with_room_does_it_all(
    small_disk: SmallDisk,
) -> None:
    """Not even SQLite's shared memory, which is a file there, ends it by a signal."""
    folder = small_disk.folder
    (folder / "disks").mkdir()
    (folder / "disks" / "web.raw").write_bytes(os.urandom(1 << 16))
    (folder / "b").mkdir()
    (folder / "fleet.toml").write_text(
        f'[defaults]\ntarget = "b"\n[host.h]\nguests = ["disks:{folder}/disks/*.raw"]\n'
        f'[target.b]\ndirectory = "{folder}/b"\n[fleet]\ncatalogue = "{folder}/fleet.db"\n'
    )

    def fleet(*words: str) -> tuple[int, str]:
        argv = [*VMAPIPE, "fleet", *words, "--file", str(folder / "fleet.toml")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S)
        return done.returncode, done.stdout + done.stderr

    small_disk.fill()
    code, said = fleet("run")
    assert code == 1
    assert said.count("\n") == 1
    assert "with room and rights again" in said
    small_disk.empty()
    assert fleet("scan")[0] == 0
    small_disk.fill()
    code, said = fleet("run")
    assert code == 1
    assert "with room and rights again" in said
    assert list((folder / "b").iterdir()) == []
    small_disk.empty()
    assert "1 jobs done, 0 failed" in fleet("run")[1]


def _thread(do: Callable[..., None], *words: Any) -> threading.Thread:
    thread = threading.Thread(target=do, args=words)
    thread.start()
    return thread
