# SPDX-License-Identifier: Apache-2.0
"""A machine's description out of a domain's XML, as libvirt keeps it (`virsh dumpxml`). Pure.

libvirt writes each device's PCI address into it, and calls buses `pci.N` after their controllers'
index, so a guest finds its network card under the name that it had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vmapipe.access.machine.domain_xml import Element
from vmapipe.access.machine.libvirt_addresses import (
    DriveAddress,
    PciAddresses,
    drive_address,
)
from vmapipe.access.machine.libvirt_parts import (
    ELSEWHERE,
    chosen_disks,
    domain_of,
    firmware_of,
    matched_disks,
    tpm_of,
)
from vmapipe.access.machine.spec import (
    DeviceSpec,
    DiskSpec,
    FirmwareSpec,
    Limits,
    MachineConfigError,
    MachineSpec,
    NicSpec,
    Notes,
    PciPlace,
    Property,
    TpmSpec,
    is_mac,
    is_serial,
    is_uuid,
    limited,
    number,
)

_UNITS = {
    "b": 1,
    "bytes": 1,
    "KB": 1000,
    "k": 1 << 10,
    "KiB": 1 << 10,
    "MB": 10**6,
    "M": 1 << 20,
    "MiB": 1 << 20,
    "GB": 10**9,
    "G": 1 << 30,
    "GiB": 1 << 30,
    "TB": 10**12,
    "T": 1 << 40,
    "TiB": 1 << 40,
}
_ARCHES = ("", "x86_64", "i686")
_TYPE = re.compile(r"(?:pc|q35|pc-(?:i440fx|q35)-[a-z0-9.-]{1,24})")
_SCSI_MODELS = {
    "": "lsi53c895a",
    "auto": "lsi53c895a",
    "lsilogic": "lsi53c895a",
    "lsisas1068": "mptsas1068",
    "lsisas1078": "megasas",
    "vmpvscsi": "pvscsi",
    "buslogic": "",
    "virtio-scsi": "virtio-scsi-pci",
    "virtio-transitional": "virtio-scsi-pci-transitional",
    "virtio-non-transitional": "virtio-scsi-pci-non-transitional",
}
_CARDS = {
    "virtio": "virtio-net-pci",
    "virtio-transitional": "virtio-net-pci-transitional",
    "virtio-non-transitional": "virtio-net-pci-non-transitional",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "rtl8139",
    "vmxnet3": "vmxnet3",
    "pcnet": "pcnet",
    "ne2k_pci": "ne2k_pci",
    "i82551": "i82551",
    "i82557b": "i82557b",
    "i82559er": "i82559er",
}
_NEVER = "it runs words of its own choice on the host: a restore test never does that"
_WITHOUT = "the machine of the test does without"
# Elements of <devices> that are not silently the test's own.
_REASONS = {
    "hostdev": ELSEWHERE,
    "redirdev": ELSEWHERE,
    "filesystem": ELSEWHERE,
    "shmem": ELSEWHERE,
    "smartcard": ELSEWHERE,
    "lease": ELSEWHERE,
    "parallel": ELSEWHERE,
    "vsock": ELSEWHERE,
    "crypto": _WITHOUT,
    "memory": "memory that is plugged in, of which the test has none",
    "sound": _WITHOUT,
    "audio": _WITHOUT,
    "rng": _WITHOUT,
    "iommu": _WITHOUT,
    "watchdog": "it would restart the machine in the middle of the test",
}
_UNNOTICED = {
    "emulator", "disk", "controller", "interface", "serial", "console", "channel", "input",
    "graphics", "video", "memballoon", "panic", "tpm", "hub", "nvram", "pstore",
}  # fmt: skip
# Of <domain>, beside <devices>.
_DONE = {
    "name", "uuid", "title", "description", "metadata", "memory", "currentMemory", "maxMemory",
    "vcpu", "vcpus", "os", "features", "clock", "on_poweroff", "on_reboot", "on_crash", "pm",
    "devices", "cpu", "iothreads", "iothreadids", "cputune", "blkiotune", "memtune", "resource",
    "seclabel", "genid", "numatune", "perf", "memoryBacking", "on_lockfailure", "defaultiothread",
}  # fmt: skip


def looks_like_libvirt(raw: bytes) -> bool:
    """Tell whether these bytes may be a domain's XML; parsing says whether they are."""
    start = raw[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith(b"<") and b"<domain" in raw[:65536]


def machine_of_libvirt(raw: bytes, devices: Sequence[str], limits: Limits) -> MachineSpec:
    """Return the machine. `devices`: the archive's, but for its memory. Raises MachineConfigError."""
    return _LibvirtReader(domain_of(raw), devices, limits).machine()


class _LibvirtReader:
    """One domain on its way to a machine."""

    def __init__(self, domain: Element, devices: Sequence[str], limits: Limits) -> None:
        self._domain = domain
        self._devices = domain.find("devices")
        self._names = devices
        self._limits = limits
        self._notes = Notes()
        self._is_q35 = False
        self._controllers: dict[str, DeviceSpec] = {}
        self._pci = PciAddresses(self._notes, self._controllers, is_q35=False)

    def machine(self) -> MachineSpec:
        domain, notes = self._domain, self._notes
        kind = domain.find("os/type")
        if domain.get("type") not in ("", "kvm", "qemu", "hvf") or kind.text.strip() not in (
            "",
            "hvm",
        ):
            raise MachineConfigError(
                f"a domain of type {domain.get('type')[:40]!r} cannot be booted by QEMU"
            )
        if kind.get("arch") not in _ARCHES:
            raise MachineConfigError(
                f"the machine is not of this kind of processor (arch: {kind.get('arch')[:40]}): only "
                "x86_64 machines can be booted here"
            )
        machine = self._type(kind.get("machine", "pc"))
        self._is_q35 = "q35" in machine
        memory_bytes, cpus = limited(self._memory(), self._cpus(), self._limits, notes)
        self._pci = PciAddresses(notes, self._controllers, is_q35=self._is_q35)
        self._pci.add_bridges(self._devices.all("controller"))
        firmware = firmware_of(domain, self._names, notes)
        tpm = tpm_of(self._devices, self._names, notes)
        disks = self._disks(firmware, tpm)
        nics = tuple(self._nics())
        agent_port, agent_expected = self._agent()
        uuid = domain.find("uuid").text.strip().lower()
        if uuid and not is_uuid(uuid):
            notes.leave_out("uuid", "not a valid one")
            uuid = ""
        features = domain.find("features")
        has_acpi = features.has("acpi") or not features.children or firmware.kind == "uefi"
        self._name_the_rest()
        return MachineSpec(
            type=machine,
            memory_bytes=memory_bytes,
            cpus=cpus,
            firmware=firmware,
            controllers=tuple(self._controllers.values()),
            disks=disks,
            nics=nics,
            vga_place=self._vga_place(),
            agent_port=agent_port,
            agent_expected=agent_expected,
            tpm=tpm,
            uuid=uuid,
            has_acpi=has_acpi,
            has_local_time=domain.find("clock").get("offset") == "localtime",
            can_use_kvm=True,
            omissions=notes.all(),
        )

    def _type(self, text: str) -> str:
        if _TYPE.fullmatch(text):
            return text
        self._notes.leave_out("os/type", f"not a known machine: {text}")
        return "q35" if "q35" in text else "pc"

    def _memory(self) -> int:
        element = self._domain.find("memory")
        unit = _UNITS.get(element.get("unit", "KiB"), 0)
        count = number(element.text.strip(), 1, 1 << 50)
        if not unit or count is None:
            self._notes.leave_out("memory", "its size is not a valid one")
            return 512 << 20
        # Whole MiB, as QEMU takes it.
        return -(-count * unit >> 20) << 20

    def _cpus(self) -> int:
        element = self._domain.find("vcpu")
        found = number(element.get("current") or element.text.strip() or "1", 1, 4096)
        if found is None:
            self._notes.leave_out("vcpu", "its number is not a valid one")
        return found or 1

    # --- Firmware, TPM, agent ---

    def _vga_place(self) -> PciPlace | None:
        for video in self._devices.all("video"):
            return self._pci.place(video, "video")
        return None

    def _agent(self) -> tuple[DeviceSpec, bool]:
        expected = any(
            channel.find("target").get("name") == "org.qemu.guest_agent.0"
            for channel in self._devices.all("channel")
        )
        for controller in self._devices.all("controller"):
            if controller.get("type") == "virtio-serial" and controller.get("index") == "0":
                place = self._pci.place(controller, "virtio-serial")
                return DeviceSpec("virtio-serial-pci", "qga0", place), expected
        return DeviceSpec("virtio-serial-pci", "qga0"), expected

    # --- Disks ---

    def _disks(self, firmware: FirmwareSpec, tpm: TpmSpec | None) -> tuple[DiskSpec, ...]:
        elements = chosen_disks(self._devices, self._notes)
        taken = {firmware.variables, tpm.state if tpm else ""}
        found = matched_disks(elements, self._names, taken, self._notes)
        if not found:
            raise MachineConfigError(
                "the configuration has no disk that is in the archive: nothing can boot"
            )
        order = self._boot_order(elements, found)
        made = []
        for key, source in found.items():
            device = self._disk_device(elements[key], key)
            if device is not None:
                made.append(DiskSpec(key, source, device, order.get(key)))
        if not made:
            raise MachineConfigError("the machine of the test can have none of its disks")
        return tuple(made)

    def _boot_order(self, elements: dict[str, Element], found: dict[str, str]) -> dict[str, int]:
        ranks = {key: number(e.find("boot").get("order"), 1, 999) for key, e in elements.items()}
        ranked = {key: rank for key, rank in ranks.items() if rank is not None}
        for key in ranked:
            if key not in found:
                self._notes.leave_out(
                    "boot", f"{key} is in the boot order, and not in this machine"
                )
        chosen = sorted((key for key in found if key in ranked), key=lambda key: (ranked[key], key))
        if not chosen:
            chosen = list(found)[:1]  # <boot dev="hd"/>
        return {key: index for index, key in enumerate(chosen, 1)}

    def _disk_device(self, disk: Element, key: str) -> DeviceSpec | None:
        bus = disk.find("target").get("bus")
        marks = self._marks(disk, key)
        name = f"disk-{key}"
        if bus == "virtio":
            return DeviceSpec("virtio-blk-pci", name, self._pci.place(disk, key), marks)
        if bus == "usb":
            self._controllers["xhci"] = DeviceSpec("qemu-xhci", "xhci")
            return DeviceSpec("usb-storage", name, None, (("bus", "xhci.0"), *marks))
        drive = drive_address(disk, key)
        places = None
        if drive is not None and bus == "scsi":
            places = self._scsi_place(drive)
        elif drive is not None and bus == "ide":
            places = self._ide_place(drive)
        elif drive is not None:
            places = self._sata_place(drive)
        if places is None:
            self._notes.leave_out(key, f"its place on a {bus} bus, which this machine has not")
            return None
        return DeviceSpec("scsi-hd" if bus == "scsi" else "ide-hd", name, None, (*places, *marks))

    def _marks(self, disk: Element, key: str) -> tuple[Property, ...]:
        """What a guest knows a disk by."""
        marks: list[Property] = []
        if serial := disk.find("serial").text.strip():
            if is_serial(serial):
                marks.append(("serial", serial))
            else:
                self._notes.leave_out(key, "its serial number, which is not a plain one")
        if wwn := disk.find("wwn").text.strip():
            if re.fullmatch(r"[0-9a-fA-F]{16}", wwn) and disk.find("target").get("bus") == "scsi":
                marks.append(("wwn", f"0x{wwn}"))
            else:
                self._notes.leave_out(key, "its wwn, which is not a valid one")
        return tuple(marks)

    def _ide_place(self, drive: DriveAddress) -> tuple[Property, ...] | None:
        if self._is_q35 or drive.controller or drive.unit > 1:
            return None
        return (("bus", f"ide.{drive.channel}"), ("unit", drive.unit))

    def _sata_place(self, drive: DriveAddress) -> tuple[Property, ...] | None:
        if drive.unit > 5:
            return None
        if self._is_q35 and not drive.controller:
            return (("bus", f"ide.{drive.unit}"),)
        name = f"sata{drive.controller}"
        self._controllers[name] = DeviceSpec(
            "ahci", name, self._controller_place("sata", drive.controller)
        )
        return (("bus", f"{name}.{drive.unit}"),)

    def _controller(self, kind: str, index: int) -> Element:
        for controller in self._devices.all("controller"):
            if controller.get("type") == kind and controller.get("index") == str(index):
                return controller
        return Element("", {})

    def _controller_place(self, kind: str, index: int) -> PciPlace | None:
        name = f"{kind}{index}"
        if name in self._controllers:
            return self._controllers[name].place
        return self._pci.place(self._controller(kind, index), name)

    def _scsi_place(self, drive: DriveAddress) -> tuple[Property, ...] | None:
        model = self._controller("scsi", drive.controller).get("model")
        driver = _SCSI_MODELS.get(model, "")
        if not driver:
            return None
        name = f"scsi{drive.controller}"
        place = self._controller_place("scsi", drive.controller)
        self._controllers[name] = DeviceSpec(driver, name, place)
        known_as = ("device_id", f"drive-{name}-{drive.channel}-{drive.target}-{drive.unit}")
        if driver in ("lsi53c895a", "mptsas1068", "pvscsi"):
            number_ = drive.unit if driver == "lsi53c895a" else drive.target
            return (("bus", f"{name}.0"), ("scsi-id", number_), known_as)
        unit: Property = ("lun", drive.unit)
        return (("bus", f"{name}.0"), ("channel", 0), ("scsi-id", drive.target), unit, known_as)

    # --- Network, the rest ---

    def _nics(self) -> Iterator[NicSpec]:
        for index, interface in enumerate(self._devices.all("interface")):
            key, model = f"interface{index}", interface.find("model").get("type", "rtl8139")
            mac = interface.find("mac").get("address")
            if index >= 32 or interface.get("type") == "hostdev":
                self._notes.leave_out(key, ELSEWHERE)
            elif model not in _CARDS:
                self._notes.leave_out(key, f"not a known kind of card: {model}")
            elif mac and not is_mac(mac):
                self._notes.leave_out(key, "its address is not a valid one")
            else:
                marks: tuple[Property, ...] = (("mac", mac.upper()),) if mac else ()
                device = DeviceSpec(
                    _CARDS[model], f"net{index}", self._pci.place(interface, key), marks
                )
                yield NicSpec(key, device, "")

    def _name_the_rest(self) -> None:
        notes = self._notes
        for child in self._domain.children:
            # expat gives prefixes as they are: qemu:commandline, qemu:override.
            if child.tag.rpartition(":")[2] in (
                "commandline",
                "override",
                "deprecation",
                "capabilities",
            ):
                notes.leave_out(child.tag, _NEVER)
            elif child.tag == "idmap" or child.tag not in _DONE:
                notes.leave_out(child.tag, "not a part that this program knows")
        if self._domain.has("cpu"):
            notes.leave_out("cpu", "it has the host's, or the emulator's")
        serials = 0
        for child in self._devices.children:
            serials += child.tag == "serial"
            reason = _REASONS.get(child.tag, "")
            if reason or child.tag not in _UNNOTICED:
                notes.leave_out(child.tag, reason or "not a device that this program knows")
        if serials > 1:
            notes.leave_out("serial", "the test has one serial port, its own")
        for video in self._devices.all("video"):
            model = video.find("model").get("type")
            if model not in ("vga", "none", "bochs", ""):
                notes.leave_out("video", f"{model}: it has a standard one")
