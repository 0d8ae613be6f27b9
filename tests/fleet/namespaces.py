# SPDX-License-Identifier: Apache-2.0
"""A fleet in network namespaces: hosts with machines, a PostgreSQL, a service, and an observer of its own.

A host that fails loses its processes and its namespace, so that nobody hears its connections end.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import LIMIT_S, VMAPIPE, Need
from tests.network.keys import make_client, make_server
from vmapipe.fleet.postgres import _programs
from vmapipe.runtime.errors import Failure

STORE = "b1"
_NETWORK = "10.98.0"
_PORT = 5432
# A clock that is wrong by so much, for one process: the kernel has one for all namespaces.
_CLOCK = """\
# SPDX-License-Identifier: Apache-2.0
import os, time
_true, _ahead = time.time, float(os.environ.get("TEST_CLOCK_AHEAD_S", "0"))
time.time = lambda: _true() + _ahead
"""


def need_postgres(need: Need) -> None:
    try:
        _programs()
    except Failure:
        need("postgres")


class Network:
    """A namespace a host, all on one bridge, which has a namespace of its own."""

    def __init__(self, ip: str, mark: str, hosts: list[str]) -> None:
        self._ip, self._mark = ip, mark
        self.addresses = {host: f"{_NETWORK}.{number + 1}" for number, host in enumerate(hosts)}
        self._switch = f"vf{mark}-switch"

    def name(self, host: str) -> str:
        return f"vf{self._mark}-{host}"

    def exec(self, host: str) -> list[str]:
        return [self._ip, "netns", "exec", self.name(host)]

    def make(self) -> None:
        self._do("netns", "add", self._switch)
        self._do("-n", self._switch, "link", "add", "br0", "type", "bridge")
        self._do("-n", self._switch, "link", "set", "br0", "up")
        for host in self.addresses:
            self.add(host)

    def add(self, host: str) -> None:
        name, end = self.name(host), f"to-{host}"
        self._do("netns", "add", name)
        peer = ("type", "veth", "peer", "eth0", "netns", name)
        self._do("-n", self._switch, "link", "add", end, *peer)
        self._do("-n", self._switch, "link", "set", end, "master", "br0", "up")
        self._do("-n", name, "address", "add", f"{self.addresses[host]}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            self._do("-n", name, "link", "set", link, "up")

    def plug(self, host: str, how: str) -> None:
        """`up` or `down`: the switch's end of a host's cable."""
        self._do("-n", self._switch, "link", "set", f"to-{host}", how)

    def pids(self, host: str) -> list[int]:
        done = subprocess.run(
            [self._ip, "netns", "pids", self.name(host)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        return [int(word) for word in done.stdout.split()]

    def fail(self, host: str) -> None:
        """End all that runs on a host, and its connections without a word to the other side."""
        # Both ends of its cable. What its connections would still say keeps the namespace for minutes.
        self._do("-n", self._switch, "link", "del", f"to-{host}")
        while pids := self.pids(host):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)  # until the kernel has done it
        self._do("netns", "del", self.name(host))

    def remove(self) -> None:
        for host in self.addresses:
            with contextlib.suppress(AssertionError):
                self.fail(host)
        with contextlib.suppress(AssertionError):
            self._do("netns", "del", self._switch)

    def _do(self, *words: str) -> None:
        done = subprocess.run([self._ip, *words], capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise AssertionError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class NamespaceFleet:
    """Hosts with a qemu-storage-daemon a machine; on `b1` PostgreSQL, the server, and a service with the archives."""

    def __init__(
        self, folder: Path, network: Network, machines: int, limits: dict[str, int], defaults: str
    ) -> None:
        self.folder, self.network, self.limits = folder, network, limits
        self.hosts = [host for host in network.addresses if host != STORE]
        self.where = {f"vm{n}": self.hosts[n % len(self.hosts)] for n in range(machines)}
        #: Seconds that a host's clock is ahead.
        self.clocks = dict[str, float]()
        self._running = dict[str, dict[str, subprocess.Popen[bytes]]]()
        self._bin = _programs()
        self.store = folder / "store"
        self._user = pwd.getpwnam("postgres")
        address = network.addresses[STORE]
        self.dsn = f"postgresql://vmapipe@{address}:{_PORT}/postgres?connect_timeout=5"
        for place in ("store", "disks", "log", "clock", *network.addresses):
            (folder / place).mkdir()
        (folder / "clock" / "sitecustomize.py").write_text(_CLOCK)
        for name in self.where:
            (folder / "disks" / f"{name}.raw").write_bytes(os.urandom(1 << 20))
        server = make_server(folder / "server")
        make_client(folder / "client", server, "pve")
        tables = "".join(
            f'[host.{h}]\njobs = {limits["host"]}\nguests = ["qmp:{folder}/{h}/*.qmp"]\n'
            for h in self.hosts
        )
        (folder / "fleet.toml").write_text(
            f'[defaults]\ntarget = "b1"\ndisks = ["disk0"]\n{defaults}\n'
            f"[limits]\ntotal = {limits['total']}\n{tables}[host.{STORE}]\n"
            f'[target.b1]\narchiver = "tcp://{address}:7777"\nkeys = "{folder}/client"\n'
            f'host = "{STORE}"\ndirectory = "{self.store}"\njobs = {limits["target"]}\n'
        )

    # --- Processes ---

    def start(self, host: str, what: str) -> None:
        """Start `postgres`, `archiver`, `serve`, `worker` or a machine on a host."""
        words = [*VMAPIPE, "fleet", what, "--file", str(self.folder / "fleet.toml")]
        words += ["--database", self.dsn]
        environment = dict(os.environ)
        if host in self.clocks:
            environment["PYTHONPATH"] = str(self.folder / "clock")
            environment["TEST_CLOCK_AHEAD_S"] = str(self.clocks[host])
        match what:
            case "worker":
                words += ["--host", host]
            case "archiver":
                address = self.network.addresses[host]
                words = [*VMAPIPE, "archiver", "--listen", f"tcp://{address}:7777", "--keys"]
                words += [str(self.folder / "server"), "--directory", str(self.store)]
                words += ["--client-timeout", "20"]
            case "postgres":
                words = self._postgres()
            case name if name in self.where:
                words = self._machine(host, name)
        with (self.folder / "log" / f"{host}-{what}").open("ab") as log:
            self._running.setdefault(host, {})[what] = subprocess.Popen(
                [*self.network.exec(host), *words], stdout=log, stderr=log, env=environment
            )

    def _machine(self, host: str, name: str) -> list[str]:
        path = self.folder / host / f"{name}.qmp"
        path.unlink(missing_ok=True)
        disk = self.folder / "disks" / f"{name}.raw"
        return [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=file0,filename={disk}"),
            *("--blockdev", "driver=raw,node-name=disk0,file=file0"),
            *("--chardev", f"socket,id=m,path={path},server=on,wait=off"),
            *("--monitor", "chardev=m"),
        ]

    def _postgres(self) -> list[str]:
        data, user = self.folder / "data", self._user
        who = [
            "setpriv",
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
        ]
        if not data.exists():
            data.mkdir(0o700)
            os.chown(data, user.pw_uid, user.pw_gid)
            init = [*who, f"{self._bin}/initdb", "-D", str(data), "-U", "vmapipe", "-E", "UTF8"]
            subprocess.run(
                [*init, "--locale=C.UTF-8", "-A", "trust"],
                check=True,
                cwd="/",
                stdout=subprocess.DEVNULL,
            )
            with (data / "pg_hba.conf").open("a") as file:
                file.write(f"host all all {_NETWORK}.0/24 trust\n")
        address = self.network.addresses[STORE]
        options = ["-c", f"listen_addresses={address}", "-c", "unix_socket_directories="]
        options += ["-c", "shared_buffers=16MB", "-c", "max_connections=200", "-c", "fsync=off"]
        # One that was killed leaves others of its for a moment, and its lock.
        again = f'while true; do {self._bin}/postgres "$@"; sleep 1; done'
        return [*who, "sh", "-c", again, "sh", "-D", str(data), "-p", str(_PORT), *options]

    def start_host(self, host: str) -> None:
        whats = ["worker", *(name for name, place in self.where.items() if place == host)]
        if host == STORE:
            whats = ["postgres", "archiver", "serve", "worker"]
        for what in whats:
            self.start(host, what)

    def kill(self, host: str, what: str) -> None:
        """As by SIGKILL."""
        process = self._running[host].pop(what)
        process.kill()
        process.wait()

    def kill_postgres(self) -> None:
        """Kill a process of PostgreSQL's own: it is started again."""
        shell = psutil.Process(self._running[STORE]["postgres"].pid)
        for process in shell.children():
            if process.name() == "postgres":
                process.kill()

    def fail_host(self, host: str) -> None:
        self.network.fail(host)
        for process in self._running.pop(host, {}).values():
            process.wait()

    def lose_database(self) -> None:
        """Lose all that PostgreSQL has; what is stored is looked at anew."""
        shell = self._running[STORE].pop("postgres")
        family = [psutil.Process(shell.pid), *psutil.Process(shell.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=LIMIT_S)
        shell.wait()
        shutil.rmtree(self.folder / "data")
        self.start(STORE, "postgres")

    def move(self, name: str, to: str) -> None:
        """A machine goes to another host, as after a failure of the first one, also in the middle of its backup."""
        self.kill(self.where[name], name)
        (self.folder / self.where[name] / f"{name}.qmp").unlink(missing_ok=True)
        self.where[name] = to
        self.start(to, name)

    def stop(self) -> None:
        """End servers and workers in order, and see what is left on any host but machines."""
        for host, processes in self._running.items():
            for what in [w for w in processes if w in ("serve", "worker")]:
                processes[what].terminate()
                assert processes.pop(what).wait(LIMIT_S) in (0, 130, 143), (host, what)

    def left(self) -> list[str]:
        """Return the processes of all hosts that nobody has started by his own will."""
        wanted = {p.pid for one in self._running.values() for p in one.values()}
        found = []
        for host in self.network.addresses:
            for pid in set(self.network.pids(host)) - wanted:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if not {parent.pid for parent in process.parents()} & wanted:
                        found.append(f"{host}: {process.cmdline()}")
        return found

    # --- What there is ---

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `vmapipe fleet` on the host of the archives."""
        return subprocess.run(
            [
                *(*self.network.exec(STORE), *VMAPIPE, "fleet", *words),
                *("--file", str(self.folder / "fleet.toml"), "--database", self.dsn),
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )

    def ask(self, sql: str) -> list[list[str]]:
        """What the database says, by its own program; an empty list where it does not answer."""
        done = subprocess.run(
            [*self.network.exec(STORE), f"{self._bin}/psql", "-XAtc", sql, self.dsn],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return [line.split("|") for line in done.stdout.splitlines()]

    def stored(self, since_s: float = 0) -> Counter[str]:
        """Machines of archives that were stored since then."""
        found = [p for p in self.store.glob("*.vma.zst") if p.stat().st_mtime >= since_s]
        return Counter(p.name.partition("-")[0] for p in found)

    def left_in_machines(self) -> list[str]:
        """Return jobs and nodes that backups have left in machines."""
        found = []
        for name, host in self.where.items():
            said = _told(self.folder / host / f"{name}.qmp")
            found += [f"{name}: {said}"] if '"vmapipe-' in said else []
        return found

    def logs(self) -> str:
        return "".join(path.read_text() for path in (self.folder / "log").iterdir())


def _told(path: Path) -> str:
    """What a machine says of its jobs and nodes, in words without a client of ours."""
    commands = ("qmp_capabilities", "query-jobs", "query-named-block-nodes")
    answers = 0
    text = ""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(LIMIT_S)
        line.connect(str(path))
        with line.makefile("rw") as file:
            file.readline()
            for command in commands:
                file.write(json.dumps({"execute": command}) + "\n")
                file.flush()
                while "return" not in (answer := file.readline()):
                    assert answer
                text += answer
                answers += 1
    return text


class Observer:
    """Counts backups by what the kernel shows, knowing nothing of catalogue or queue; `most` are the highest figures."""

    def __init__(self, site: NamespaceFleet) -> None:
        self._site = site
        self.trouble = list[str]()
        self.most = Counter[str]()
        self.looks = 0
        self._known = dict[int, tuple[int, Path | None]]()
        self._copies = set[int]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        record = {"looks": self.looks, "most": self.most, "trouble": self.trouble}
        (self._site.folder / "log" / "observed.json").write_text(json.dumps(record, indent=1))

    def _watch(self) -> None:
        limits = self._site.limits
        while not self._stop.wait(0.2):
            self.looks += 1
            sockets = self._sockets()
            hosts = Counter(path.parent.name for path in sockets)
            machines = Counter(path.stem for path in sockets)
            seen = {
                "total": len(sockets),
                "target": len(sockets),
                "host": max(hosts.values(), default=0),
                "machine": max(machines.values(), default=0),
            }
            self.most |= Counter(seen)
            if any(count > {**limits, "machine": 1}[kind] for kind, count in seen.items()):
                self.trouble.append(f"{time.time():.1f}: {sorted(map(str, sockets))}")

    def _sockets(self) -> list[Path]:
        """The monitors that backups talk to; copies of a backup by fork have it, or another copy, as their parent."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
        self._known = {pid: one for pid, one in self._known.items() if pid in pids}
        for pid in pids:
            looks, path = self._known.get(pid, (0, None))
            # What a process is it becomes by exec, soon after its begin.
            if looks < 10:
                self._known[pid] = (looks + 1, self._socket_of(pid) or path)
        backups = {pid: path for pid, (_, path) in self._known.items() if path is not None}
        # A copy stays one when its parent has died.
        self._copies = {
            pid
            for pid in self._copies | set(backups)
            if pid in backups and (pid in self._copies or _parent_of(pid) in backups)
        }
        return [
            path for pid, path in backups.items() if pid not in self._copies and _parent_of(pid)
        ]

    def _socket_of(self, pid: int) -> Path | None:
        with contextlib.suppress(OSError, StopIteration):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if "backup" in words:
                socket_ = next(w.removeprefix("--qmp=") for w in words if w.startswith("--qmp="))
                return Path(socket_) if socket_.startswith(str(self._site.folder)) else None
        return None


def _parent_of(pid: int) -> int:
    """0: it has ended."""
    with contextlib.suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if words[0] == "Z" else int(words[1])
    return 0


@contextlib.contextmanager
def namespace_fleet(
    need: Need, folder: Path, hosts: int, machines: int, **more: Any
) -> Iterator[NamespaceFleet]:
    """Skips the test where namespaces cannot be made: without root, or in a container."""
    (ip, *_) = need("ip", "setpriv", "qemu-storage-daemon")
    need_postgres(need)
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    # PostgreSQL runs as another user, who has to get there.
    folder.chmod(0o755)
    names = [STORE, *(f"pve{n}" for n in range(hosts))]
    network = Network(ip, f"{os.getpid() % 100_000}", names)
    site = None
    try:
        try:
            network.make()
        except AssertionError as error:
            pytest.skip(f"no network namespaces here: {error}")
        site = NamespaceFleet(folder, network, machines, **more)
        yield site
    finally:
        for host in names:
            with contextlib.suppress(AssertionError):
                if site is not None:
                    site.fail_host(host)
        network.remove()
