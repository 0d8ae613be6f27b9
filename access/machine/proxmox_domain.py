# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's out of a configuration of Proxmox VE. Pure.

proxmox.py says what the machine is; this says it in libvirt's words, with each device at the PCI
place that it had, so that the guest's network cards keep their names. What has no counterpart is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from vmapipe.access.machine.domain import Draft, DraftCard, DraftDisk, checked
from vmapipe.access.machine.domain_rules import filtered
from vmapipe.access.machine.domain_xml import Element, made
from vmapipe.access.machine.proxmox import Purpose, machine_of_proxmox
from vmapipe.access.machine.proxmox_config import Words, is_on, parse_config, words_of
from vmapipe.access.machine.proxmox_parts import (
    cpu_of,
    hyperv_features,
    rng_of,
    sysinfo_of,
    video_of,
    watchdog_of,
)
from vmapipe.access.machine.spec import (
    DeviceSpec,
    DiskSpec,
    Limits,
    MachineSpec,
    NicSpec,
    Notes,
    PciPlace,
    number,
)

_FOR_DOMAIN = Purpose(
    re.compile(r"serial\d+|cpu|vga|rng0|watchdog|smbios1"),
    True,
    "it runs words of its own choice on the host: a restore never does that",
    "libvirt's domain does without",
)
# No machine is larger.
_NO_LIMITS = Limits(1 << 50, 4096)
# Keys that are of Proxmox VE, and not of the machine; of each its counterpart, if there is one.
_HOST_KEYS: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"onboot|autostart"), "virsh autostart NAME makes libvirt start it"),
    (re.compile(r"affinity|cpulimit|cpuunits|shares"), "virsh vcpupin and schedinfo set the like"),
    (re.compile(r"balloon"), "the least memory: virsh setmem changes what the machine has"),
    (re.compile(r"vcpus"), "processors to plug in: the machine has those that it started with"),
    (re.compile(r"vmgenid"), "the machine has another one, as a restored one needs"),
    (re.compile(r"hotplug|startup|protection|keyboard|tags|startdate|tdf|freeze|reboot"), ""),
    (re.compile(r"spice_enhancements|migrate_downtime|migrate_speed|template|lock"), ""),
    (re.compile(r"unused\d+"), "a volume that no device of the machine uses"),
)
_CONTROLLER_MODELS = {
    "virtio-scsi-pci": "virtio-scsi",
    "lsi53c895a": "lsilogic",
    "lsi53c810": "lsilogic",
    "megasas": "lsisas1078",
    "pvscsi": "vmpvscsi",
}
_BRIDGE_MODELS = {
    "pci-bridge": "pci-bridge",
    "pcie-root-port": "pcie-root-port",
    "i82801b11-bridge": "dmi-to-pci-bridge",
}
_CARD_MODELS = {"virtio-net-pci": "virtio"}
_LIBVIRT_CARDS = frozenset(
    {"virtio", "e1000", "e1000e", "rtl8139", "vmxnet3", "pcnet", "ne2k_pci", "i82551", "i82557b", "i82559er"}
)  # fmt: skip
_CACHES = ("none", "writethrough", "writeback", "directsync", "unsafe")
# Of a disk what is about the host, or about the archive; all else that is not mapped is named.
_DISK_WORDS = frozenset(
    [
        "file",
        "media",
        "size",
        "format",
        "cache",
        "discard",
        "aio",
        "iothread",
        "ro",
        "serial",
        "wwn",
        "ssd",
        "backup",
        "werror",
        "rerror",
        "detect_zeroes",
    ]
)
_NET_WORDS = frozenset(["model", "macaddr", "queues", "mtu", "bridge"])
_CD_BUSES = {"ide": "ide", "sata": "sata", "scsi": "scsi"}
_DISK_KEY = re.compile(r"(ide|sata|scsi)(\d{1,2})")


def draft_of_proxmox(text: str, names: Sequence[str]) -> Draft:
    """Return the draft. `names`: the archive's devices, but for its memory. Raises MachineConfigError."""
    spec = machine_of_proxmox(text, names, _NO_LIMITS, _FOR_DOMAIN)
    return _Converter(spec, parse_config(text), names).draft()


class _Converter:
    def __init__(self, spec: MachineSpec, config: Mapping[str, str], names: Sequence[str]) -> None:
        self._spec = spec
        self._config = config
        self._names = names
        self._notes = Notes()
        for omission in spec.omissions:
            self._notes.leave_out(*omission)
        # libvirt's number of each PCI bus, by QEMU's id; the root is 0.
        self._buses = {"pcie.0": 0} if spec.is_q35 else {"pci.0": 0}
        # libvirt's number of each controller, by QEMU's id.
        self._controllers: dict[str, int] = {}
        self._drive_names = {prefix: iter(_letters(prefix)) for prefix in ("vd", "sd", "hd")}
        self._iothreads = 0

    def draft(self) -> Draft:
        spec, notes = self._spec, self._notes
        controllers = [*self._bridges(), *self._usb(), *self._storage_controllers()]
        disks = [self._disk(disk) for disk in spec.disks]
        disks += self._drives()
        cards = [self._card(nic) for nic in spec.nics]
        devices = made("devices", *controllers, *self._devices())
        devices.children += [disk.element for disk in disks]
        devices.children += [card.element for card in cards]
        domain = made("domain", *self._board(), devices)
        self._name_the_rest()
        # The same gate as for a domain's XML, although nothing of this is a stranger's text.
        kept = filtered(domain, notes)
        elements = kept.find("devices")
        draft = Draft(
            kept,
            self._config.get("name", ""),
            spec.uuid,
            tuple(d._replace(element=e) for d, e in zip(disks, elements.all("disk"), strict=True)),
            tuple(
                c._replace(element=e) for c, e in zip(cards, elements.all("interface"), strict=True)
            ),
            spec.firmware,
            spec.tpm,
            True,
            (),
        )
        return checked(draft._replace(wants_kvm=spec.can_use_kvm), notes)

    # --- The board ---

    def _board(self) -> Iterator[Element]:
        spec, config = self._spec, self._config
        yield made("memory", unit="KiB", text=str(spec.memory_bytes >> 10))
        yield made("vcpu", text=str(spec.cpus))
        if self._iothreads:
            yield made("iothreads", text=str(self._iothreads))
        os_ = made("os", made("type", text="hvm", arch="x86_64", machine=spec.type))
        entries = [*sysinfo_of(config, spec.uuid, self._notes)]
        if entries:
            os_.children.append(made("smbios", mode="sysinfo"))
            yield made("sysinfo", made("system", *entries), type_="smbios")
        yield os_
        features = [made("acpi")] if spec.has_acpi else []
        is_windows = config.get("ostype", "").startswith("w")
        if is_windows and spec.can_use_kvm:
            features.append(hyperv_features())
        yield made("features", *features, made("apic"))
        yield cpu_of(config, spec, self._notes)
        clock = made("clock", offset="localtime" if spec.has_local_time else "utc")
        if is_windows:
            clock.children = [
                made("timer", name="rtc", tickpolicy="catchup"),
                made("timer", name="hpet", present="no"),
                made("timer", name="hypervclock", present="yes"),
            ]
        yield clock
        yield made("on_poweroff", text="destroy")
        yield made("on_reboot", text="destroy" if config.get("reboot") == "0" else "restart")

    # --- Buses and controllers ---

    def _bridges(self) -> Iterator[Element]:
        """PCI bridges in their order: one's bus is there before those on it."""
        kind = "pcie-root" if self._spec.is_q35 else "pci-root"
        yield made("controller", type_="pci", index="0", model=kind)
        for controller in self._spec.controllers:
            model = _BRIDGE_MODELS.get(controller.driver)
            if model is None or controller.place is None:
                continue
            index = len(self._buses)
            children = []
            if model == "pcie-root-port":
                marks = dict(controller.properties)
                target = made("target", chassis=str(marks["chassis"]), port=hex(int(marks["port"])))
                children.append(target)
            elif model == "pci-bridge":
                children.append(made("target", chassisNr=str(index)))
            children += self._address(controller.place)
            self._buses[controller.name] = index
            yield made("controller", *children, type_="pci", index=str(index), model=model)

    def _usb(self) -> Iterator[Element]:
        """The USB controllers of the board, for a tablet: libvirt's own would move the PCI buses."""
        if not self._spec.is_q35:
            place = made(
                "address", type_="pci", domain="0x0000", bus="0x00", slot="0x01", function="0x2"
            )
            yield made("controller", place, type_="usb", index="0", model="piix3-uhci")
            return
        for model, function, port in (
            ("ich9-uhci1", 0, "0"),
            ("ich9-uhci2", 1, "2"),
            ("ich9-uhci3", 2, "4"),
            ("ich9-ehci1", 7, ""),
        ):
            corner = PciPlace("pcie.0", 0x1D, function, is_multifunction=not function)
            children = [*self._address(corner)]
            if port:
                children.append(made("master", startport=port))
            yield made("controller", *children, type_="usb", index="0", model=model)

    def _storage_controllers(self) -> Iterator[Element]:
        counts = {"scsi": 0, "sata": 1 if self._spec.is_q35 else 0}
        for controller in self._spec.controllers:
            if controller.driver in _BRIDGE_MODELS:
                continue
            kind = "sata" if controller.driver == "ahci" else "scsi"
            index = counts[kind]
            counts[kind] += 1
            self._controllers[controller.name] = index
            children = [*self._address(controller.place)]
            element = made("controller", type_=kind, index=str(index))
            if kind == "scsi":
                model = _CONTROLLER_MODELS[controller.driver]
                element.attributes = {**element.attributes, "model": model}
                if controller.driver == "lsi53c810":
                    self._notes.leave_out("scsihw", "lsi53c810: it has an LSI 53C895A")
                disk = controller.name.removeprefix("virtioscsi")
                if disk != controller.name and self._has_thread(f"scsi{disk}"):
                    self._iothreads += 1
                    children.append(made("driver", iothread=str(self._iothreads)))
            element.children = children
            yield element
        agent = self._spec.agent_port
        yield made("controller", *self._address(agent.place), type_="virtio-serial", index="0")

    def _has_thread(self, key: str) -> bool:
        return is_on(words_of(self._config.get(key, ""), "file").options.get("iothread", "0"))

    def _address(self, place: PciPlace | None) -> Iterator[Element]:
        if place is None or place.bus not in self._buses:
            return
        address = made(
            "address",
            type_="pci",
            domain="0x0000",
            bus=f"0x{self._buses[place.bus]:02x}",
            slot=f"0x{place.slot:02x}",
            function=f"0x{place.function:x}",
        )
        if place.is_multifunction:
            address.attributes = {**address.attributes, "multifunction": "on"}
        yield address

    # --- Disks and drives ---

    def _disk(self, disk: DiskSpec) -> DraftDisk:
        words = words_of(self._config[disk.key], "file")
        bus, address = self._disk_place(disk.device)
        prefix = {"virtio": "vd", "ide": "hd"}.get(bus, "sd")
        name = next(self._drive_names[prefix])
        target = made("target", dev=name, bus=bus)
        children = [self._driver(disk.key, words, bus), target, *address]
        marks = dict(disk.device.properties)
        if "rotation_rate" in marks:
            target.attributes = {**target.attributes, "rotation_rate": "1"}
        if "serial" in marks:
            children.append(made("serial", text=str(marks["serial"])))
        if "wwn" in marks:
            children.append(made("wwn", text=str(marks["wwn"]).removeprefix("0x")))
        if is_on(words.options.get("ro", "0")) and bus in ("virtio", "scsi"):
            children.append(made("readonly"))
        if disk.boot_index is not None:
            children.append(made("boot", order=str(disk.boot_index)))
        return DraftDisk(name, disk.source, made("disk", *children, device="disk"))

    def _driver(self, key: str, words: Words, bus: str) -> Element:
        driver: dict[str, str] = {}
        cache = words.options.get("cache", "none")
        driver["cache"] = cache if cache in _CACHES else "none"
        if words.options.get("discard") == "on":
            driver["discard"] = "unmap"
        aio = words.options.get("aio", "")
        if aio in ("threads", "io_uring") or (
            aio == "native" and driver["cache"] in ("none", "directsync")
        ):
            driver["io"] = aio
        for word, name in (("werror", "error_policy"), ("rerror", "rerror_policy")):
            if word in words.options:
                driver[name] = words.options[word]
        if bus == "virtio" and self._has_thread(key):
            self._iothreads += 1
            driver["iothread"] = str(self._iothreads)
        others = sorted(set(words.options) - _DISK_WORDS)
        if others:
            self._notes.leave_out(key, f"its {', '.join(others)}")
        return made("driver", **driver)

    def _disk_place(self, device: DeviceSpec) -> tuple[str, list[Element]]:
        """Return the kind of bus that a disk is on, and its place there."""
        marks = dict(device.properties)
        if device.driver == "virtio-blk-pci":
            return "virtio", [*self._address(device.place)]
        head, _, tail = str(marks.get("bus", "")).partition(".")
        unit = int(marks.get("unit", 0))
        if device.driver == "scsi-hd":
            index = self._controllers[head]
            return "scsi", [self._drive(index, 0, *self._scsi_place(head, marks))]
        if head == "ide" and not self._spec.is_q35:
            return "ide", [self._drive(0, int(tail), 0, unit)]
        # The six places of q35's board are SATA's.
        return "sata", [self._drive(self._controllers.get(head, 0), 0, 0, int(tail))]

    def _scsi_place(self, name: str, marks: Mapping[str, str | int]) -> tuple[int, int]:
        controller = next(c for c in self._spec.controllers if c.name == name)
        if controller.driver.startswith("lsi"):
            return 0, int(marks["scsi-id"])
        return int(marks.get("scsi-id", 0)), int(marks.get("lun", 0))

    def _drive(self, controller: int, bus: int, target: int, unit: int) -> Element:
        return made(
            "address",
            type_="drive",
            controller=str(controller),
            bus=str(bus),
            target=str(target),
            unit=str(unit),
        )

    def _drives(self) -> Iterator[DraftDisk]:
        """CD drives; one of cloud-init's has its content, if the archive has."""
        orders = self._boot_orders()
        for key, value in self._config.items():
            match = _DISK_KEY.fullmatch(key)
            if not match or words_of(value, "file").options.get("media") != "cdrom":
                continue
            source = next((n for n in self._names if n in (f"drive-{key}", key)), "")
            is_empty = words_of(value, "file").first in ("", "none")
            if not source and not is_empty:
                self._notes.leave_out(key, "what is in the CD drive: it is empty")
            bus = _CD_BUSES[match[1]]
            address: list[Element] = []
            index = int(match[2])
            if bus == "ide" and self._spec.is_q35:
                unit = index // 2 + (2 if index % 2 else 0)
                bus, address = "sata", [self._drive(0, 0, 0, min(unit, 5))]
            elif bus == "ide":
                address = [self._drive(0, index // 2, 0, index % 2)]
            name = next(self._drive_names["hd" if bus == "ide" else "sd"])
            target = made("target", dev=name, bus=bus)
            children = [target, made("readonly"), *address]
            if key in orders:
                children.append(made("boot", order=str(orders[key])))
            yield DraftDisk(name, source, made("disk", *children, device="cdrom"))

    def _boot_orders(self) -> dict[str, int]:
        """By a drive's or a network card's key its place in the boot order, as the disks' is counted."""
        wanted = words_of(self._config.get("boot", "")).options.get("order", "").split(";")
        disks = {disk.key for disk in self._spec.disks}
        there = [k for k in dict.fromkeys(wanted) if k in disks or self._is_drive_or_net(k)]
        return {key: index for index, key in enumerate(there, 1) if key not in disks}

    def _is_drive_or_net(self, key: str) -> bool:
        is_drive = _DISK_KEY.fullmatch(key) and "media=cdrom" in self._config.get(key, "")
        return bool(is_drive) or (key in self._config and bool(re.fullmatch(r"net\d+", key)))

    # --- Network cards ---

    def _card(self, nic: NicSpec) -> DraftCard:
        words = words_of(self._config[nic.key], "model")
        model = _CARD_MODELS.get(nic.device.driver, nic.device.driver)
        if model.startswith("e1000-"):
            self._notes.leave_out(nic.key, f"{model}: its card is an e1000")
            model = "e1000"
        if model not in _LIBVIRT_CARDS:
            self._notes.leave_out(nic.key, f"{model}: its card is an rtl8139")
            model = "rtl8139"
        mac = dict(nic.device.properties).get("mac", "")
        children = [made("model", type_=model), *self._address(nic.device.place)]
        if mac:
            children.append(made("mac", address=str(mac).lower()))
        queues = number(words.options.get("queues", ""), 1, 64)
        if queues and model == "virtio":
            children.append(made("driver", queues=str(queues)))
        mtu = number(words.options.get("mtu", ""), 68, 65520)
        if mtu:
            children.append(made("mtu", size=str(mtu)))
        orders = self._boot_orders()
        if nic.key in orders:
            children.append(made("boot", order=str(orders[nic.key])))
        models = {words.first, next(iter(words.options), "")}
        others = sorted(set(words.options) - _NET_WORDS - models)
        if others:
            self._notes.leave_out(nic.key, f"its {', '.join(others)}")
        return DraftCard(nic.key, made("interface", *children), "")

    # --- The other devices ---

    def _devices(self) -> Iterator[Element]:
        config = self._config
        serials = sorted(k for k in config if re.fullmatch(r"serial[0-3]", k))
        for index, key in enumerate(serials):
            if config[key] != "socket":
                self._notes.leave_out(key, "a device of the host it ran on: it is a virtual one")
            yield made("serial", made("target", type_="isa-serial", port=str(index)))
        if serials:
            yield made("console", made("target", type_="serial", port="0"))
        if self._spec.agent_expected:
            target = made("target", type_="virtio", name="org.qemu.guest_agent.0")
            yield made("channel", target)
        if config.get("tablet", "1") != "0":
            yield made("input", type_="tablet", bus="usb")
        yield from video_of(config, [*self._address(self._spec.vga_place)], self._notes)
        if "rng0" in config:
            yield rng_of(config, [*self._address(PciPlace("pci.1", 29))], self._notes)
        yield from watchdog_of(config, [*self._address(PciPlace("pci.0", 4))], self._notes)
        if self._spec.tpm is not None:
            yield made("tpm", model="tpm-tis")
        if config.get("balloon") == "0":
            yield made("memballoon", model="none")
        else:
            place = PciPlace("pci.0", 3)
            yield made("memballoon", *self._address(place), model="virtio")

    def _name_the_rest(self) -> None:
        for key in self._config:
            for known, way in _HOST_KEYS:
                if known.fullmatch(key):
                    self._notes.leave_out(key, way or "Proxmox VE's own: libvirt has no such thing")


def _letters(prefix: str) -> Iterator[str]:
    """`sda` … `sdz`, `sdaa` …"""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for first in ("", *alphabet):
        for last in alphabet:
            yield f"{prefix}{first}{last}"
