# SPDX-License-Identifier: Apache-2.0
"""`vmapipe monitor`, run as a user runs it, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.machine import LIMIT_S, VMAPIPE, next_event


class Served:
    """A monitor and the sockets of its disks."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.monitor = folder / "monitor.sock"

    def socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.socket(name)}"


@contextlib.contextmanager
def serving(folder: Path, *options: str, **disks: Path) -> Iterator[Served]:
    """Serves each disk on a socket of its own in `folder`; fails when the monitor ends badly."""
    words = ["monitor", "--json", "--listen", str(folder / "monitor.sock"), *options]
    for name, path in disks.items():
        words += ["--disk", f"{name}={path}", "--export", f"{name}={folder / name}.sock"]
    process = subprocess.Popen([*VMAPIPE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        next_event(process, "ready")
        yield Served(process, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            _, stderr = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
    assert process.returncode == 0, stderr.decode()
    assert b"Traceback" not in stderr, stderr.decode()
