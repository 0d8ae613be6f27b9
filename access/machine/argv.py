# SPDX-License-Identifier: Apache-2.0
"""QEMU's words for a machine that a configuration describes. Pure.

Names of nodes, exports and devices are ours, and each value is quoted: whatever a configuration
says, it cannot add an option.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmapipe.access.machine.spec import DeviceSpec, MachineSpec, NicSpec, PciPlace, Property

#: The nodes of the disks, and the exports behind them: `disk0`, `disk1`, …
DISK_NODE = "disk{}"
_AGENT = "org.qemu.guest_agent.0"
# Firmware's log, as SeaBIOS writes it.
_DEBUG_PORT = 0x402
# slirp's own network, where the guest's DHCP client gets .15.
_USUAL_GUEST = "10.0.2.15"
# An NBD server that is in this process is back within no time, or never.
_RECONNECT_S = 5


class Forward(NamedTuple):
    """A port of this host's 127.0.0.1 that is led to one of the guest's. `address`: empty: the guest's."""

    host_port: int
    guest_port: int
    address: str = ""


class Wiring(NamedTuple):
    """What a machine is connected to here: paths of sockets and files.

    `type`: the machine type that QEMU knows; an empty path: it has no such thing.
    """

    type: str
    accelerator: str
    disks_socket: str
    serial_socket: str
    firmware_log_socket: str
    agent_socket: str
    firmware_code: str = ""
    firmware_variables: str = ""
    is_secure: bool = False
    tpm_socket: str = ""
    incoming_socket: str = ""
    forwards: tuple[Forward, ...] = ()


def _quoted(value: str | int) -> str:
    return str(value).replace(",", ",,")


def _option(head: str, properties: Sequence[Property]) -> str:
    return ",".join([_quoted(head), *(f"{key}={_quoted(value)}" for key, value in properties)])


def _place(place: PciPlace | None) -> tuple[Property, ...]:
    if place is None:
        return ()
    words: tuple[Property, ...] = (
        ("bus", place.bus),
        ("addr", f"0x{place.slot:x}" + (f".0x{place.function:x}" if place.function else "")),
    )
    return (*words, ("multifunction", "on")) if place.is_multifunction else words


def qemu_words(spec: MachineSpec, wiring: Wiring) -> list[str]:
    """Return the words behind those that access.machine.process has in front of every machine."""
    words = _board(spec, wiring)
    devices = _Devices()
    for controller in spec.controllers:
        devices.add(controller, is_bus=True)
    devices.add(DeviceSpec("VGA", "vga", spec.vga_place))
    devices.add(spec.agent_port, is_bus=True)
    words += _ports(wiring)
    for index, disk in enumerate(spec.disks):
        node = DISK_NODE.format(index)
        words += _blockdev(
            {
                "driver": "nbd",
                "node-name": node,
                "export": node,
                "server": {"type": "unix", "path": wiring.disks_socket},
                "reconnect-delay": _RECONNECT_S,
                # All of it is thrown away at the end.
                "cache": {"direct": False, "no-flush": True},
            }
        )
        boot = (("bootindex", disk.boot_index),) if disk.boot_index is not None else ()
        # A damaged archive stops the machine, and is told; the guest would go on somehow.
        devices.add(disk.device, ("drive", node), *boot, ("rerror", "stop"), ("werror", "stop"))
    for index, nic in enumerate(spec.nics):
        forwards = wiring.forwards if not index else ()
        words += ["-netdev", _option("user", _network(f"lan{index}", nic, forwards))]
        devices.add(nic.device, ("netdev", f"lan{index}"), ("romfile", ""))
    if wiring.tpm_socket:
        words += ["-chardev", _option("socket", (("id", "tpmchar"), ("path", wiring.tpm_socket)))]
        words += ["-tpmdev", "emulator,id=tpm,chardev=tpmchar", "-device", "tpm-tis,tpmdev=tpm"]
    words += devices.words()
    port = f"virtserialport,bus={spec.agent_port.name}.0,chardev=agent,name={_AGENT}"
    words += ["-device", port, "-device", "pvpanic"]
    if wiring.incoming_socket:
        words += ["-incoming", f"unix:{wiring.incoming_socket}"]
    return [*words, "-S"]


class _Devices:
    """Puts devices in order: buses before what is on them, and whoever has a place before the others.

    QEMU would give that place away.
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, str]] = []

    def add(self, device: DeviceSpec, *more: Property, is_bus: bool = False) -> None:
        words = (("id", device.name), *_place(device.place), *device.properties, *more)
        rank = (0 if device.place else 2) + (not is_bus)
        self._found.append((rank, _option(device.driver, words)))

    def words(self) -> list[str]:
        in_order = sorted(self._found, key=lambda found: found[0])
        return [word for _, option in in_order for word in ("-device", option)]


def _board(spec: MachineSpec, wiring: Wiring) -> list[str]:
    """The machine without its devices."""
    machine: list[Property] = [("acpi", "on" if spec.has_acpi else "off"), ("usb", "off")]
    words: list[str] = []
    if wiring.firmware_code:
        code = {"driver": "file", "filename": wiring.firmware_code}
        variables = {"driver": "file", "filename": wiring.firmware_variables}
        words += _blockdev(
            {"driver": "raw", "node-name": "fwcode", "read-only": True, "file": code}
        )
        words += _blockdev({"driver": "raw", "node-name": "fwvars", "file": variables})
        machine += [("pflash0", "fwcode"), ("pflash1", "fwvars")]
    if wiring.is_secure:
        machine.append(("smm", "on"))
        words += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    words += ["-machine", _option(wiring.type, machine), "-accel", wiring.accelerator]
    words += ["-cpu", "host" if wiring.accelerator == "kvm" else "max"]
    words += ["-smp", str(spec.cpus), "-m", str(spec.memory_bytes >> 20)]
    if spec.uuid:
        words += ["-smbios", f"type=1,uuid={spec.uuid}"]
    words += ["-rtc", f"base={'localtime' if spec.has_local_time else 'utc'}"]
    words += ["-boot", "menu=off,strict=on"]
    # What ends a guest leaves its screen to be looked at.
    return [*words, "-action", "panic=pause,shutdown=pause,watchdog=none"]


def _blockdev(node: Mapping[str, object]) -> list[str]:
    return ["-blockdev", json.dumps(node)]


def _ports(wiring: Wiring) -> list[str]:
    """The guest's ways to say something. This process listens on two of them, so nothing is lost."""
    serial = (("id", "serial"), ("path", wiring.serial_socket))
    log = (("id", "fwlog"), ("path", wiring.firmware_log_socket))
    agent = (("id", "agent"), ("path", wiring.agent_socket), ("server", "on"), ("wait", "off"))
    return [
        *("-chardev", _option("socket", serial), "-serial", "chardev:serial"),
        *("-chardev", _option("socket", log)),
        *("-device", f"isa-debugcon,iobase={_DEBUG_PORT},chardev=fwlog"),
        *("-chardev", _option("socket", agent)),
    ]


def _network(name: str, nic: NicSpec, forwards: Sequence[Forward]) -> list[Property]:
    """A network that leads nowhere: the guest reaches neither host nor world."""
    words: list[Property] = [("id", name), ("restrict", "on"), ("ipv6", "off")]
    guest = _USUAL_GUEST
    wanted = next((forward.address for forward in forwards if forward.address), nic.address)
    network = network_of(wanted)
    if network is not None:
        guest = str(network.ip)
        words += [("net", str(network.network)), ("dhcpstart", guest)]
        taken = {network.ip}
        # slirp answers under these; the guest's own must not be one of them.
        for role in ("host", "dns"):
            free = next(address for address in network.network.hosts() if address not in taken)
            taken.add(free)
            words.append((role, str(free)))
    for forward in forwards:
        rule = f"tcp:127.0.0.1:{forward.host_port}-{guest}:{forward.guest_port}"
        words.append(("hostfwd", rule))
    return words


def network_of(address: str) -> ipaddress.IPv4Interface | None:
    """`192.168.1.5/24`; None for anything in which a guest and a gateway have no room."""
    try:
        found = ipaddress.IPv4Interface(address)
    except ValueError:
        return None
    has_room = (
        8 <= found.network.prefixlen <= 28 and not found.is_loopback and not found.is_multicast
    )
    is_host = found.ip not in (found.network.network_address, found.network.broadcast_address)
    return found if has_room and is_host and "/" in address else None
