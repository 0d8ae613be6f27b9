# SPDX-License-Identifier: Apache-2.0
"""Machines that are restored while they run, and all that a live restore leaves running on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.access.serving import Served
from tests.machine import LIMIT_S, VMAPIPE, eventually, listens
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command


def processes(word: str | Path) -> list[psutil.Process]:
    """Those whose command line has it, but for the tests themselves."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and str(word) in " ".join(process.cmdline()):
                found.append(process)
    return found


def server_below(folder: Path) -> psutil.Process:
    """The archive's server of a live restore into this folder."""
    (server,) = processes(f"--listen {folder}/archive.sock")
    return server


@contextlib.contextmanager
def cleared(folder: Path) -> Iterator[None]:
    """Whatever was started for this folder is ended with the block: it outlives the command."""
    try:
        yield
    finally:
        for process in processes(folder):
            with contextlib.suppress(psutil.Error):
                process.kill()
        assert eventually(lambda: not processes(folder))


class LiveCommand:
    """A running `vmapipe restore --live`; its events as they come."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [*VMAPIPE, "restore", "--live", "--json", *map(str, words)],
            # With a buffer, what hear() has read ahead would be lost to end().
            bufsize=0,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.events: list[dict[str, Any]] = []

    def hear(self, name: str, text: str = "") -> dict[str, Any]:
        """The next event of this name, whose words have `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            self.events.append(event)
            if event["event"] == name and text in str(event.get("text", "")):
                return dict(event)
        _, said = self.process.communicate(timeout=LIMIT_S)
        raise AssertionError(f"no {name} {text!r}: {said.decode()} {self.events}")

    def end(self) -> tuple[int, str]:
        """Its exit code and last words."""
        stdout, stderr = self.process.communicate(timeout=LIMIT_S)
        self.events += [json.loads(line) for line in stdout.splitlines()]
        assert b"Traceback" not in stderr, stderr.decode()
        return self.process.returncode, stderr.decode().strip()

    def succeeds(self) -> None:
        code, said = self.end()
        assert code == 0, said

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def moved(self) -> list[str]:
        return [event["device"] for event in self.events if event["event"] == "moved"]


@contextlib.contextmanager
def live(*words: str | Path) -> Iterator[LiveCommand]:
    command = LiveCommand(*words)
    try:
        yield command
    finally:
        command.kill()


def stop(process: psutil.Process, signum: int = signal.SIGKILL) -> None:
    """And wait for its end, whoever is its parent."""
    process.send_signal(signum)
    assert eventually(lambda: not process.is_running() or process.status() == "zombie")


class Daemon:
    """A qemu-storage-daemon whose export, at `guest`, stands on an overlay above `vmapipe serve`."""

    def __init__(self, folder: Path, served: Served, device: str, reconnect_s: int = 20) -> None:
        self.qmp, self.guest = folder / "qmp.sock", folder / "guest.sock"
        overlay = folder / "user.qcow2"
        uri = f"nbd+unix:///{device}?socket={served.socket}"
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, str(overlay)]
        subprocess.run(words, check=True)
        archive = {
            "driver": "nbd",
            "node-name": "arch",
            "export": device,
            "read-only": True,
            "server": {"type": "unix", "path": str(served.socket)},
            "reconnect-delay": reconnect_s,
        }
        nodes = [
            archive,
            {"driver": "file", "node-name": "file", "filename": str(overlay)},
            {"driver": "qcow2", "node-name": "disk", "file": "file", "backing": "arch"},
        ]
        words = ["qemu-storage-daemon"]
        for node in nodes:
            words += ["--blockdev", json.dumps(node)]
        words += ["--nbd-server", f"addr.type=unix,addr.path={self.guest}"]
        words += ["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]
        words += ["--chardev", f"socket,id=q,path={self.qmp},server=on,wait=off"]
        words += ["--monitor", "chardev=q"]
        self.process = subprocess.Popen(words)
        assert eventually(lambda: listens(self.qmp))

    def ask(self, name: str, **arguments: Any) -> Any:
        client = QmpClient(str(self.qmp))
        try:
            return client.execute(Command(name, arguments))
        finally:
            client.close()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(LIMIT_S)
