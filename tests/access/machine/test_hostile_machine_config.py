# SPDX-License-Identifier: Apache-2.0
"""Configurations that somebody made up to harm the host: no value of theirs reaches QEMU."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.access.machine.configs import LIMITS, UUID, WIRING, machine
from vmapipe.access.machine.argv import Forward, qemu_words
from vmapipe.access.machine.domain_xml import XmlError, parse_xml
from vmapipe.access.machine.libvirt import machine_of_libvirt
from vmapipe.access.machine.proxmox import machine_of_proxmox
from vmapipe.access.machine.proxmox_config import looks_like_proxmox
from vmapipe.access.machine.spec import MachineConfigError, MachineSpec


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
