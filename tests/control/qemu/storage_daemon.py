# SPDX-License-Identifier: Apache-2.0
"""A qemu-storage-daemon as a machine without a guest: a writable NBD export is the guest's disk."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.machine import LIMIT_S
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpGone


class StorageDaemon:
    """`qmp`, `second`, `pretty` and `tcp` are its monitors; each disk is exported at `path`.

    `pretty` writes an answer on several lines; `tcp` is an address.
    """

    def __init__(self, folder: Path, disks: Mapping[str, Path]) -> None:
        self.qmp = folder / "qmp.sock"
        self.second = folder / "second.sock"
        self.pretty = folder / "pretty.sock"
        self.path = folder / "guest.sock"
        words = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={self.path}"]
        for name, image in disks.items():
            kind = "qcow2" if image.suffix == ".qcow2" else "raw"
            words += ["--blockdev", f"driver=file,node-name=file-{name},filename={image}"]
            words += ["--blockdev", f"driver={kind},node-name={name},file=file-{name}"]
            words += ["--export", f"type=nbd,id=e-{name},node-name={name},name={name},writable=on"]
        for name in ("qmp", "second"):
            path = folder / f"{name}.sock"
            words += ["--chardev", f"socket,id={name},path={path},server=on,wait=off"]
            words += ["--monitor", f"chardev={name}"]
        words += ["--chardev", f"socket,id=pretty,path={self.pretty},server=on,wait=off"]
        words += ["--monitor", "chardev=pretty,pretty=on"]
        words += ["--chardev", "socket,id=tcp,host=127.0.0.1,port=0,server=on,wait=off"]
        words += ["--monitor", "chardev=tcp"]
        self.process = subprocess.Popen(words)
        wait_for_socket(self.qmp, self.process, greets=True)

    def ask(self, name: str, **arguments: Any) -> Any:
        """One command, over a connection of its own."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                qmp = QmpClient(str(self.qmp))
            except QmpGone:
                # Somebody else is connected: one at a time.
                assert time.monotonic() < deadline
                continue
            try:
                return qmp.execute(Command(name, arguments))
            finally:
                qmp.close()

    @property
    def tcp(self) -> str:
        """At a port that was free."""
        (chardev,) = [each for each in self.ask("query-chardev") if each["label"] == "tcp"]
        return str(chardev["filename"].removeprefix("disconnected:"))

    def ours(self) -> list[str]:
        """Jobs and nodes of a backup."""
        text = json.dumps([self.ask("query-jobs"), self.ask("query-named-block-nodes", flat=True)])
        return sorted({word for word in text.split('"') if word.startswith("vmapipe-")})

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait_for_socket(path: Path, process: subprocess.Popen[Any], *, greets: bool = False) -> None:
    """`greets`: a monitor's. QEMU 7.2 crashes now and then when one is left before it has greeted."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            if path.exists():
                probe.settimeout(LIMIT_S)
                probe.connect(str(path))
                if not greets or probe.recv(1):
                    return
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def storage_daemon(folder: Path, **disks: Path) -> Iterator[StorageDaemon]:
    daemon = StorageDaemon(folder, disks)
    try:
        yield daemon
    finally:
        daemon.close()
