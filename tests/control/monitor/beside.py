# SPDX-License-Identifier: Apache-2.0
"""A monitor beside a QEMU, or a storage daemon in its place."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.machine import LIMIT_S, VMAPIPE, next_event


class Beside:
    """A monitor whose disks are a QEMU's."""

    def __init__(self, folder: Path, qmp: Path, options: Sequence[str] = ()) -> None:
        self.socket = folder / "backup.sock"
        words = ["monitor", "--json", "--listen", str(self.socket), "--qmp", str(qmp), *options]
        self.process = subprocess.Popen(
            [*VMAPIPE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )


@contextlib.contextmanager
def beside(folder: Path, qmp: Path, *options: str) -> Iterator[Beside]:
    monitor = Beside(folder, qmp, options)
    try:
        next_event(monitor.process, "ready")
        yield monitor
        monitor.process.send_signal(signal.SIGTERM)
        _, stderr = monitor.process.communicate(timeout=LIMIT_S)
    finally:
        monitor.process.kill()
        monitor.process.communicate()
    assert (monitor.process.returncode, stderr) == (0, b"")
