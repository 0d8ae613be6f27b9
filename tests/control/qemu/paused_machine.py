# SPDX-License-Identifier: Apache-2.0
"""A QEMU whose guest has not begun, with all of a machine's devices: the test writes in its place.

So the order of writes and of a disk's faults is known. A disk can fail as blkdebug lets it.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.control.qemu.storage_daemon import wait_for_socket
from tests.machine import LIMIT_S, Need
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


class PausedMachine:
    """`qmp` is for the backup, `ask` uses another monitor. `{d}` in `words` is the folder."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.qmp = folder / "qmp.sock"
        self._said = folder / "said"
        monitors = [
            word
            for name in ("qmp", "tests")
            for word in ("-qmp", f"unix:{folder}/{name}.sock,server=on,wait=off")
        ]
        argv = [word.replace("{d}", str(folder)) for word in words]
        # QEMU's own words go elsewhere: its standard output is qemu-io's.
        with self._said.open("wb") as said, (folder / "complaints").open("wb") as complaints:
            self.process = subprocess.Popen(
                [*argv, *monitors], stdin=subprocess.DEVNULL, stdout=said, stderr=complaints
            )
        try:
            wait_for_socket(folder / "tests.sock", self.process)
            self._monitor = QmpClient(str(folder / "tests.sock"))
        except BaseException:
            self._end()
            raise
        self._nodes = self._graph()

    def ask(self, name: str, /, **arguments: Any) -> Any:
        return self._monitor.execute(Command(name, arguments))

    def write(self, device: str, words: str) -> None:
        """As the guest's: `write -P 1 0 64k` through this device's own connection to its disk."""
        assert self.can_write(device, words)

    def can_write(self, device: str, words: str) -> bool:
        """The same; whether it succeeds."""
        before = self._said.stat().st_size
        line = f'qemu-io -d {device} "{words}"'
        self.ask("human-monitor-command", **{"command-line": line})
        with self._said.open("rb") as said:
            said.seek(before)
            return said.read(_TOLD).startswith(b"wrote ")

    def quit(self) -> None:
        """End QEMU as a user does: it closes its images."""
        self.ask("quit")
        self.process.wait(LIMIT_S)

    def commit(self, overlay: str, base: str) -> None:
        """Commit an overlay that is in use into the image below it, which takes its place."""
        self.ask("block-commit", **{"job-id": "commit", "device": overlay, "base-node": base})
        self.complete("commit")

    def complete(self, name: str) -> None:
        """Let a job of this name do its last step as soon as it can, and wait for its end."""
        while True:
            jobs = {job["id"]: job["status"] for job in self.ask("query-jobs")}
            if name not in jobs:
                return
            if jobs[name] == "ready":
                self.ask("job-complete", id=name)
            time.sleep(0.01)

    def ours(self) -> list[str]:
        """What a backup has in it: jobs, nodes, objects."""
        answers = [
            self.ask("query-jobs"),
            self.ask("query-named-block-nodes", flat=True),
            self.ask("qom-list", path="/objects"),
        ]
        return [word for word in str(answers).split("'") if word.startswith("vmapipe-")]

    def is_untouched(self) -> bool:
        """It has the nodes that it began with, each disk has its own, and there is no job."""
        return self._graph() == self._nodes and not self.ask("query-jobs")

    def _graph(self) -> tuple[list[str], list[str]]:
        nodes = self.ask("query-named-block-nodes", flat=True)
        blocks = [block for block in self.ask("query-block") if "inserted" in block]
        disks = [str(block["inserted"].get("node-name")) for block in blocks]
        return sorted(str(node["node-name"]) for node in nodes), disks

    def close(self) -> None:
        self._monitor.close()
        self._end()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class FaultyMachine(PausedMachine):
    """Its disks are `virtio0`, `virtio1` …, raw, and can be written to at any place."""

    def write_at(self, disk: int, offset: int, length: int, pattern: int) -> bool:
        """As the guest would; whether it succeeds."""
        device = f"/machine/peripheral/virtio{disk}/virtio-backend"
        return self.can_write(device, f"write -P {pattern} {offset} {length}")


def _argv(qemu: str, machine: str, memory: str) -> list[str]:
    return [
        *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-S"),
        *("-machine", machine, "-accel", "tcg", "-m", memory),
    ]


@contextlib.contextmanager
def paused_machine(
    need: Need, folder: Path, *options: str, memory: str = "64"
) -> Iterator[PausedMachine]:
    """It ends with the block, if it has not by itself."""
    (qemu,) = need("qemu-system-x86_64")
    argv = [*_argv(qemu, "q35,nvdimm=on", memory), *options]
    with contextlib.closing(PausedMachine(folder, argv)) as machine:
        yield machine


@contextlib.contextmanager
def faulty_machine(
    folder: Path,
    qemu: str,
    images: Sequence[Path],
    faults: Mapping[int, Sequence[Fault]],
    *options: str,
) -> Iterator[FaultyMachine]:
    """With a disk for each of `images`, in their order."""
    words = _argv(qemu, "q35", "64")
    for number, image in enumerate(images):
        below = f"driver=file,node-name=file{number},filename={image}"
        debug = f"driver=blkdebug,node-name=debug{number},image=file{number}"
        words += ["-blockdev", below, "-blockdev", debug + blkdebug(faults.get(number, ()))]
        words += ["-blockdev", f"driver=raw,node-name=disk{number},file=debug{number}"]
        words += ["-device", f"virtio-blk-pci,drive=disk{number},id=virtio{number}"]
    with contextlib.closing(FaultyMachine(folder, [*words, *options])) as machine:
        yield machine
