# SPDX-License-Identifier: Apache-2.0
"""Machines of Proxmox VE as domains of libvirt's: their devices where they were, and each key kept or named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.access.machine.configs import LINUX, MANY, OLD, WINDOWS
from tests.access.machine.domains import finished, reasons, root_of
from vmapipe.access.machine.proxmox_domain import draft_of_proxmox

PROXMOX = [
    (LINUX, ["drive-scsi0"]),
    (WINDOWS, ["drive-sata0", "drive-efidisk0", "drive-tpmstate0-backup"]),
    (OLD, ["drive-ide0", "drive-ide1"]),
    (
        MANY,
        [
            f"drive-{k}"
            for k in [
                "scsi0",
                "scsi1",
                "scsi15",
                "virtio1",
                "virtio7",
                "ide0",
                "ide1",
                "ide2",
                "sata3",
            ]
        ],
    ),
]


def test_machines_of_proxmox_become_valid_domains(
    validates: Callable[[Sequence[str]], None],
) -> None:
    drafts = [draft_of_proxmox(text, names) for text, names in PROXMOX]
    validates([finished(draft).xml for draft in drafts])
    for draft, (_, names) in zip(drafts, PROXMOX, strict=True):
        disks = [n for n in names if "efidisk" not in n and "tpmstate" not in n]
        assert sorted(draft.sources.values()) == sorted(disks)


def test_a_linux_of_proxmox_finds_its_network_card_where_it_was() -> None:
    draft = draft_of_proxmox(LINUX, ["drive-scsi0"])
    root = root_of(finished(draft).xml)
    address = root.find("devices/interface/address")
    # Slot 18 of the first bus: ens18.
    assert (address.get("bus"), address.get("slot")) == ("0x00", "0x12")
    disk = root.find("devices/disk")
    assert disk.find("target").attributes == {"dev": "sda", "bus": "scsi", "rotation_rate": "1"}
    assert disk.find("serial").text == "ABC-1"
    assert [e.find("boot").get("order") for e in (disk, root.find("devices/interface"))] == [
        "1",
        "2",
    ]
    scsi = next(c for c in root.find("devices").all("controller") if c.get("type") == "scsi")
    assert scsi.find("driver").get("iothread") == "1"
    assert root.find("iothreads").text == "1"
    assert root.find("devices/channel/target").get("name") == "org.qemu.guest_agent.0"


def test_a_q35_of_proxmox_keeps_the_buses_that_name_its_cards() -> None:
    """`enp6s18`: five buses before the first bridge, and none that libvirt would add in front."""
    root = root_of(finished(draft_of_proxmox(MANY, ["drive-scsi0"])).xml)
    devices = root.find("devices")
    bridges = [c for c in devices.all("controller") if c.get("type") == "pci"]
    models = [c.get("model") for c in bridges]
    assert models[:7] == ["pcie-root", *["pcie-root-port"] * 4, "dmi-to-pci-bridge", "pci-bridge"]
    placed = [
        e for e in devices.children if e.tag not in ("input", "graphics", "controller", "disk")
    ]
    assert [e.tag for e in placed if not e.has("address")] == []
    usb = {c.get("model") for c in devices.all("controller") if c.get("type") == "usb"}
    assert usb == {"ich9-uhci1", "ich9-uhci2", "ich9-uhci3", "ich9-ehci1"}


def test_a_windows_of_proxmox_has_its_firmware_tpm_and_clock() -> None:
    draft = draft_of_proxmox(WINDOWS, ["drive-sata0", "drive-efidisk0", "drive-tpmstate0-backup"])
    root = root_of(finished(draft).xml)
    assert draft.firmware.variables == "drive-efidisk0"
    assert root.find("os/loader").get("secure") == "yes"
    assert root.find("features/smm").get("state") == "on"
    assert root.find("clock").get("offset") == "localtime"
    assert root.find("devices/tpm/backend").attributes == {"type": "emulator", "version": "2.0"}
    assert root.find("cpu/topology").attributes["sockets"] == "2"
    assert root.find("features/hyperv/relaxed").get("state") == "on"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("args: -device evil", "args"),
        ("hookscript: local:snippets/x.pl", "hookscript"),
        ("hostpci0: 0000:01:00.0,pcie=1", "hostpci0"),
        ("usb0: host=1234:5678", "usb0"),
        ("virtiofs0: dirid=x", "virtiofs0"),
        ("onboot: 1", "onboot"),
        ("startup: order=1", "startup"),
        ("cpulimit: 2", "cpulimit"),
        ("balloon: 256", "balloon"),
        ("audio0: device=AC97", "audio0"),
        ("vga: virtio-gl", "vga"),
        ("cpu: custom-x", "cpu"),
        ("unused0: local:x", "unused0"),
        ("serial1: /dev/ttyS0", "serial1"),
        ("rng0: source=/dev/hwrng", "rng0"),
        ("watchdog: model=i6300esb,action=debug", "watchdog"),
        ("net0: virtio=BC:24:11:2E:C5:4A,bridge=vmbr0,tag=7", "net0"),
        ("scsi0: local:x,mbps_rd=10", "scsi0"),
        ("ide2: local:iso/x.iso,media=cdrom", "ide2"),
        ("protection: 1", "protection"),
        ("nonsense: 1", "nonsense"),
    ],
)
def test_a_key_of_proxmox_without_a_counterpart_is_named(line: str, key: str) -> None:
    text = f"scsi0: local:x\nmemory: 512\nnet0: virtio=BC:24:11:2E:C5:4A\n{line}\n"
    draft = draft_of_proxmox(text, ["drive-scsi0"])
    assert key in reasons(draft)
    xml = finished(draft).xml
    assert "evil" not in xml
    assert "hwrng" not in xml


def test_a_cloud_init_drive_that_is_in_the_archive_keeps_its_content() -> None:
    text = "memory: 512\nscsi0: l:1\nide2: l:vm-1-cloudinit,media=cdrom\nboot: order=ide2;scsi0\n"
    draft = draft_of_proxmox(text, ["drive-scsi0", "drive-ide2"])
    assert draft.sources == {"sda": "drive-scsi0", "hda": "drive-ide2"}
    cdrom = draft.disks[1].element
    assert (cdrom.get("device"), cdrom.find("boot").get("order")) == ("cdrom", "1")
    assert draft.disks[0].element.find("boot").get("order") == "2"
