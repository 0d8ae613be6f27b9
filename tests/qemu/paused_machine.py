# SPDX-License-Identifier: Apache-2.0
"""A QEMU that has no guest: paused before its first instruction, it has all of a machine's devices."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.machine import LIMIT_S, Need
from tests.qemu.storage_daemon import wait_for_socket
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command


class PausedMachine:
    """`qmp` is for the backup, `ask` uses another monitor."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.qmp = folder / "qmp.sock"
        self.process = process
        wait_for_socket(folder / "tests.sock", process)
        self._monitor = QmpClient(str(folder / "tests.sock"))

    def ask(self, name: str, **arguments: Any) -> Any:
        return self._monitor.execute(Command(name, arguments))

    def write(self, device: str, words: str) -> None:
        """As the guest's: `write -P 1 0 64k` through this device's own connection to its disk."""
        line = f'qemu-io -d {device} "{words}"'
        said = self.ask("human-monitor-command", **{"command-line": line})
        assert "rror" not in said, said

    def ours(self) -> list[str]:
        """What a backup has in it: jobs, nodes, objects."""
        answers = [
            self.ask("query-jobs"),
            self.ask("query-named-block-nodes", flat=True),
            self.ask("qom-list", path="/objects"),
        ]
        return [word for word in str(answers).split("'") if word.startswith("vmapipe-")]

    def close(self) -> None:
        self._monitor.close()


@contextlib.contextmanager
def paused_machine(
    need: Need, folder: Path, *options: str, memory: str = "64"
) -> Iterator[PausedMachine]:
    """`{d}` in options is the folder. It ends with the block, if it has not by itself."""
    (qemu,) = need("qemu-system-x86_64")
    words = [
        *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-S"),
        *("-machine", "q35,nvdimm=on", "-accel", "tcg", "-m", memory),
        *("-qmp", "unix:{d}/qmp.sock,server=on,wait=off"),
        *("-qmp", "unix:{d}/tests.sock,server=on,wait=off"),
        *options,
    ]
    process = subprocess.Popen([word.replace("{d}", str(folder)) for word in words])
    try:
        machine = PausedMachine(folder, process)
        with contextlib.closing(machine):
            yield machine
    finally:
        process.terminate()
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
