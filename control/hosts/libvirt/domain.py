# SPDX-License-Identifier: Apache-2.0
"""A domain's XML: its disks, which of them a backup takes, and what else of it is stored. Pure.

A disk's name in an archive is libvirt's: `vda`. Proxmox VE's name for it is in the lines that
`proxmox_map` makes, in the words of its own configurations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmapipe.access.machine.domain_xml import Element, XmlError, parse_xml
from vmapipe.control.qemu.disks import NOT_CHOSEN, LeftOut, Level
from vmapipe.control.qemu.image_damage import UsedImage
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.image_bounds import WITH_TABLES
from vmapipe.runtime.text import name_text, one_line

# What QEMU's block layer does not have, by the disk's type.
_NOT_QEMUS = {
    "vhostuser": "another program (vhost-user) has the disk, and QEMU does not see what is written",
    "vhostvdpa": "the device itself has the disk (vDPA), and QEMU does not see what is written",
    "dir": "it is a folder that QEMU shows as a FAT disk: back up the folder's files",
}
# Of a domain that is shut off: disks that only QEMU, with libvirt's secrets, could open.
_ONLY_QEMU = (
    "it is a network disk ({}), which only libvirt can open: back up the domain while it runs"
)
_BUS_NAMES = {"virtio": "virtio", "scsi": "scsi", "sata": "sata", "ide": "ide"}
_TARGET = re.compile(r"[a-zA-Z]{2,4}?([a-z]{1,3})")
#: The firmware's variables in an archive, as Proxmox VE calls them.
NVRAM_NAME = "drive-efidisk0"
#: A block job's error ends in the guest where its disk says so: no full scratch file may come to that.
REPORTING = ("report", "ignore")

# Longer chains of images are not looked at: libvirt itself allows 200.
_MOST_BELOW = 200

# With older ones a client that leaves ends the QEMU of a disk with an I/O thread (an assertion in
# blockdev-nbd.c, seen with 7.2.22).
_SAFE_WITH_IO_THREADS = (9, 0)


class DomainDisk(NamedTuple):
    """A disk as the XML has it. `path`: a file, a device or, of a network disk, its name there."""

    target: str
    kind: str  # file, block, network, volume, …
    device: str  # disk, lun, cdrom, floppy
    image_format: str
    path: str
    bus: str
    alias: str = ""
    protocol: str = ""
    pool: str = ""
    host: tuple[str, str, str] = ("", "", "")  # of a network disk: transport, name or socket, port
    is_read_only: bool = False
    is_shared: bool = False
    has_io_thread: bool = False
    error_policy: str = ""
    is_encrypted: bool = False
    #: Format and path of the image and of those below it, that are files or devices.
    images: tuple[tuple[str, str], ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.path and self.kind in ("file", "block", "volume")

    def why_not(self) -> LeftOut | None:
        """Return why a backup does not take it unless it is told to; None: it does."""
        reason, level = _why_not(self)
        return LeftOut(self.target, reason, level) if reason else None


def _why_not(disk: DomainDisk) -> tuple[str, Level]:
    if disk.is_empty:
        return "an empty drive", "debug"
    if disk.device == "cdrom":
        return "a CD drive", "info"
    if disk.kind in _NOT_QEMUS:
        return _NOT_QEMUS[disk.kind], "warn"
    if disk.device == "lun":
        return "a SCSI device that is passed through: its writes do not pass QEMU's backup", "warn"
    if disk.is_shared:
        return "<shareable/>: what other machines write to it would be missed", "warn"
    return ("a read-only disk (--disk takes it)", "info") if disk.is_read_only else ("", "info")


class Domain(NamedTuple):
    """What a domain's XML says that a backup has to know."""

    name: str
    uuid: str
    disks: tuple[DomainDisk, ...]
    has_uefi: bool
    #: Where its firmware's variables are; empty: the XML does not say.
    nvram: str
    nvram_format: str
    has_tpm: bool
    has_agent: bool
    outside: tuple[LeftOut, ...]


def read_domain(xml: str) -> Domain:
    """Raises Failure for an XML that is not a domain's."""
    try:
        root = parse_xml(xml.encode("utf-8", "surrogateescape"))
    except XmlError as error:
        raise Failure(f"libvirt's XML of the domain cannot be read: {error}") from error
    devices = root.find("devices")
    nvram = root.find("os/nvram")
    path = nvram.text.strip() or nvram.find("source").get("file")
    return Domain(
        name=root.find("name").text,
        uuid=root.find("uuid").text,
        disks=disks_of(root),
        has_uefi=root.find("os").get("firmware") == "efi"
        or root.find("os/loader").get("type") == "pflash",
        nvram=path,
        nvram_format=nvram.get("format", "raw"),
        has_tpm=any(t.find("backend").get("type") == "emulator" for t in devices.all("tpm")),
        has_agent=any(
            c.find("target").get("name") == "org.qemu.guest_agent.0" for c in devices.all("channel")
        ),
        outside=tuple(_outside(devices)),
    )


def disks_of(domain: Element) -> tuple[DomainDisk, ...]:
    """Return the disks of a <domain>, in its order."""
    return tuple(_disk(disk) for disk in domain.find("devices").all("disk"))


def _disk(disk: Element) -> DomainDisk:
    source, driver, target = disk.find("source"), disk.find("driver"), disk.find("target")
    host = source.find("host")
    return DomainDisk(
        target=target.get("dev"),
        kind=disk.get("type", "file"),
        device=disk.get("device", "disk"),
        image_format=driver.get("type", "raw"),
        path=source.get("file") or source.get("dev") or source.get("name") or source.get("volume"),
        bus=target.get("bus"),
        alias=disk.find("alias").get("name"),
        protocol=source.get("protocol"),
        pool=source.get("pool"),
        host=(
            host.get("transport", "tcp"),
            host.get("socket") or host.get("name"),
            host.get("port"),
        ),
        is_read_only=disk.has("readonly"),
        is_shared=disk.has("shareable"),
        has_io_thread=bool(driver.get("iothread")) or driver.has("iothreads"),
        error_policy=driver.get("error_policy"),
        is_encrypted=disk.has("encryption") or source.has("encryption"),
        images=tuple(_images(disk)),
    )


def _images(disk: Element) -> Iterator[tuple[str, str]]:
    """Yield format and path of a disk's image and of those below it, as far as the XML has them."""
    here, image_format = disk, disk.find("driver").get("type", "raw")
    for _ in range(_MOST_BELOW):
        source = here.find("source")
        if path := source.get("file") or source.get("dev"):
            yield image_format, path
        here = here.find("backingStore")
        image_format = here.find("format").get("type", "raw")
        if not here.has("source"):
            return


def _outside(devices: Element) -> Iterator[LeftOut]:
    """What the machine stores or uses outside of its disks."""
    for shared in devices.all("filesystem"):
        name = shared.find("target").get("dir") or "filesystem"
        yield LeftOut(name, "a folder of the host that is shared with the guest", "warn")
    for device in devices.all("hostdev"):
        kind = device.get("type") or device.get("mode") or "device"
        name = device.find("alias").get("name") or f"hostdev-{kind}"
        yield LeftOut(name, f"a device of the host ({kind}): nothing of it is stored", "info")
    for memory in devices.all("memory"):
        if memory.get("model") == "nvdimm":
            path = memory.find("source/path").text
            yield LeftOut(path or "nvdimm", "a persistent memory (NVDIMM) has its own file", "warn")
    for tpm in devices.all("tpm"):
        kind = tpm.find("backend").get("type")
        if kind != "emulator":
            yield LeftOut("tpm", f"the host's own TPM ({kind}) keeps its state", "warn")


class Chosen(NamedTuple):
    """A disk of a backup, and its name in the archive."""

    name: str
    disk: DomainDisk


def choose(domain: Domain, requested: Sequence[str]) -> tuple[list[Chosen], list[LeftOut]]:
    """Return the disks to take, and what is left out. `requested`: `[NAME=]TARGET` each; none: all.

    Raises UsageError.
    """
    if not requested:
        taken = [Chosen(disk.target, disk) for disk in domain.disks if disk.why_not() is None]
        left = [reason for disk in domain.disks if (reason := disk.why_not()) is not None]
        return taken, [*left, *domain.outside]
    known = {word: disk for disk in domain.disks for word in _words(disk)}
    taken = []
    for text in requested:
        before, equals, after = text.partition("=")
        name, word = (before, after) if equals else ("", text)
        disk = known.get(word)
        if disk is None:
            names = ", ".join(disk.target for disk in domain.disks) or "no disk"
            raise UsageError(
                f"the domain {name_text(domain.name)} has no disk {name_text(word)}, but {one_line(names, 300)}"
            )
        reason = disk.why_not()
        if reason is not None and not (disk.is_read_only and not disk.is_empty):
            raise UsageError(f"disk {name_text(disk.target)} cannot be taken: {reason.reason}")
        if any(disk.target == other.disk.target for other in taken):
            raise UsageError(f"--disk names {name_text(disk.target)} twice")
        taken.append(Chosen(name or disk.target, disk))
    chosen = {disk.disk.target for disk in taken}
    left = [
        disk.why_not() or LeftOut(disk.target, NOT_CHOSEN, "info")
        for disk in domain.disks
        if disk.target not in chosen
    ]
    return taken, [*left, *domain.outside]


def _words(disk: DomainDisk) -> set[str]:
    """What a user may call a disk."""
    return {disk.target, disk.alias, disk.path} - {""}


def why_not_pulled(disk: DomainDisk, qemu: tuple[int, ...]) -> str:
    """Return why a pulled backup could harm the guest; empty: it cannot. `qemu`: the running one's version."""
    if disk.error_policy in REPORTING:
        return (
            f"has error_policy={disk.error_policy!r}: a full scratch space would be an I/O error in the "
            "guest, where it pauses for a moment otherwise. Use --push, or change the policy (stop, "
            "enospace)"
        )
    if disk.has_io_thread and qemu < _SAFE_WITH_IO_THREADS:
        return (
            "has an I/O thread: QEMU before 9.0 may crash when a client leaves its NBD server. Use "
            "--push, or a newer QEMU"
        )
    return ""


def why_not_at_rest(disk: DomainDisk) -> str:
    """Return why the image of a domain that is shut off cannot be read without libvirt; empty: it can."""
    if disk.is_encrypted:
        return "its image is encrypted, with a secret that libvirt keeps: back up the domain while it runs"
    if disk.kind == "network" and disk.protocol != "nbd":
        return _ONLY_QEMU.format(disk.protocol or "unknown")
    if disk.kind not in ("file", "block", "volume", "network"):
        return _ONLY_QEMU.format(disk.kind)
    return ""


def images_of(taken: Sequence[Chosen]) -> list[UsedImage]:
    """Return the images that these disks are made of, of formats with tables, under the archive's names."""
    return [
        UsedImage(name, image_format, path)
        for name, disk in taken
        for image_format, path in disk.images
        if image_format in WITH_TABLES
    ]


def proxmox_map(taken: Sequence[Chosen]) -> str:
    """Return lines for a Proxmox VE configuration: which of its disks has which device's data."""
    lines, used = [], set[str]()
    for name, disk in taken:
        bus = _BUS_NAMES.get(disk.bus)
        if bus is None:
            continue
        number = _number(disk.target)
        while f"{bus}{number}" in used:
            number += 1
        used.add(f"{bus}{number}")
        lines.append(f"#qmdump#map:{bus}{number}:{name}::raw:\n")
    return "".join(lines)


def _number(target: str) -> int:
    """`vda` and `sda` to 0, `vdaa` to 26."""
    match = _TARGET.fullmatch(target)
    letters = target[2:] if match else ""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return max(0, number - 1)
