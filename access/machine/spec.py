# SPDX-License-Identifier: Apache-2.0
"""The description of a machine to start, made of an archive's configuration. Pure.

proxmox.py and libvirt.py make it, argv.py makes QEMU's words of it. A configuration is a stranger's
text: what gets in here is a number in its range, or a word of a table; anything else is an omission.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from vmapipe.runtime.errors import Failure
from vmapipe.runtime.text import human_bytes, one_line

#: A configuration with more than that was made to be long. An archive holds 64 KiB of each.
MAX_CONFIG_BYTES = 1 << 20
# Each is a line for people to read.
_MAX_OMISSIONS = 100
_MAX_KEY_CHARS = 60
_MAX_REASON_CHARS = 300
# A guest of any system needs at least that, and a typing mistake (`memory: 2`) less.
_LEAST_MEMORY_BYTES = 16 << 20
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")
# By what the kernel makes names below /dev/disk/by-id; virtio has 20 characters, SCSI 36.
_SERIAL = re.compile(r"[A-Za-z0-9_.+-]{1,36}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class MachineConfigError(Failure):
    """A configuration of which no machine can be made, and why."""


class Omission(NamedTuple):
    """A part of the configuration that the started machine has not, or has otherwise."""

    key: str
    reason: str


class PciPlace(NamedTuple):
    """A slot of a PCI bus: it decides what a guest calls its network cards."""

    bus: str
    slot: int
    function: int = 0
    is_multifunction: bool = False


Property = tuple[str, str | int]


class DeviceSpec(NamedTuple):
    """A device with QEMU's name for its kind (`driver`), and an id of ours."""

    driver: str
    name: str
    place: PciPlace | None = None
    properties: tuple[Property, ...] = ()


class DiskSpec(NamedTuple):
    """`key`: what the configuration calls it; `source`: the archive's device that is its content."""

    key: str
    source: str
    device: DeviceSpec
    boot_index: int | None = None


class NicSpec(NamedTuple):
    """A network card. `address`: what the guest gives itself, as `192.168.1.5/24`; empty: by DHCP."""

    key: str
    device: DeviceSpec
    address: str = ""


class FirmwareSpec(NamedTuple):
    """`variables`: the archive's device with its variables; empty: new ones."""

    kind: Literal["bios", "uefi"] = "bios"
    is_secure: bool = False
    variables: str = ""
    has_small_variables: bool = False


class TpmSpec(NamedTuple):
    """`state`: the archive's device with what it keeps; empty: a new one."""

    version: Literal["1.2", "2.0"]
    state: str


class Limits(NamedTuple):
    """What a machine may have here at most."""

    memory_bytes: int
    cpus: int


class MachineSpec(NamedTuple):
    """A machine. `type`: as the configuration says it, or `pc`, `q35`.

    `agent_expected`: the configuration says that its guest agent answers.
    """

    type: str
    memory_bytes: int
    cpus: int
    firmware: FirmwareSpec
    controllers: tuple[DeviceSpec, ...]
    disks: tuple[DiskSpec, ...]
    nics: tuple[NicSpec, ...]
    vga_place: PciPlace | None
    agent_port: DeviceSpec
    agent_expected: bool
    tpm: TpmSpec | None
    uuid: str
    has_acpi: bool
    has_local_time: bool
    can_use_kvm: bool
    omissions: tuple[Omission, ...]

    def without_places(self) -> MachineSpec:
        """Return the same machine, its devices where QEMU likes."""

        def moved(device: DeviceSpec) -> DeviceSpec:
            return device._replace(place=None)

        bridges = set(BRIDGES)
        return self._replace(
            controllers=tuple(moved(c) for c in self.controllers if c.driver not in bridges),
            disks=tuple(disk._replace(device=moved(disk.device)) for disk in self.disks),
            nics=tuple(nic._replace(device=moved(nic.device)) for nic in self.nics),
            vga_place=None,
            agent_port=moved(self.agent_port),
        )

    @property
    def is_q35(self) -> bool:
        return family(self.type) == "q35"


#: PCI bridges; which QEMU has under these names.
BRIDGES = (
    "pci-bridge",
    "pcie-root-port",
    "pcie-pci-bridge",
    "i82801b11-bridge",
    "x3130-upstream",
    "xio3130-downstream",
)


class Notes:
    """Collects omissions, each once, and no more than people read."""

    def __init__(self) -> None:
        self._found: dict[Omission, None] = {}

    def leave_out(self, key: str, reason: str) -> None:
        omission = Omission(
            one_line(key, 120)[:_MAX_KEY_CHARS], one_line(reason, _MAX_REASON_CHARS)
        )
        if len(self._found) < _MAX_OMISSIONS:
            self._found[omission] = None
        elif len(self._found) == _MAX_OMISSIONS:
            self._found[Omission("…", "there is more, which is not listed")] = None

    def all(self) -> tuple[Omission, ...]:
        return tuple(self._found)


def number(text: str, least: int, most: int) -> int | None:
    """Return a whole number in its range; None for anything else."""
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        return None
    value = int(text)
    return value if least <= value <= most else None


def is_mac(text: str) -> bool:
    """Tell whether a network card can have this address: not a multicast one, nor none."""
    return (
        bool(_MAC.fullmatch(text))
        and not int(text[:2], 16) & 1
        and int(text.replace(":", ""), 16) > 0
    )


def is_serial(text: str) -> bool:
    return bool(_SERIAL.fullmatch(text))


def is_uuid(text: str) -> bool:
    return bool(_UUID.fullmatch(text))


def limited(memory_bytes: int, cpus: int, limits: Limits, notes: Notes) -> tuple[int, int]:
    """Return memory and processors as the test gives them."""
    if memory_bytes < _LEAST_MEMORY_BYTES:
        notes.leave_out("memory", f"{human_bytes(memory_bytes)} is too little for any guest")
        memory_bytes = 512 << 20
    if memory_bytes > limits.memory_bytes:
        notes.leave_out(
            "memory",
            f"{human_bytes(memory_bytes)}: the test gives it {human_bytes(limits.memory_bytes)}",
        )
    if cpus > limits.cpus:
        notes.leave_out("cpus", f"{cpus}: the test gives it {limits.cpus}")
    return min(memory_bytes, limits.memory_bytes), min(cpus, limits.cpus)


def family(machine_type: str) -> Literal["pc", "q35"]:
    """Return `q35` or `pc`, of which a machine type is a version."""
    return "q35" if "q35" in machine_type else "pc"


def known_type(machine_type: str, known: Iterable[str]) -> tuple[str, str]:
    """Return the machine type to use, of those that this QEMU knows, and what is different (or empty)."""
    if machine_type in set(known):
        return machine_type, ""
    instead = family(machine_type)
    return instead, f"{machine_type} is not known to this QEMU, which has {instead} instead"


class Sources:
    """The archive's devices, each of which is the content of one disk of the machine."""

    def __init__(self, names: Sequence[str]) -> None:
        self._free = dict.fromkeys(names)

    def take(self, candidates: Iterable[str]) -> str:
        """Return the first that is there, which no other disk gets any more; empty: none is."""
        for name in candidates:
            if name in self._free:
                del self._free[name]
                return name
        return ""

    def left(self) -> list[str]:
        return list(self._free)


def matched(sources: Sources, wanted: Mapping[str, Sequence[str]], notes: Notes) -> dict[str, str]:
    """Return by a disk's key the archive's device that is its content.

    `wanted`: the names that it may have there. A single disk without one gets the single device
    that is left over.
    """
    found = {key: sources.take(names) for key, names in wanted.items()}
    missing = [key for key, name in found.items() if not name]
    left = sources.left()
    if len(missing) == 1 and len(left) == 1:
        found[missing[0]] = sources.take(left)
        notes.leave_out(missing[0], f"taken to be {left[0]}, the archive's only other disk")
        return found
    for key in missing:
        notes.leave_out(key, "it is not in the archive")
    for name in left:
        notes.leave_out(name, "the configuration has no such disk")
    return {key: name for key, name in found.items() if name}
