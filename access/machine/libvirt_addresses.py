# SPDX-License-Identifier: Apache-2.0
"""Addresses in a domain's XML: PCI places and bridges, and those of disks on controllers. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from vmapipe.access.machine.domain_xml import Element
from vmapipe.access.machine.spec import DeviceSpec, Notes, PciPlace, Property, number

_BRIDGES = {
    "pcie-root-port": "pcie-root-port",
    "pci-bridge": "pci-bridge",
    "pcie-to-pci-bridge": "pcie-pci-bridge",
    "dmi-to-pci-bridge": "i82801b11-bridge",
    "pcie-switch-upstream-port": "x3130-upstream",
    "pcie-switch-downstream-port": "xio3130-downstream",
}


class PciAddresses:
    """Gives devices the places that their elements name, each place once; adds the bridges before."""

    def __init__(self, notes: Notes, controllers: dict[str, DeviceSpec], *, is_q35: bool) -> None:
        """`controllers`: where bridges are added, by QEMU's id."""
        self._notes = notes
        self._controllers = controllers
        self._is_q35 = is_q35
        self._used: set[tuple[str, int, int]] = set()

    def add_bridges(self, controllers: Iterable[Element]) -> None:
        """Add those of the domain's controllers that are PCI bridges."""
        pending = [c for c in controllers if c.get("type") == "pci"]
        # A bridge's own bus has to be there first; they are few, and each round finds some.
        known = {"pcie.0"} if self._is_q35 else {"pci.0"}
        while pending:
            ready = [c for c in pending if self._bus_of(c) in known or c.get("index") == "0"]
            if not ready:
                break
            pending = [c for c in pending if c not in ready]
            for controller in ready:
                name = self._bridge(controller)
                if name:
                    known.add(name)
        for controller in pending:
            name = f"pci.{controller.get('index')}"
            self._notes.leave_out(name, "the bridge that it is behind is not there")

    def _bus_of(self, element: Element) -> str:
        """Return the name of the PCI bus that an element's address names; empty: none."""
        address = element.find("address")
        if address.get("type") != "pci":
            return ""
        bus = _hex(address.get("bus", "0"), 255)
        if bus is None or _hex(address.get("domain", "0"), 0) is None:
            return ""
        return ("pcie.0" if self._is_q35 else "pci.0") if bus == 0 else f"pci.{bus}"

    def _bridge(self, controller: Element) -> str:
        """Add a bridge; its name, empty: it is not one that we know."""
        index = number(controller.get("index"), 0, 255)
        model = controller.get("model")
        if index is None:
            self._notes.leave_out("controller", "a PCI controller without a valid number")
            return ""
        if index == 0 or model in ("pci-root", "pcie-root"):
            return ""
        driver, name = _BRIDGES.get(model, ""), f"pci.{index}"
        place = self.place(controller, name)
        if not driver or place is None:
            self._notes.leave_out(
                name, f"a PCI controller of the kind {model or 'that is not named'}"
            )
            return ""
        marks: list[Property] = []
        target = controller.find("target")
        if driver in ("pcie-root-port", "xio3130-downstream"):
            chassis = _hex(target.get("chassis", str(index)), 255)
            port = _hex(target.get("port", "0"), 255)
            marks = [("chassis", chassis or index), ("port", port or 0)]
        elif driver == "pci-bridge":
            chassis = _hex(target.get("chassisNr", str(index)), 255)
            marks = [("chassis_nr", chassis or index)]
        self._controllers[name] = DeviceSpec(driver, name, place, tuple(marks))
        return name

    def place(self, element: Element, key: str) -> PciPlace | None:
        """Return where the element says that it is; None: nowhere, or where it cannot be."""
        bus = self._bus_of(element)
        if not bus:
            return None
        address = element.find("address")
        slot, function = _hex(address.get("slot", "0"), 31), _hex(address.get("function", "0"), 7)
        is_known = bus in self._controllers or bus == ("pcie.0" if self._is_q35 else "pci.0")
        if slot is None or function is None or not is_known or (bus, slot, function) in self._used:
            self._notes.leave_out(key, "its PCI address, where it cannot be")
            return None
        self._used.add((bus, slot, function))
        return PciPlace(bus, slot, function, address.get("multifunction") == "on")


def _hex(text: str, most: int) -> int | None:
    """`0x1c` or `28`; None for anything else."""
    match = re.fullmatch(r"0x([0-9a-fA-F]{1,4})|([0-9]{1,4})", text)
    if match is None:
        return None
    value = int(match[1], 16) if match[1] else int(match[2])
    return value if value <= most else None


class DriveAddress(NamedTuple):
    """A disk's place on a controller that is not PCI's own."""

    controller: int
    channel: int
    target: int
    unit: int


def drive_address(disk: Element, key: str) -> DriveAddress | None:
    """Return where a disk on a controller is; libvirt derives it from the name where there is none."""
    bus, address = disk.find("target").get("bus"), disk.find("address")
    index = disk_index(key)
    if address.get("type") != "drive":
        if bus == "ide":
            return DriveAddress(index // 4, index // 2 % 2, 0, index % 2)
        each = 7 if bus == "scsi" else 6
        return DriveAddress(index // each, 0, 0, index % each)
    controller = number(address.get("controller", "0"), 0, 30)
    channel = number(address.get("bus", "0"), 0, 1)
    target = number(address.get("target", "0"), 0, 255)
    unit = number(address.get("unit", "0"), 0, 255)
    if controller is None or channel is None or target is None or unit is None:
        return None
    return DriveAddress(controller, channel, target, unit)


def disk_index(key: str) -> int:
    """`sda` 0, `sdz` 25, `sdaa` 26."""
    letters = re.sub(r"^(?:hd|vd|sd|xvd|ubd|fd)", "", key)
    index = 0
    for letter in letters:
        index = index * 26 + ord(letter) - ord("a") + 1
    return index - 1
