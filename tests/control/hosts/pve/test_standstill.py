# SPDX-License-Identifier: Apache-2.0
"""Machines that are paused, or shut down and started anew, for the instant of their backup."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.control.hosts.pve.simulated import (
    SimulatedNode,
    archive_of,
    conf,
    content,
    restored,
    running,
)
from tests.control.qemu.paused_machine import PausedMachine
from tests.machine import Need, bad, end_of, eventually, good, next_event, started, without_limit
from vmapipe.control.hosts.pve import standstill
from vmapipe.control.hosts.pve.standstill import Stand, standing_still
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import ignore

# As Proxmox VE's, but that its guest shuts down at once, or when the file `hold` is gone.
# One command after the other has a machine.
QM = f"""#!{sys.executable}
import fcntl, json, os, pathlib, socket, subprocess, sys, time
folder = pathlib.Path(__file__).parent
with (folder / "asked").open("a") as asked:
    asked.write(" ".join(sys.argv[1:]) + "\\n")
if (folder / ("no-" + sys.argv[1])).exists():
    sys.exit("VM 100: " + (folder / ("no-" + sys.argv[1])).read_text())
argv = json.loads((folder / "argv").read_text())
lock = (folder / "lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
monitor = next(word for word in argv if word.startswith("socket,id=qmp,path=")).split("path=")[1].split(",")[0]
pid_file = pathlib.Path(argv[argv.index("-pidfile") + 1])
if sys.argv[1] == "shutdown":
    while (folder / "hold").exists():
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.connect(monitor)
        qmp.recv(4096)
        qmp.sendall(b'{{"execute": "qmp_capabilities"}} {{"execute": "quit"}}')
        while pid_file.exists():
            time.sleep(0.01)
else:
    if pid_file.exists():
        sys.exit("VM 100 already running")
    words = [word for word in argv if word != "-S"]
    null = subprocess.DEVNULL
    subprocess.Popen(words, stdin=null, stdout=null, stderr=null, start_new_session=True)
    while not pid_file.exists():
        time.sleep(0.01)
"""


STANDSTILL = "vmapipe.control.hosts.pve.standstill"


class Host:
    """A node with one machine, 100, that runs; and its `qm`."""

    def __init__(self, node: SimulatedNode, machine: PausedMachine, folder: Path) -> None:
        self.node = node
        self.machine = machine
        self._tests = folder / "m100/tests.sock"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "qm").write_text(QM)
        (self.bin / "qm").chmod(0o755)
        (self.bin / "argv").write_text(json.dumps(machine.process.args))
        self.env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        self.note = node.root / "var/lib/vmapipe/pve/100.standstill"

    def asked(self) -> list[str]:
        """The words of each call of `qm`."""
        path = self.bin / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def status(self) -> str:
        """The machine's run state; empty: it is off."""
        try:
            with closing(QmpClient(str(self._tests))) as client:
                return str(client.execute(Command("query-status", {}))["status"])
        except Exception:  # noqa: BLE001  whatever is wrong with it
            return ""

    def ours(self) -> list[str]:
        """What a backup has in the machine's QEMU: jobs, nodes, objects."""
        with closing(QmpClient(str(self._tests))) as client:
            answers = [
                client.execute(Command("query-jobs", {})),
                client.execute(Command("query-named-block-nodes", {"flat": True})),
                client.execute(Command("qom-list", {"path": "/objects"})),
            ]
        return [word for word in str(answers).split("'") if word.startswith("vmapipe-")]

    def words(self, mode: str, *more: str) -> list[str | Path]:
        return self.node.words("--pve", "100", "--json", "--mode", mode, *more)

    def end(self) -> None:
        """The machine that `qm` has started is nobody's child."""
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            pid = (self.node.root / "var/run/qemu-server/100.pid").read_text()
            psutil.Process(int(pid)).kill()


@contextmanager
def hosted(node: SimulatedNode, need: Need, folder: Path) -> Iterator[Host]:
    with running(node, need, folder, 100, "agent: 1") as machine:
        machine.ask("cont")
        host = Host(node, machine, folder)
        # It has one client, and that is not the test then.
        machine._monitor.close()
        try:
            yield host
        finally:
            host.end()


def is_as_before(host: Host) -> bool:
    return host.node.config(100) == conf(100, "agent: 1") and not host.note.exists()


@pytest.mark.parametrize("mode", ["suspend", "stop"])
def test_the_machine_stands_still_until_the_instant_and_runs_while_it_is_read(
    node: SimulatedNode, need: Need, tmp_path: Path, mode: str
) -> None:
    hook, log = tmp_path / "hook", tmp_path / "phases"
    hook.write_text(f'#!/bin/sh\necho "$1 $2" >>{log}\n')
    hook.chmod(0o755)
    with hosted(node, need, tmp_path) as host:
        words = host.words(mode, "--speed", "1M", "--hook", str(hook))
        with started(*words, node.dump, env=host.env) as process:
            assert next_event(process, "machine")["mode"] == mode
            next_event(process, "instant")
            assert eventually(lambda: host.status() == "running")
            without_limit(process)
            assert next_event(process, "notice")["text"].startswith("VM 100: went on after ")
            code, said = end_of(process)
        assert code == 0, said
        assert is_as_before(host)
        assert host.status() == "running"
        wanted = [
            "shutdown 100 --skiplock 1 --keepActive 1 --timeout 600",
            "start 100 --skiplock 1",
        ]
        assert host.asked() == (wanted if mode == "stop" else [])
    assert restored(archive_of(node, 100), tmp_path / "out")["disk-drive-scsi0.raw"] == content()
    phases = ["backup-start", "pre-stop", "snapshot-taken", "pre-restart", "post-restart"]
    found = [line.split()[0] for line in log.read_text().splitlines()]
    assert [phase for phase in found if phase in phases] == phases
    assert f"pre-stop {mode}" in log.read_text()


def test_a_guest_that_does_not_shut_down_runs_on_and_one_that_does_not_start_is_said_loudly(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    with hosted(node, need, tmp_path) as host:
        (host.bin / "no-shutdown").write_text("powerdown failed - got timeout")
        text = bad(*host.words("stop", "--stopwait", "1"), node.dump, env=host.env)
        assert (
            "VM 100 does not shut down within 60 s (`qm shutdown` says: VM 100: powerdown" in text
        )
        assert host.status() == "running"
        assert is_as_before(host)
        (host.bin / "no-shutdown").unlink()
        # The next one may begin in the same second, and its log has the same name.
        for log in node.dump.glob("*.log"):
            log.unlink()
        (host.bin / "no-start").write_text("start failed: no memory")
        text = bad(*host.words("stop"), node.dump, env=host.env)
        assert "VM 100 WAS SHUT DOWN FOR ITS BACKUP AND CANNOT BE STARTED AGAIN" in text
        assert "no memory" in text
        assert host.status() == ""
        (host.bin / "no-start").unlink()
        said = good("cleanup", "--pve", "100", "--pve-root", node.root, env=host.env)
        assert b"VM 100 was started: a backup that was killed had shut it down" in said
        assert eventually(lambda: host.status() == "running")
        assert is_as_before(host)
    assert list(node.dump.glob("*.vma*")) == []


@pytest.mark.parametrize("who", ["the backup", "what outlives it", "all at once"])
def test_a_machine_is_started_again_whoever_is_killed_while_it_shuts_down(
    node: SimulatedNode, need: Need, tmp_path: Path, who: str
) -> None:
    """Its guest has been told, and goes on with that whatever becomes of `qm`."""
    with hosted(node, need, tmp_path) as host:
        (host.bin / "hold").touch()
        cleanup = ("cleanup", "--pve", "100", "--pve-root", node.root)
        with started(*host.words("stop"), node.dump, env=host.env) as process:
            assert eventually(lambda: len(host.asked()) == 1)
            if who != "the backup":
                children = psutil.Process(process.pid).children()
                (keeper,) = [each for each in children if STANDSTILL in each.cmdline()]
                keeper.kill()
                assert eventually(lambda: not keeper.is_running() or keeper.status() == "zombie")
            if who != "what outlives it":
                process.send_signal(signal.SIGKILL)
                process.wait()
            if who == "all at once":
                text = bad(*cleanup, env=host.env)
                assert "VM 100 runs, but a backup that was killed may have told it to shut" in text
            (host.bin / "hold").unlink()
            if who == "all at once":
                assert eventually(lambda: host.status() == "")
                assert b"VM 100 was started" in good(*cleanup, env=host.env)
            assert eventually(lambda: len(host.asked()) == 2 and host.status() == "running")
            assert eventually(lambda: not host.note.exists())


def test_a_machine_that_does_not_shut_down_although_qm_says_so_fails_the_backup(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    with hosted(node, need, tmp_path) as host:
        (host.bin / "qm").write_text("#!/bin/sh\nexit 0\n")
        text = bad(*host.words("stop"), node.dump, env=host.env)
        assert "VM 100 still runs although `qm shutdown` says that it is off" in text
        assert host.status() == "running"
        assert is_as_before(host)


# Enters the block, says so and stays there.
HOLDER = """
import sys, time
from vmapipe.control.hosts.pve import standstill
from vmapipe.control.hosts.pve.standstill import Stand, standing_still
from vmapipe.runtime.cancel import Cancel
stand = Stand("suspend", 100, sys.argv[1], sys.argv[2], 60)
with standing_still(stand, Cancel(), lambda event: None):
    print("stands", flush=True)
    time.sleep(600)
"""


def test_a_machine_goes_on_whoever_is_killed_while_it_stands_still(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    with hosted(node, need, tmp_path) as host:
        for who in ("the backup", "what outlives it", "all at once"):
            words = [sys.executable, "-c", HOLDER, str(node.qmp(100)), str(host.note)]
            with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
                assert holder.stdout is not None
                assert holder.stdout.readline() == b"stands\n"
                assert host.status() == "paused"
                (keeper,) = psutil.Process(holder.pid).children()
                if who != "the backup":
                    keeper.kill()
                holder.send_signal(signal.SIGINT if who == "what outlives it" else signal.SIGKILL)
            if who == "all at once":
                assert host.status() == "paused"
                said = good("cleanup", "--pve", "100", "--pve-root", node.root)
                assert b"VM 100 goes on: a backup that was killed had it stand still" in said
            assert eventually(lambda: host.status() == "running"), who
            assert eventually(lambda: not host.note.exists()), who


def test_a_machine_that_somebody_else_has_paused_stays_so(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    """Its administrator; or it is one of which a note tells that was written before the host was started anew."""
    with hosted(node, need, tmp_path) as host:
        stand = Stand("suspend", 100, str(node.qmp(100)), str(host.note), 60)
        ask(host, "stop")
        with closing(Cancel()) as cancel, standing_still(stand, cancel, ignore) as standing:
            standing.go_on()
        assert host.status() == "paused"
        assert not host.note.exists()
        host.note.write_text(json.dumps({"mode": "suspend", "boot": "another"}))
        good("cleanup", "--pve", "100", "--pve-root", node.root)
        assert host.status() == "paused"
        assert not host.note.exists()


def ask(host: Host, name: str) -> Any:
    with closing(QmpClient(str(host._tests))) as client:
        return client.execute(Command(name, {}))


def test_a_note_that_its_holder_removes_is_not_written_by_who_has_waited_for_it(
    tmp_path: Path,
) -> None:
    """Else nothing would tell of the machine that the second one has stand still."""
    note = tmp_path / "100.standstill"
    program = f"""
import fcntl, os, sys
fd = os.open({str(note)!r}, os.O_RDWR | os.O_CREAT)
fcntl.lockf(fd, fcntl.LOCK_EX)
print("holds", flush=True)
sys.stdin.read()
os.unlink({str(note)!r})
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holds\n"
        waiting = threading.Thread(target=holder.communicate)
        waiting.start()
        stand = Stand("suspend", 100, str(tmp_path / "qmp"), str(note), 60)
        with standstill.noted(stand):
            assert json.loads(note.read_text())["mode"] == "suspend"
        waiting.join()
    assert not note.exists()
