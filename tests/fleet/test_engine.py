# SPDX-License-Identifier: Apache-2.0
"""`fleet serve` and `worker` under kills: every machine is stored, no limit exceeded, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.fleet.namespaces import need_postgres
from tests.machine import LIMIT_S, Need
from vmapipe.fleet.engine import (
    STALLED_S,
    DatabaseCatalogue,
    DatabaseLost,
    JobQueue,
    _failing,
    open_database,
    run_worker,
)
from vmapipe.fleet.outcome import new_run
from vmapipe.fleet.planner import FleetTask
from vmapipe.fleet.postgres import PrivatePostgres
from vmapipe.fleet.records import ArchiveRecord, RunRecord
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

MAIN = (sys.executable, "-P", "-m", "vmapipe.control.main")
HOST_JOBS, TOTAL = 2, 3


@pytest.fixture(autouse=True)
def _postgres(need: Need) -> None:
    need_postgres(need)


@pytest.fixture
def state(short_folder: Path) -> Path:
    # PostgreSQL runs as another user, who has to get there.
    short_folder.chmod(0o755)
    return short_folder / "pg"


class FleetSite:
    """Local hosts with disks at rest, a server and workers that can be killed, and an observer."""

    def __init__(self, folder: Path, state: Path, hosts: int, machines: int) -> None:
        self.folder, self.state = folder, state
        self.hosts = [f"pve{n}" for n in range(hosts)]
        self.machines = [f"vm{n}" for n in range(machines)]
        (folder / "b").mkdir()
        text = f'[defaults]\ntarget = "b"\nevery = "30d"\n[limits]\ntotal = {TOTAL}\n'
        for number, host in enumerate(self.hosts):
            (folder / host).mkdir()
            text += f'[host.{host}]\njobs = {HOST_JOBS}\nguests = ["disks:{folder}/{host}/*.raw"]\n'
            for name in self.machines[number::hosts]:
                (folder / host / f"{name}.raw").write_bytes(os.urandom(1 << 20))
        (folder / "fleet.toml").write_text(text + f'[target.b]\ndirectory = "{folder}/b"\n')
        self.running = dict[str, subprocess.Popen[bytes]]()
        self.trouble = list[str]()

    def start(self, name: str) -> None:
        """Start the server (`serve`) or a host's worker."""
        words = ["serve"] if name == "serve" else ["worker", "--host", name]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [
                    *(*MAIN, "fleet", *words, "--file", str(self.folder / "fleet.toml")),
                    *("--state", str(self.state)),
                ],
                stdout=log,
                stderr=log,
            )

    def kill(self, name: str) -> None:
        """As by SIGKILL."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """The server last: who loses its database while it ends waits 5 s for another connection."""
        for name in sorted(self.running, key=lambda name: name == "serve"):
            self.running[name].terminate()
            self.running[name].wait(LIMIT_S)

    @property
    def stored(self) -> Counter[str]:
        return Counter(p.name.partition("-")[0] for p in (self.folder / "b").glob("*.vma.zst"))

    def observe(self, stop: threading.Event) -> None:
        """Count backups by what the kernel shows, knowing nothing of catalogue or queue."""
        while not stop.wait(0.05):
            disks = [disk for disk in map(self._disk_of, psutil.process_iter()) if disk]
            hosts = Counter(Path(disk).parent.name for disk in disks)
            doubled = [disk for disk, count in Counter(disks).items() if count > 1]
            if len(disks) > TOTAL or max(hosts.values(), default=0) > HOST_JOBS or doubled:
                self.trouble.append(f"{disks}")

    def _disk_of(self, process: psutil.Process) -> str:
        """The disk of a backup's coordinator; its copies by fork have it as their parent."""
        try:
            words = process.cmdline()
            if "backup" not in words or str(self.folder) not in " ".join(words):
                return ""
            parent = process.parent()
            if parent is not None and "backup" in parent.cmdline():
                return ""
            return next(w.partition("=")[2].partition("=")[2] for w in words if "--disk=" in w)
        except (psutil.Error, StopIteration):
            return ""


@contextmanager
def observed(site: FleetSite) -> Iterator[None]:
    stop = threading.Event()
    observer = threading.Thread(target=site.observe, args=(stop,))
    observer.start()
    try:
        yield
    finally:
        site.stop()
        stop.set()
        observer.join()


def until(true: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_and_a_worker_store_what_is_due_and_end_when_they_are_told(
    tmp_path: Path, state: Path
) -> None:
    site = FleetSite(tmp_path, state, hosts=1, machines=2)
    site.start("serve")
    site.start("pve0")
    with observed(site):
        until(lambda: set(site.stored) == set(site.machines))
    assert site.trouble == []
    assert "Traceback" not in (tmp_path / "pve0.log").read_text()


@pytest.mark.slow
def test_all_machines_are_stored_though_the_server_is_killed_and_the_database_with_it(
    tmp_path: Path, state: Path
) -> None:
    site = FleetSite(tmp_path, state, hosts=1, machines=3)
    site.start("serve")
    for host in site.hosts:
        site.start(host)
    with observed(site):
        until(lambda: sum(site.stored.values()) > 0)
        site.kill("serve")  # its PostgreSQL ends with it
        site.start("serve")
        until(lambda: set(site.stored) == set(site.machines))
    assert site.trouble == []
    log = "".join((tmp_path / f"{name}.log").read_text() for name in ("serve", *site.hosts))
    assert "Traceback" not in log
    # What was lost in between may have been stored a second time, under a name of its own.
    assert max(site.stored.values()) <= 3
    assert not list((tmp_path / "b").glob(".*"))


def test_the_catalogue_and_the_queue_of_a_private_postgres(state: Path) -> None:
    # What an initdb has left that was killed.
    state.mkdir(mode=0o700)
    (state / "data.new").mkdir()
    (state / "data.new" / "PG_VERSION").write_text("15\n")
    with PrivatePostgres(str(state)) as own:
        assert not (state / "data.new").exists()
        assert oct(state.stat().st_mode)[-3:] == "700"
        catalogue = open_database(own.dsn)
        with (
            contextlib.closing(Cancel()) as cancel,
            pytest.raises(DatabaseLost, match="no queue yet"),
        ):
            run_worker(own.dsn, "pve1", 1, lambda job, stop: None, cancel, print)
        queue = JobQueue(own.dsn, catalogue)
        try:
            _the_database_does_what_the_file_does(catalogue)
            _a_queue_has_each_run_once_and_a_second_server_is_refused(own, catalogue, queue)
            _a_second_worker_of_a_host_waits_for_the_end_of_the_first(own)
            _a_worker_that_has_lost_its_lock_with_its_connection_ends_its_work(own, catalogue)
            _what_a_killed_worker_had_is_lost_when_it_is_silent_and_done_by_another_one(
                own, catalogue, queue
            )
        finally:
            queue.close()
            catalogue.close()
        own.stop()
        with pytest.raises(DatabaseLost, match="the fleet's database"):
            open_database(own.dsn)
    (state / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(Failure, match=r"its data is of PostgreSQL 9, and here is .* apt install"):
        PrivatePostgres(str(state))


def test_a_folder_that_is_not_a_whole_cluster_is_told_and_left_as_it_is(state: Path) -> None:
    (state / "data").mkdir(parents=True)
    (state / "data" / "mine").write_text("x")
    with pytest.raises(Failure, match="is not a whole PostgreSQL"):
        PrivatePostgres(str(state)).start()
    assert (state / "data" / "mine").read_text() == "x"


def _the_database_does_what_the_file_does(catalogue: DatabaseCatalogue) -> None:
    run = new_run(FleetTask("we'b\0%s", "backup", "b", "pve1"), "", 5.0)
    catalogue.put(run, ArchiveRecord("web", "b", "a.vma", size_bytes=1 << 60))
    assert catalogue.select(RunRecord, run=run.run)[0].machine == "we'b\\x00%s"
    assert catalogue.select(ArchiveRecord, "-stored_s", 1)[0].size_bytes == 1 << 60
    assert abs(catalogue.now_s() - time.time()) < 60
    with pytest.MonkeyPatch.context() as patch:
        # Somebody sets this host's clock.
        patch.setattr(time, "time", lambda: 5.0)
        assert catalogue.now_s() > 1e9
    with pytest.raises(Failure, match="cannot be understood") as told:
        open_database("host=x password=a hunter2")
    assert "hunter" not in str(told.value)
    with pytest.raises(DatabaseLost, match="resolve host '…@b1'"), _failing():
        # As of postgresql://vmapipe:hunt@er2@b1/fleet.
        raise psycopg.OperationalError("failed to resolve host 'er2@b1': not known")
    catalogue.remove(RunRecord)


def _a_queue_has_each_run_once_and_a_second_server_is_refused(
    own: PrivatePostgres, catalogue: DatabaseCatalogue, queue: JobQueue
) -> None:
    queue.start("r1", "pve1", {"verb": "verify"})
    queue.start("r1", "pve1", {"verb": "verify"})
    assert queue.live() == {"r1"}
    queue.cancel("r1")
    assert queue.live() == set()
    other = open_database(own.dsn)
    try:
        with pytest.raises(Failure, match="another `vmapipe fleet serve`"):
            JobQueue(own.dsn, other)
    finally:
        other.close()


def _a_worker_that_has_lost_its_lock_with_its_connection_ends_its_work(
    own: PrivatePostgres, catalogue: DatabaseCatalogue
) -> None:
    """A pool would connect anew, and go on without the lock."""
    lost = list[str]()

    def work() -> None:
        with contextlib.closing(Cancel()) as cancel:
            try:
                run_worker(own.dsn, "pve2", 1, lambda job, stop: None, cancel, begun.set)
            except DatabaseLost as failure:
                lost.append(str(failure))

    begun = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(LIMIT_S)
    held = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2"
    until(lambda: len(catalogue.postgres.execute(held).fetchall()) == 1)
    thread.join(LIMIT_S)
    assert ["terminat" in text for text in lost] == [True]


def _what_a_killed_worker_had_is_lost_when_it_is_silent_and_done_by_another_one(
    own: PrivatePostgres, catalogue: DatabaseCatalogue, queue: JobQueue
) -> None:
    execute = catalogue.postgres.execute
    for run, silent_s in (("killed", STALLED_S + 1), ("lives", STALLED_S / 2)):
        queue.start(run, "pve3", {"verb": "verify"})
        (worker,) = execute(
            "INSERT INTO procrastinate_workers (last_heartbeat) "
            "VALUES (now() - ? * interval '1 second') RETURNING id",
            [silent_s],
        ).fetchall()[0]
        execute(
            "UPDATE procrastinate_jobs SET status = 'doing', worker_id = ? WHERE args->>'run' = ?",
            [worker, run],
        )
    assert queue.live() == {"lives"}
    queue.start("again", "pve3", {"verb": "verify"})
    done = list[object]()

    def do(job: Mapping[str, object], stop: threading.Event) -> None:
        done.append(job["run"])
        cancel.ask("enough")

    with contextlib.closing(Cancel()) as cancel:
        run_worker(own.dsn, "pve3", 1, do, cancel, lambda: None)
    assert done == ["again"]


def _a_second_worker_of_a_host_waits_for_the_end_of_the_first(own: PrivatePostgres) -> None:
    def worker(host: str, cancel: Cancel, begun: Callable[[], None]) -> None:
        run_worker(own.dsn, host, 1, lambda job, stop: None, cancel, begun)

    first, begun = Cancel(), threading.Event()
    thread = threading.Thread(target=worker, args=("pve1", first, begun.set))
    thread.start()
    try:
        assert begun.wait(LIMIT_S)
        with (
            contextlib.closing(Cancel()) as second,
            pytest.raises(DatabaseLost, match="takes over when that ends"),
        ):
            worker("pve1", second, begun.clear)
        assert begun.is_set()
    finally:
        first.ask("enough")
        thread.join(LIMIT_S)
        first.close()
