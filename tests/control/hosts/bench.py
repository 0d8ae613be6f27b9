# SPDX-License-Identifier: Apache-2.0
"""A libvirtd, and archives that a test restores to it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.control.hosts.libvirtd import Libvirtd
from tests.machine import good

UUID = "9c2b2a2e-3c1e-4cf2-9b0a-0fb4ad10a9a3"
MAC = "52:54:00:aa:bb:cc"
WEB = f"""\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>{UUID}</uuid><memory unit='MiB'>256</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <devices><emulator>/host/evil</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='/host/web.qcow2'/><target dev='vda' bus='virtio'/></disk>
    <interface type='bridge'><mac address='{MAC}'/><source bridge='br-host'/>
      <model type='virtio'/></interface>
    <channel type='unix'><source mode='bind' path='/host/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <hostdev mode='subsystem' type='pci'/>
  </devices>
  <qemu:commandline><qemu:arg value='-evil'/></qemu:commandline>
</domain>
"""
# Two devices at one place, which libvirt tells when it is asked.
CONFLICT = WEB.replace(
    "</devices>",
    "".join(
        "<sound model='ich9'><address type='pci' bus='0' slot='0x1b' function='0'/></sound>"
        for _ in range(2)
    )
    + "</devices>",
)

# A disk that cannot have a thread: libvirt tells it when the domain is defined, and not before.
LATE = (
    WEB.replace("<vcpu>", "<iothreads>1</iothreads><vcpu>")
    .replace("type='qcow2'/>", "type='qcow2' iothread='1'/>")
    .replace("dev='vda' bus='virtio'", "dev='sda' bus='sata'")
)


class Bench(NamedTuple):
    """A libvirtd with a pool `p`, and archives to restore."""

    libvirt: Libvirtd
    pool: Path
    folder: Path

    def words(self, archive: Path, *more: str | Path) -> list[str | Path]:
        return ["restore", archive, "--libvirt", "--connect", self.libvirt.uri, *more]

    def archive(self, name: str, config: str, *disks: str, config_name: str = "web.xml") -> Path:
        """An archive of these words of --disk, with a manifest."""
        path = self.folder / name
        (self.folder / config_name).write_text(config)
        words = [word for disk in disks for word in ("--disk", disk)]
        good("backup", *words, "--config", self.folder / config_name, path)
        return path

    def place(self, name: str) -> Path:
        """A folder for disks that libvirt's QEMU can enter."""
        folder = self.libvirt.folder / name
        folder.mkdir()
        self.libvirt.give(folder)
        return folder

    def domains(self) -> set[str]:
        return set(self.libvirt("list", "--all", "--name").split())

    def state(self) -> tuple[set[str], set[str], list[str]]:
        """All that a restore could leave: domains, volumes, journals."""
        volumes = {path.name for path in self.pool.iterdir()}
        journals = self.libvirt.folder / "state" / "vmapipe"
        left = sorted(p.name for p in journals.iterdir()) if journals.exists() else []
        return self.domains(), volumes, left


def content(path: Path, size_bytes: int, image_format: str) -> bytes:
    raw = path.with_suffix(".content")
    words = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(path), str(raw)]
    subprocess.run(words, check=True)
    data = raw.read_bytes()[:size_bytes]
    raw.unlink()
    return data


# --- It comes back ---


# By BIOS: write this sector to the next one of the disk that was booted, then stand still.
BOOT_SECTOR = (
    bytes.fromhex("31c0 8ed8 8ec0 b80103 bb007c b90200 b600 cd13 f4 ebfd").ljust(510, b"\0")
    + b"\x55\xaa"
)


def written(bench: Bench, xml: str, old: str, new: str) -> Path:
    path = bench.folder / "other.xml"
    xml = re.sub(r"<uuid>.*</uuid>|<mac .*/>", "", xml)
    path.write_text(xml.replace(f"<name>{old}<", f"<name>{new}<"))
    return path


def attributes(bench: Bench, name: str, pattern: str) -> list[str]:
    return re.findall(pattern, bench.libvirt("dumpxml", "--inactive", name))
