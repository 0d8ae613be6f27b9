# SPDX-License-Identifier: Apache-2.0
"""Configurations of Proxmox VE and libvirt as QEMU's words: what is mapped, named, and never let in."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.access.machine.configs import (
    DOMAIN,
    LINUX,
    MANY,
    OLD,
    PLAIN_DOMAIN,
    UUID,
    WINDOWS,
    WIRING,
    machine,
)
from tests.machine import LIMIT_S, Need
from vmapipe.access.machine.argv import Forward, Wiring, qemu_words
from vmapipe.access.machine.firmware import find_firmware
from vmapipe.access.machine.process import find_qemu
from vmapipe.access.machine.proxmox import config_without_one
from vmapipe.access.machine.spec import FirmwareSpec, MachineConfigError, MachineSpec, known_type
from vmapipe.runtime.errors import Failure

# By name: a configuration, and the devices of its archive.
CASES: dict[str, tuple[str, list[str]]] = {
    "linux": (LINUX, ["drive-scsi0"]),
    "windows": (WINDOWS, ["drive-sata0", "drive-efidisk0"]),
    "old": (OLD, ["drive-ide0", "drive-ide1"]),
    "many": (
        MANY,
        [
            f"drive-{k}"
            for k in ["scsi0", "scsi15", "virtio1", "virtio7", "ide0", "ide1", "ide2", "sata3"]
        ],
    ),
    "megasas": ("scsihw: megasas\nscsi0: x\nscsi30: y\n", ["drive-scsi0", "drive-scsi30"]),
    "pvscsi": ("scsihw: pvscsi\nscsi0: x\nscsi12: y\n", ["drive-scsi0", "drive-scsi12"]),
    "lsi": ("scsi3: x\nscsi20: x\n", ["drive-scsi3", "drive-scsi20"]),
    "domain": (DOMAIN, ["drive-virtio-disk0", "drive-scsi0-0-0-1"]),
    "plain-domain": (PLAIN_DOMAIN, ["vda", "hda", "drive-usb-disk0", "sdb"]),
    "none": (config_without_one(["drive-scsi1", "web.raw"]), ["drive-scsi1", "web.raw"]),
}


def of(name: str) -> MachineSpec:
    return machine(*CASES[name])


def left_out(spec: MachineSpec) -> dict[str, str]:
    return dict(spec.omissions)


def devices_of(words: Sequence[str]) -> dict[str, dict[str, str]]:
    """The -device options by their id, the kind as `driver`."""
    found = {}
    for word, value in itertools.pairwise(words):
        if word == "-device":
            driver, *rest = value.split(",")
            fields = dict(part.split("=", 1) for part in rest)
            found[fields.get("id", driver)] = {"driver": driver, **fields}
    return found


def test_a_linux_machine_of_proxmox_has_its_devices_where_they_were() -> None:
    spec = of("linux")
    words = qemu_words(spec, WIRING._replace(forwards=(Forward(0, 22),)))
    devices = devices_of(words)
    assert (spec.memory_bytes, spec.cpus, spec.uuid) == (512 << 20, 2, UUID)
    assert spec.agent_expected
    # What makes it ens18, and mounts by /dev/disk/by-id work.
    assert (
        devices["net0"] | {"bus": "pci.0", "addr": "0x12", "mac": "BC:24:11:2E:C5:4A"}
        == devices["net0"]
    )
    scsi0 = devices["scsi0"]
    assert scsi0["serial"] == "ABC-1"
    assert scsi0["device_id"] == "drive-scsi0"
    assert scsi0["bootindex"] == "1"
    assert (devices["virtioscsi0"]["bus"], devices["virtioscsi0"]["addr"]) == ("pci.3", "0x1")
    assert left_out(spec) == {"boot": "net0: it does not boot from the network"}
    (network,) = [w for w in words if w.startswith("user,")]
    assert "restrict=on" in network
    assert "net=192.168.7.0/24,dhcpstart=192.168.7.20,host=192.168.7.1" in network
    assert network.endswith("hostfwd=tcp:127.0.0.1:0-192.168.7.20:22")


def test_what_is_left_out_is_named_and_what_would_run_on_the_host_never_comes() -> None:
    spec = of("windows")
    omissions = left_out(spec)
    assert set(omissions) == {
        *("memory", "cpus", "cpu", "ide2", "hostpci0", "hookscript", "args", "vga", "tpmstate0"),
    }
    assert "never" in omissions["args"]
    assert "never" in omissions["hookscript"]
    assert "evil" not in " ".join(qemu_words(spec, WIRING))
    assert spec.memory_bytes == 1 << 30
    assert spec.firmware == FirmwareSpec("uefi", True, "drive-efidisk0", False)
    assert spec.has_local_time
    # A card on q35 is behind Proxmox VE's bridges: enp6s18.
    devices = devices_of(qemu_words(spec, WIRING))
    assert devices["net0"]["bus"] == "pci.0"
    assert devices["pci.0"]["driver"] == "pci-bridge"
    assert devices["pci.0"]["bus"] == "pcidmi"
    assert [name for name in devices if name.startswith("ich9-pcie-port")]
    assert known_type(spec.type, ["pc", "q35"]) == (
        "q35",
        "pc-q35-99.1 is not known to this QEMU, which has q35 instead",
    )
    old = of("old")
    assert (old.has_acpi, old.can_use_kvm, old.has_local_time) == (False, False, True)
    assert {d.key: d.boot_index for d in old.disks} == {"ide0": None, "ide1": 1}


def test_disks_go_where_each_controller_has_them() -> None:
    devices = devices_of(qemu_words(of("many"), WIRING))
    assert devices["scsi15"] | {"bus": "scsihw2.0", "scsi-id": "1"} == devices["scsi15"]
    assert devices["virtio7"] | {"bus": "pci.2", "addr": "0x2"} == devices["virtio7"]
    assert devices["sata3"]["bus"] == "ahci0.3"
    assert [devices[f"ide{n}"]["bus"] for n in range(3)] == ["ide.0", "ide.2", "ide.1"]
    assert left_out(of("many"))["scsi1"] == "it is not in the archive"
    devices = devices_of(qemu_words(of("megasas"), WIRING))
    assert devices["scsi30"] | {"bus": "scsihw0.0", "lun": "30"} == devices["scsi30"]


def test_a_domain_of_libvirt_has_its_devices_where_they_were() -> None:
    spec = of("domain")
    devices = devices_of(qemu_words(spec, WIRING))
    assert devices["net0"] | {"bus": "pci.2", "addr": "0x1"} == devices["net0"]
    assert devices["pci.1"] | {"addr": "0x2", "multifunction": "on"} == devices["pci.1"]
    assert devices["pci.2"]["driver"] == "pcie-pci-bridge"
    assert devices["disk-vda"]["bus"] == "pci.3"
    assert devices["disk-sdb"] | {"lun": "1", "bootindex": "1"} == devices["disk-sdb"]
    assert devices["disk-sdb"]["device_id"] == "drive-scsi0-0-0-1"
    assert (spec.cpus, spec.has_local_time, spec.agent_expected) == (1, True, True)
    assert set(left_out(spec)) == {
        *("memory", "os/nvram", "sda", "sdc", "qemu:commandline", "cpu", "hostdev", "video"),
    }
    plain = of("plain-domain")
    assert [disk.source for disk in plain.disks] == CASES["plain-domain"][1]
    assert plain.disks[0].boot_index == 1


@pytest.mark.parametrize(
    "text",
    [
        "arch: aarch64\nscsi0: x\n",
        "memory: 512\n",
        "scsi0: none,media=cdrom\n",
        "",
        "scsi99: x\n",
        "<domain/>",
        "<domain",
        "<network/><domain>",
        "<a><domain type='xen'/></a>",
        "<domain><os><type arch='s390x'>hvm</type></os></domain>",
        "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain>&a;</domain>",
        "<domain>" * 100,
    ],
)
def test_a_machine_that_cannot_be_made_is_refused(text: str) -> None:
    with pytest.raises(MachineConfigError):
        machine(text, ["a", "b"])


@pytest.mark.parametrize("name", CASES)
def test_qemu_takes_the_words(name: str, need: Need, tmp_path: Path) -> None:
    """Each device has its place and is made; the disks are empty ones of QEMU's own."""
    need("qemu-system-x86_64")
    spec = of(name)
    said = subprocess.run([find_qemu(), "-machine", "help"], capture_output=True, timeout=LIMIT_S)
    known = [line.split()[0] for line in said.stdout.decode().splitlines() if line.split()]
    kind, _ = known_type(spec.type, known)
    with socket.socket(socket.AF_UNIX) as listener:
        place = str(tmp_path / "s")
        listener.bind(place)
        listener.listen()
        wiring = Wiring(kind, "tcg", place, place, place, str(tmp_path / "agent"))
        words = qemu_words(spec, wiring._replace(forwards=(Forward(0, 22), Forward(0, 80))))
        words = [_empty(word) if '"nbd"' in word else word for word in words]
        done = subprocess.run(
            [
                find_qemu(),
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-qmp",
                "stdio",
                *words,
            ],
            input=b'{"execute":"qmp_capabilities"}{"execute":"quit"}',
            capture_output=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stderr.decode()
    words = qemu_words(spec.without_places(), WIRING)
    assert not any(re.search(r"bus=pci|addr=", word) for word in words)


def _empty(word: str) -> str:
    node = json.loads(word)
    return json.dumps({"driver": "null-co", "size": 1 << 30, "node-name": node["node-name"]})


def test_firmware_is_what_fits_or_said_to_be_something_else(tmp_path: Path) -> None:
    folders = [str(tmp_path)]
    with pytest.raises(Failure, match="Debian: ovmf"):
        find_firmware(FirmwareSpec("uefi"), is_q35=True, folders=folders)
    for name, size in (("OVMF_CODE_4M.fd", 9), ("OVMF_VARS_4M.fd", 540672)):
        (tmp_path / name).write_bytes(bytes(size))
    secure = FirmwareSpec("uefi", is_secure=True)
    found = find_firmware(secure, is_q35=True, folders=folders)
    assert (found.is_secure, found.variables_bytes) == (False, 540672)
    assert "secure boot is off" in found.omission
    small = FirmwareSpec("uefi", has_small_variables=True)
    assert "new ones" in find_firmware(small, is_q35=False, folders=folders).omission
    for name, size in (("OVMF_CODE_4M.secboot.fd", 9), ("OVMF_VARS_4M.ms.fd", 540672)):
        (tmp_path / name).write_bytes(bytes(size))
    assert find_firmware(secure, is_q35=True, folders=folders).is_secure
    assert not find_firmware(secure, is_q35=False, folders=folders).is_secure
    (tmp_path / "OVMF_CODE.fd").write_bytes(b"x")
    (tmp_path / "OVMF_VARS.fd").write_bytes(bytes(128 << 10))
    assert find_firmware(small, is_q35=False, folders=folders).variables_bytes == 128 << 10
