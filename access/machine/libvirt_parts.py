# SPDX-License-Identifier: Apache-2.0
"""Parts of a domain's XML that name what the archive holds: disks, firmware's variables, a TPM's state. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from vmapipe.access.machine.domain_xml import Element, XmlError, parse_xml
from vmapipe.access.machine.libvirt_addresses import disk_index
from vmapipe.access.machine.spec import (
    MAX_CONFIG_BYTES,
    FirmwareSpec,
    MachineConfigError,
    Notes,
    Sources,
    TpmSpec,
    matched,
)

ELSEWHERE = "a device, a file or a folder of the host it ran on"
#: The names that a TPM's state has in an archive: Proxmox VE's, and those of its configuration.
TPM_NAMES = ("drive-tpmstate0-backup", "drive-tpmstate0", "tpmstate0")
_DISK_NAME = re.compile(r"(?:hd|vd|sd|xvd|ubd|fd)[a-z]{1,3}")
_BUSES = ("virtio", "scsi", "sata", "ide", "usb")


def domain_of(raw: bytes) -> Element:
    """Return the domain of an XML text. Raises MachineConfigError: it is none that can be read."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise MachineConfigError(
            f"the domain's XML cannot be read: it has more than {MAX_CONFIG_BYTES >> 10} KiB"
        )
    try:
        domain = parse_xml(raw)
        # `virsh snapshot-dumpxml` and `virsh save-image-dumpxml` wrap it.
        while domain.tag != "domain" and domain.has("domain"):
            domain = domain.find("domain")
    except XmlError as error:
        raise MachineConfigError(f"the domain's XML cannot be read: {error}") from error
    if domain.tag != "domain":
        raise MachineConfigError("the XML does not describe a domain of libvirt's")
    return domain


def firmware_of(domain: Element, names: Sequence[str], notes: Notes) -> FirmwareSpec:
    """Return a domain's firmware. `names`: the archive's devices."""
    os_ = domain.find("os")
    loader = os_.find("loader")
    for tag in ("kernel", "initrd", "cmdline", "bootmenu"):
        if os_.has(tag) and tag != "bootmenu":
            notes.leave_out(
                f"os/{tag}", "a file or word of the host: the disk's own boot loader has to do"
            )
    if os_.get("firmware") != "efi" and loader.get("type") != "pflash":
        if loader.text.strip() and loader.get("type") == "rom":
            notes.leave_out("os/loader", "firmware of its own: it has the usual one")
        return FirmwareSpec()
    is_secure = loader.get("secure") == "yes"
    for feature in os_.find("firmware").all("feature"):
        if feature.get("name") == "secure-boot" and feature.get("enabled") == "yes":
            is_secure = True
    known = ("drive-efidisk0", "efidisk0", "drive-pflash1", "pflash1")
    found = [name for name in names if name in known or "pflash1" in name]
    if not found:
        notes.leave_out("os/nvram", "it is not in the archive: the firmware has new variables")
    text = loader.text + os_.find("nvram").get("template") + os_.find("nvram").text
    is_small = "OVMF" in text and "4M" not in text and "OVMF_CODE.fd" in text
    return FirmwareSpec("uefi", is_secure, found[0] if found else "", is_small)


def tpm_of(devices: Element, names: Sequence[str], notes: Notes) -> TpmSpec | None:
    """Return a domain's TPM; None: it has none that can be had here."""
    for tpm in devices.all("tpm"):
        backend = tpm.find("backend")
        if backend.get("type") != "emulator":
            notes.leave_out("tpm", ELSEWHERE)
            return None
        state = next((name for name in names if name in TPM_NAMES), "")
        if not state:
            notes.leave_out("tpm", "its state is not in the archive: the machine has a new TPM")
        return TpmSpec("1.2" if backend.get("version") == "1.2" else "2.0", state)
    return None


def chosen_disks(
    devices: Element, notes: Notes, drives: Collection[str] = ()
) -> dict[str, Element]:
    """Return a domain's disks by their names. `drives`: the kinds of drives that are no disks, too."""
    found: dict[str, Element] = {}
    for disk in devices.all("disk"):
        key = disk.find("target").get("dev")
        kind, bus = disk.get("device", "disk"), disk.find("target").get("bus")
        if not _DISK_NAME.fullmatch(key) or key in found:
            notes.leave_out(key or "disk", "not a valid name of a disk, or one that comes twice")
        elif kind in drives:
            found[key] = disk
        elif kind not in ("disk", "lun"):
            notes.leave_out(key, f"a {'CD' if kind == 'cdrom' else kind} drive")
        elif bus not in _BUSES:
            notes.leave_out(key, f"a disk on a bus of the kind {bus or 'that is not named'}")
        else:
            found[key] = disk
    return found


def matched_disks(
    elements: Mapping[str, Element], names: Sequence[str], taken: Collection[str], notes: Notes
) -> dict[str, str]:
    """Return by a disk's name the archive's device that is its content. `taken`: what is no disk."""
    wanted = {
        key: list(_archive_names(disk, key, disk.find("target").get("bus")))
        for key, disk in elements.items()
    }
    reserved = ("drive-efidisk", "drive-tpmstate")
    free = [name for name in names if name not in taken and not name.startswith(reserved)]
    return matched(Sources(free), wanted, notes)


def _archive_names(disk: Element, key: str, bus: str) -> Iterator[str]:
    """What such a disk may be called in an archive, likeliest first."""
    aliases = [disk.find("alias").get("name")]
    if bus == "virtio":
        aliases.append(f"virtio-disk{disk_index(key)}")
    elif bus == "usb":
        aliases.append(f"usb-disk{disk_index(key)}")
    else:
        where = disk.find("address")
        numbers = [where.get(name, "0") for name in ("controller", "bus", "target", "unit")]
        if bus != "scsi":
            del numbers[2]
        aliases.append(f"{bus}{'-'.join(numbers)}")
    for name in (*aliases, key):
        if name:
            yield f"drive-{name}"
            yield name
    source = disk.find("source")
    path = source.get("file") or source.get("dev") or source.get("name")
    file_name = os.path.basename(path)
    for name in (path, file_name, file_name.partition(".")[0]):
        if name:
            yield name
            yield f"drive-{name}"
