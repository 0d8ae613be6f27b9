# SPDX-License-Identifier: Apache-2.0
"""A real QEMU whose guest has not begun: the test writes in its place, through its disks' own devices.

So the order of writes and of a disk's faults is known. Each disk can fail as blkdebug lets it.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.machine import LIMIT_S
from tests.qemu.storage_daemon import wait_for_socket
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

SECTOR = 512
_TOLD = 16  # what qemu-io says of a good write begins so: "wrote 65536/65536 bytes"


class Fault(NamedTuple):
    """Reading the sector at `offset` fails; `once`: only the first time."""

    offset: int
    once: bool = False


def blkdebug(faults: Sequence[Fault]) -> str:
    """As options of that driver."""
    return "".join(
        f",inject-error.{n}.event=none,inject-error.{n}.iotype=read,inject-error.{n}.errno=5"
        f",inject-error.{n}.sector={fault.offset // SECTOR}"
        f",inject-error.{n}.once={'on' if fault.once else 'off'}"
        for n, fault in enumerate(faults)
    )


class IdleMachine:
    """Its disks are `virtio0`, `virtio1` …, raw, in the order of `images`. `qmp` is for the backup."""

    def __init__(
        self,
        folder: Path,
        qemu: str,
        images: Sequence[Path],
        faults: Mapping[int, Sequence[Fault]],
        options: Sequence[str],
    ) -> None:
        self.qmp = folder / "qmp.sock"
        self._said = folder / "said"
        words = [
            *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-S"),
            *("-machine", "q35", "-accel", "tcg", "-m", "64"),
            *("-qmp", f"unix:{folder}/qmp.sock,server=on,wait=off"),
            *("-qmp", f"unix:{folder}/tests.sock,server=on,wait=off"),
        ]
        for number, image in enumerate(images):
            below = f"driver=file,node-name=file{number},filename={image}"
            debug = f"driver=blkdebug,node-name=debug{number},image=file{number}"
            words += ["-blockdev", below, "-blockdev", debug + blkdebug(faults.get(number, ()))]
            words += ["-blockdev", f"driver=raw,node-name=disk{number},file=debug{number}"]
            words += ["-device", f"virtio-blk-pci,drive=disk{number},id=virtio{number}"]
        # QEMU's own words go elsewhere: its standard output is qemu-io's.
        with self._said.open("wb") as said, (folder / "complaints").open("wb") as complaints:
            self.process = subprocess.Popen(
                [*words, *options], stdin=subprocess.DEVNULL, stdout=said, stderr=complaints
            )
        wait_for_socket(folder / "tests.sock", self.process)
        self._monitor = QmpClient(str(folder / "tests.sock"))
        self._nodes = self._graph()

    def ask(self, name: str, **arguments: Any) -> Any:
        return self._monitor.execute(Command(name, arguments))

    def write(self, disk: int, offset: int, length: int, pattern: int) -> bool:
        """As the guest would; whether it succeeds."""
        before = self._said.stat().st_size
        device = f"/machine/peripheral/virtio{disk}/virtio-backend"
        line = f'qemu-io -d {device} "write -P {pattern} {offset} {length}"'
        self.ask("human-monitor-command", **{"command-line": line})
        with self._said.open("rb") as said:
            said.seek(before)
            return said.read(_TOLD).startswith(b"wrote ")

    def is_untouched(self) -> bool:
        """It has the nodes that it began with, each disk has its own, and there is no job."""
        return self._graph() == self._nodes and not self.ask("query-jobs")

    def _graph(self) -> tuple[list[str], list[str]]:
        nodes = self.ask("query-named-block-nodes", flat=True)
        disks = [block["inserted"]["node-name"] for block in self.ask("query-block")]
        return sorted(node["node-name"] for node in nodes), disks

    def close(self) -> None:
        self._monitor.close()
        self.process.kill()
        self.process.wait(LIMIT_S)


@contextlib.contextmanager
def idle_machine(
    folder: Path,
    qemu: str,
    images: Sequence[Path],
    faults: Mapping[int, Sequence[Fault]],
    *options: str,
) -> Iterator[IdleMachine]:
    machine = IdleMachine(folder, qemu, images, faults, options)
    try:
        yield machine
    finally:
        machine.close()
