# SPDX-License-Identifier: Apache-2.0
"""A paused machine with disks of each kind that QEMU tracks changes of, and a model of what they hold."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.paused_machine import PausedMachine, paused_machine
from tests.machine import Need, good

SIZE = 64 * CLUSTER + 512
#: In the archive, by the device's id.
RAW, THIN, SLOWED = "drive-virtio0", "drive-virtio1", "drive-virtio2"
NAMES = (RAW, THIN, SLOWED)


def make_images(folder: Path) -> dict[str, bytearray]:
    """Make them; return what they hold. All of the thin disk is zero but its first clusters."""
    contents = {}
    for number, name in enumerate(NAMES):
        data = bytearray(bytes([number + 1]) * SIZE)
        if name == THIN:
            data[8 * CLUSTER :] = bytes(SIZE - 8 * CLUSTER)
        (folder / f"{name}.raw").write_bytes(data)
        contents[name] = data
    for name in (THIN, SLOWED):
        words = ["qemu-img", "convert", "-O", "qcow2", "-f", "raw"]
        subprocess.run([*words, folder / f"{name}.raw", folder / f"{name}.qcow2"], check=True)
    return contents


def tracked_options(folder: Path) -> list[str]:
    """QEMU's options for these disks: raw, qcow2, and qcow2 in a thread, below a limit of the guest's."""
    files = [folder / f"{RAW}.raw", folder / f"{THIN}.qcow2", folder / f"{SLOWED}.qcow2"]
    words = ["-object", "throttle-group,id=limit,x-iops-total=100000", "-object", "iothread,id=io"]
    for number, file in enumerate(files):
        kind = file.suffix.removeprefix(".")
        words += ["-blockdev", f"driver=file,filename={file},node-name=file{number}"]
        words += ["-blockdev", f"driver={kind},node-name=disk{number},file=file{number}"]
    words += ["-blockdev", "driver=throttle,node-name=limit2,throttle-group=limit,file=disk2"]
    for number, drive in enumerate(("disk0", "disk1", "limit2,iothread=io")):
        words += ["-device", f"virtio-blk-pci,id=virtio{number},drive={drive}"]
    return words


class TrackedMachine:
    """`contents` is what each disk holds, by its name in the archive."""

    def __init__(self, machine: PausedMachine, contents: Mapping[str, bytearray]) -> None:
        self.machine = machine
        self.contents = contents

    def write(self, name: str, cluster: int, pattern: int, clusters: int = 1) -> None:
        """As the guest: whole clusters; the pattern 0 as a request for zeroes."""
        number = NAMES.index(name)
        at, length = cluster * CLUSTER, clusters * CLUSTER
        words = f"write -P {pattern} {at} {length}" if pattern else f"write -z {at} {length}"
        self.machine.write(f"/machine/peripheral/virtio{number}/virtio-backend", words)
        self.contents[name][at : at + length] = bytes([pattern]) * length

    def records(self) -> dict[str, list[str]]:
        """The names of the dirty bitmaps on each node."""
        nodes = self.machine.ask("query-named-block-nodes", flat=True)
        return {
            node["node-name"]: [bitmap["name"] for bitmap in node["dirty-bitmaps"]]
            for node in nodes
            if node.get("dirty-bitmaps")
        }

    def command(self, archive: Path, *options: str) -> tuple[str, ...]:
        more = ("--json", "--qmp", str(self.machine.qmp), "--base", "auto", *options)
        return ("backup", *more, str(archive))


@contextlib.contextmanager
def tracked_machine(
    need: Need, folder: Path, contents: Mapping[str, bytearray]
) -> Iterator[TrackedMachine]:
    with paused_machine(need, folder, *tracked_options(folder)) as machine:
        yield TrackedMachine(machine, contents)


class Report:
    """What a backup has told with --json."""

    def __init__(self, said: bytes) -> None:
        self.events: list[dict[str, Any]] = [json.loads(line) for line in said.splitlines()]

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The last event of this name."""
        return [event for event in self.events if event["event"] == name][-1]

    @property
    def reasons(self) -> dict[str, str]:
        """Why a disk was backed up in full; empty: it was not."""
        for device in self["base"]["devices"]:
            assert device["incremental"] == (not device["reason"])
        return {device["name"]: device["reason"] for device in self["base"]["devices"]}

    @property
    def notices(self) -> str:
        return "\n".join(e["text"] for e in self.events if e["event"] == "notice")


def check_archive(archive: Path, contents: Mapping[str, bytes | bytearray], folder: Path) -> None:
    """What it holds is `contents`, by every byte."""
    good("restore", "--no-configs", archive, folder)
    for name, content in contents.items():
        copy = folder / f"disk-{name}.raw"
        assert copy.read_bytes() == content, name
        copy.unlink()
    folder.rmdir()
