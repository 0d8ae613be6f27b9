# SPDX-License-Identifier: Apache-2.0
"""A node of Proxmox VE 9 as far as a backup sees it: its files below a folder, QEMUs as it starts them.

The command line is that of qemu-server: each disk is a throttle node `drive-scsi0` above raw or qcow2 and
its file, whose node names are hashes; one QMP monitor, which pvestatd asks again and again. Stock QEMUs
do not know `-id`, and their machine types have no `+pve0`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.control.qemu.neighbour import Neighbour, visiting
from tests.control.qemu.paused_machine import PausedMachine
from tests.machine import Need, good
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command, QmpRefused

MIB = 1 << 20


@functools.cache
def content() -> bytes:
    return random.Random(7).randbytes(4 * MIB)


NODE = "one"
STORAGES = """\
dir: local
\tpath /var/lib/vz
\tcontent images,backup,iso

lvmthin: local-lvm
\tthinpool data
\tvgname pve
\tcontent images,rootdir

"""


class SimulatedNode:
    """The files of a node, and of another one in its cluster."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pve = root / "etc/pve"
        self.configs = self.pve / f"nodes/{NODE}/qemu-server"
        for folder in (
            *(self.configs, self.pve / f"nodes/{NODE}/lxc", self.pve / "nodes/two/qemu-server"),
            *(self.pve / "firewall", root / "var/run/qemu-server", root / "var/lib/vz/dump"),
        ):
            folder.mkdir(parents=True)
        (self.pve / "local").symlink_to(f"nodes/{NODE}")
        (self.pve / "qemu-server").symlink_to(f"nodes/{NODE}/qemu-server")
        (self.pve / "storage.cfg").write_text(STORAGES)
        self.dump = root / "var/lib/vz/dump"

    def configure(self, vmid: int, text: str) -> Path:
        path = self.configs / f"{vmid}.conf"
        path.write_text(text)
        return path

    def config(self, vmid: int) -> str:
        return (self.configs / f"{vmid}.conf").read_text()

    def image(self, vmid: int, name: str, content: bytes) -> Path:
        path = self.root / f"var/lib/vz/images/{vmid}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def qmp(self, vmid: int) -> Path:
        return self.root / f"var/run/qemu-server/{vmid}.qmp"

    def archives(self) -> list[Path]:
        return sorted(self.dump.glob("*.vma*[tas]"))

    def words(self, *more: str | Path) -> list[str | Path]:
        return ["backup", "--pve-root", self.root, *more]

    @contextlib.contextmanager
    def running(
        self, need: Need, folder: Path, vmid: int, words: Sequence[str], *, machine: str = "q35"
    ) -> Iterator[PausedMachine]:
        """The machine's QEMU runs, its guest has not begun; `folder` is for the test's own monitor."""
        (qemu,) = need("qemu-system-x86_64")
        run = self.root / "var/run/qemu-server"
        argv = [
            *(qemu, "-name", f"vm{vmid},debug-threads=on", "-no-shutdown"),
            *("-chardev", f"socket,id=qmp,path={run}/{vmid}.qmp,server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control", "-pidfile", f"{run}/{vmid}.pid"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-S"),
            *("-machine", machine, "-accel", "tcg", "-m", "64"),
            *words,
        ]
        with contextlib.closing(PausedMachine(folder, argv)) as started:
            yield started
        (run / f"{vmid}.pid").unlink(missing_ok=True)


def node_name(letter: str, key: str) -> str:
    """A node's name as qemu-server makes it: a letter, and a hash."""
    return letter + hashlib.sha256(key.encode()).hexdigest()[:30]


def blockdev(
    key: str, path: Path, image_format: str = "raw", *, is_read_only: bool = False, size: int = 0
) -> list[str]:
    """The words of one disk, `drive-KEY`, without its device."""
    group = f"throttle-drive-{key}"
    bottom = {"driver": "file", "filename": str(path), "node-name": node_name("e", key)}
    image = {"driver": image_format, "file": bottom, "node-name": node_name("f", key)}
    if size:
        image["size"] = size  # type: ignore[assignment]
    top = {
        "driver": "throttle",
        "file": image,
        "node-name": f"drive-{key}",
        "throttle-group": group,
    }
    for layer in (bottom, image, top):
        layer["read-only"] = is_read_only  # type: ignore[assignment]
    return ["-object", f"throttle-group,id={group}", "-blockdev", json.dumps(top)]


def scsi(
    number: int, path: Path, image_format: str = "raw", *, is_read_only: bool = False
) -> list[str]:
    """A disk with the controller of virtio-scsi-single, as qemu-server has it."""
    key = f"scsi{number}"
    return [
        *blockdev(key, path, image_format, is_read_only=is_read_only),
        *("-device", f"virtio-scsi-pci,id=virtioscsi{number}"),
        "-device",
        f"scsi-hd,bus=virtioscsi{number}.0,channel=0,scsi-id=0,lun={number},drive=drive-{key},"
        f"id={key},device_id=drive-{key}",
    ]


def guest_path(number: int) -> str:
    """The path of a scsi disk in QEMU's tree, for writing as the guest would."""
    return f"scsi{number}"


class Pvestatd(Neighbour):
    """Asks each running machine what pvestatd asks, over its only monitor: connects, asks, leaves."""

    _ASKED = ("query-status", "query-blockstats", "query-balloon", "query-proxmox-support")

    def ask(self, client: QmpClient) -> None:
        for name in self._ASKED:
            with contextlib.suppress(QmpRefused):  # no balloon, not Proxmox's QEMU
                client.execute(Command(name, {}))


def pvestatd(qmp: Path, pause_s: float = 0.2) -> AbstractContextManager[Pvestatd]:
    return visiting(Pvestatd(qmp, pause_s))


def conf(vmid: int, *lines: str) -> str:
    own = [
        f"scsi0: local:{vmid}/vm-{vmid}-disk-0.raw,size=4M",
        "memory: 64",
        f"name: vm{vmid}",
        *lines,
    ]
    return "\n".join(sorted(own)) + "\n"


def stopped(node: SimulatedNode, vmid: int, *lines: str) -> None:
    """A machine with one disk, which does not run."""
    node.configure(vmid, conf(vmid, *lines))
    node.image(vmid, f"vm-{vmid}-disk-0.raw", content())


@contextmanager
def running(
    node: SimulatedNode, need: Need, tmp_path: Path, vmid: int, *lines: str
) -> Iterator[PausedMachine]:
    stopped(node, vmid, *lines)
    folder = tmp_path / f"m{vmid}"
    folder.mkdir()
    path = node.root / f"var/lib/vz/images/{vmid}/vm-{vmid}-disk-0.raw"
    with node.running(need, folder, vmid, scsi(0, path)) as machine:
        yield machine


def archive_of(node: SimulatedNode, vmid: int) -> Path:
    (found,) = [
        p
        for p in node.dump.iterdir()
        if re.fullmatch(rf"vzdump-qemu-{vmid}-.*\.vma(\.zst)?", p.name)
    ]
    return found


def restored(archive: Path, folder: Path) -> dict[str, bytes]:
    good("restore", archive, folder)
    return {path.name: path.read_bytes() for path in folder.glob("disk-*")}
