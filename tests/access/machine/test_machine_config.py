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
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machine import LIMIT_S, Need
from vmapipe.access.machine.argv import Forward, Wiring, qemu_words
from vmapipe.access.machine.domain_xml import XmlError, parse_xml
from vmapipe.access.machine.firmware import find_firmware
from vmapipe.access.machine.libvirt import looks_like_libvirt, machine_of_libvirt
from vmapipe.access.machine.process import find_qemu
from vmapipe.access.machine.proxmox import config_without_one, machine_of_proxmox
from vmapipe.access.machine.proxmox_config import looks_like_proxmox
from vmapipe.access.machine.spec import (
    FirmwareSpec,
    Limits,
    MachineConfigError,
    MachineSpec,
    known_type,
)
from vmapipe.runtime.errors import Failure

LIMITS = Limits(1 << 30, 2)
WIRING = Wiring("pc", "tcg", "nbd", "ser", "fw", "ga")
UUID = "9c2b2a2e-3c1e-4cf2-9b0a-0fb4ad10a9a3"
LINUX = f"""\
#comment: x
boot: order=scsi0;net0
cores: 2
memory: 512
ostype: l26
scsihw: virtio-scsi-single
scsi0: local:100/vm-100-disk-0.raw,iothread=1,serial=ABC-1,size=2G,ssd=1
net0: virtio=BC:24:11:2E:C5:4A,bridge=vmbr0,firewall=1
ipconfig0: ip=192.168.7.20/24,gw=192.168.7.1
agent: 1,fstrim_cloned_disks=1
smbios1: uuid={UUID}
#qmdump#map:scsi0:drive-scsi0:local:raw:
[snapshot]
cores: 9
args: -evil
"""
WINDOWS = """\
bios: ovmf
boot: order=sata0
cores: 4
sockets: 2
cpu: x86-64-v2-AES
efidisk0: l:1,efitype=4m,pre-enrolled-keys=1,size=4M
machine: pc-q35-99.1+pve0
memory: current=4096
ostype: win11
sata0: l:2,size=2G
ide2: none,media=cdrom
net0: e1000=BC:24:11:2E:C5:4B,bridge=vmbr0
tpmstate0: l:3,size=4M,version=v2.0
hostpci0: 01:00
hookscript: local:snippets/x.pl
args: -device evil
vga: qxl
"""
OLD = """\
bootdisk: ide1
cores: 1
ide0: l:2,size=2G
ide1: l:4
machine: pc-i440fx-7.1+pve0
memory: 512
net0: rtl8139=BC:24:11:2E:C5:4C,bridge=vmbr0
ostype: w2k8
acpi: 0
kvm: 0
"""
MANY = """\
scsi0: l:2
scsi1: l:3,backup=0
scsi15: l:7
memory: 512
machine: q35
virtio1: l:5
virtio7: l:6
ide0: x
ide1: x
ide2: x
sata3: f
net7: vmxnet3=BC:24:11:2E:C5:4C
"""
DOMAIN = f"""\
<domain type='kvm' id='3'>
  <name>web</name><uuid>{UUID}</uuid>
  <memory unit='KiB'>2097152</memory><vcpu placement='static' current='1'>4</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <boot dev='hd'/></os>
  <features><acpi/></features><cpu mode='host-passthrough'/><clock offset='localtime'/>
  <devices><emulator>/usr/bin/evil</emulator>
  <disk type='file' device='disk'><source file='/x/web.qcow2'/><target dev='vda' bus='virtio'/>
    <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></disk>
  <disk type='file' device='disk'><target dev='sdb' bus='scsi'/><boot order='1'/>
    <address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>
  <disk type='file' device='disk'><target dev='sdc' bus='sata'/>
    <address type='drive' controller='0' bus='0' target='0' unit='2'/></disk>
  <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
  <controller type='scsi' index='0' model='virtio-scsi'/>
  <controller type='pci' index='0' model='pcie-root'/>
  <controller type='pci' index='1' model='pcie-root-port'><target chassis='1' port='0x10'/>
    <address type='pci' bus='0x00' slot='0x02' function='0x0' multifunction='on'/></controller>
  <controller type='pci' index='2' model='pcie-to-pci-bridge'>
    <address type='pci' bus='0x01' slot='0x00' function='0x0'/></controller>
  <controller type='pci' index='3' model='pcie-root-port'><target chassis='3' port='0x11'/>
    <address type='pci' bus='0x00' slot='0x02' function='0x1'/></controller>
  <interface type='network'><mac address='52:54:00:12:34:56'/><model type='virtio'/>
    <address type='pci' bus='0x02' slot='0x01' function='0x0'/></interface>
  <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  <video><model type='qxl'/><address type='pci' bus='0x00' slot='0x01' function='0x0'/></video>
  <hostdev mode='subsystem'/>
  </devices>
  <qemu:commandline xmlns:qemu='urn:x'><qemu:arg value='-evil'/></qemu:commandline>
</domain>
"""
PLAIN_DOMAIN = """\
<domain><memory unit='GiB'>1</memory><vcpu>1</vcpu><os><type machine='pc'>hvm</type></os><devices>
<disk device='disk'><target dev='vda' bus='virtio'/>
  <address type='pci' domain='0' bus='0' slot='7' function='0'/></disk>
<disk device='disk'><target dev='hda' bus='ide'/></disk>
<disk device='disk'><target dev='sda' bus='usb'/></disk>
<disk device='disk'><target dev='sdb' bus='scsi'/></disk>
<interface type='bridge'><model type='e1000'/>
  <address type='pci' bus='0x00' slot='0x03' function='0x0'/></interface>
</devices></domain>
"""
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


def machine(text: str, devices: Sequence[str], limits: Limits = LIMITS) -> MachineSpec:
    if looks_like_libvirt(text.encode()):
        return machine_of_libvirt(text.encode(), devices, limits)
    return machine_of_proxmox(text, devices, limits)


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


def test_xml_that_explodes_is_not_read() -> None:
    bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;'>]><d>&b;</d>"
    for text in (bomb, "<d><e SYSTEM='file:///etc/passwd'>&x;</e></d>", "<a>" * 50, "\x00", ""):
        with pytest.raises(XmlError):
            parse_xml(text.encode())
    with pytest.raises(XmlError, match="too many"):
        parse_xml(b"<d>" + b"<e/>" * 30_000 + b"</d>")
    with pytest.raises(XmlError, match="document type"):
        parse_xml(b"<!DOCTYPE d SYSTEM 'http://127.0.0.1:1/x'><d/>")


# What an attacker's value would have to look like to be an option of its own.
_EVIL = st.sampled_from(
    [
        "EVIL",
        "x,file=EVIL",
        "EVIL,,",
        "1,id=EVIL",
        "-device EVIL",
        "\nargs: EVIL",
        "a=EVIL",
        "0x9,EVIL",
        ";EVIL",
    ]
)
_KEYS = st.sampled_from(
    [
        "machine",
        "memory",
        "cores",
        "sockets",
        "vcpus",
        "bios",
        "boot",
        "bootdisk",
        "ostype",
        "scsihw",
        "scsi0",
        "scsi1",
        "virtio0",
        "ide0",
        "sata1",
        "net0",
        "net1",
        "ipconfig0",
        "smbios1",
        "agent",
        "args",
        "hookscript",
        "efidisk0",
        "tpmstate0",
        "vga",
        "cpu",
        "acpi",
        "localtime",
        "hostpci0",
        "serial0",
        "name",
        "description",
        "EVIL",
    ]
)
_STARTS = st.sampled_from(
    [
        "",
        "l:1,",
        "virtio=BC:24:11:2E:C5:4A,",
        "order=",
        "uuid=",
        "serial=",
        "l:1,serial=",
        "l:1,wwn=0x",
        "ip=",
        "q35,",
        "virtio=",
        "x,media=",
    ]
)
_LINES = st.lists(
    st.builds(lambda key, start, evil: f"{key}: {start}{evil}", _KEYS, _STARTS, _EVIL), max_size=12
)
_SAFE_DEVICES = ["drive-scsi0", "drive-virtio0", "drive-efidisk0", "drive-tpmstate0-backup"]


@given(_LINES, st.lists(st.sampled_from([*_SAFE_DEVICES, "EVIL,x=y", "EVIL\n"]), unique=True))
def test_no_value_of_a_hostile_configuration_reaches_qemu(
    lines: list[str], devices: list[str]
) -> None:
    text = "\n".join(["virtio0: l:1", "scsi0: l:2", *lines])
    try:
        spec = machine_of_proxmox(text, [*devices, "drive-virtio1"], LIMITS)
    except MachineConfigError:
        return
    _is_harmless(spec)


def _is_harmless(spec: MachineSpec) -> None:
    words = qemu_words(spec, WIRING._replace(forwards=(Forward(0, 22),)))
    # A plain serial number is a disk's own.
    assert "EVIL" not in " ".join(words).replace("serial=EVIL,", "")
    # Each word is of a known form: no option has come along.
    heads = {word for word in words if word.startswith("-") and len(word) > 1}
    assert heads <= {
        *("-machine", "-accel", "-cpu", "-smp", "-m", "-smbios", "-rtc", "-boot", "-action", "-S"),
        *("-device", "-chardev", "-serial", "-blockdev", "-netdev", "-tpmdev", "-global"),
    }
    assert 16 << 20 <= spec.memory_bytes <= LIMITS.memory_bytes
    assert 1 <= spec.cpus <= LIMITS.cpus
    assert len(spec.omissions) <= 101
    for omission in spec.omissions:
        assert omission.key.isprintable()
        assert omission.reason.isprintable()


@given(st.text(max_size=400) | st.binary(max_size=400).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_machine_or_refused(text: str) -> None:
    for known in (
        "",
        "virtio0: l:1\n",
        "<domain><devices><disk><target dev='vda' bus='virtio'/></disk>",
    ):
        looks_like_proxmox(known + text)
        try:
            spec = machine(known + text, ["drive-virtio0", "vda"])
        except MachineConfigError:
            continue
        _is_harmless(spec)


_TAGS = st.sampled_from(
    [
        "memory",
        "vcpu",
        "os",
        "type",
        "loader",
        "features",
        "clock",
        "devices",
        "disk",
        "target",
        "address",
        "controller",
        "interface",
        "mac",
        "model",
        "channel",
        "tpm",
        "backend",
        "boot",
        "serial",
        "wwn",
        "alias",
        "source",
        "uuid",
        "cpu",
    ]
)
_ATTRIBUTES = st.dictionaries(
    st.sampled_from(
        [
            "type",
            "dev",
            "bus",
            "index",
            "model",
            "slot",
            "function",
            "unit",
            "controller",
            "address",
            "machine",
            "order",
            "name",
            "device",
            "target",
            "unit",
            "arch",
            "chassis",
            "port",
        ]
    ),
    st.sampled_from(
        [
            "pci",
            "drive",
            "disk",
            "virtio",
            "scsi",
            "sata",
            "ide",
            "usb",
            "0",
            "1",
            "0x1",
            "31",
            "99",
            "vda",
            "sdb",
            "hdc",
            "virtio-scsi",
            "pcie-root-port",
            "x,EVIL",
            "EVIL",
            "52:54:00:12:34:56",
            "",
            "hd",
            "hvm",
        ]
    ),
    max_size=4,
)


def _element(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def build(tag: str, attributes: dict[str, str], inner: list[str], text: str) -> str:
        words = "".join(f" {key}='{value}'" for key, value in attributes.items())
        return f"<{tag}{words}>{text}{''.join(inner)}</{tag}>"

    texts = st.sampled_from(["", "1", "512", "EVIL", "x,y=EVIL", UUID])
    return st.builds(build, _TAGS, _ATTRIBUTES, st.lists(children, max_size=4), texts)


@settings(max_examples=40)  # each is a tree that takes long to make
@given(st.lists(st.recursive(_element(st.just("")), _element, max_leaves=12), max_size=8))
def test_no_value_of_a_hostile_domain_reaches_qemu(elements: list[str]) -> None:
    inner = "".join(elements)
    text = f"<domain><devices><disk><target dev='vda' bus='virtio'/></disk>{inner}</devices>{inner}</domain>"
    try:
        spec = machine_of_libvirt(text.encode(), ["vda", "sdb", "hdc"], LIMITS)
    except MachineConfigError:
        return
    _is_harmless(spec)


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
