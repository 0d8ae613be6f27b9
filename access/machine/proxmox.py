# SPDX-License-Identifier: Apache-2.0
"""A machine's description out of a configuration of Proxmox VE (`qemu-server.conf`). Pure.

PCI places are those of qemu-server (PVE/QemuServer/PCI.pm, pve-q35-4.0.cfg): a Linux guest calls its
network card after its place (`ens18`, on q35 `enp6s18`), and has no network when that is another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.access.machine.proxmox_config import Words, is_on, parse_config, words_of
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
    Sources,
    TpmSpec,
    is_mac,
    is_serial,
    is_uuid,
    limited,
    matched,
    number,
)

_DISK = re.compile(r"(ide|sata|scsi|virtio)(0|[1-9]\d?)")
_NET = re.compile(r"net(0|[1-9]\d?)")
_MOST_DISKS = {"ide": 4, "sata": 6, "scsi": 31, "virtio": 16}
_MOST_NETS = 32
# In this order Proxmox VE looks for a disk to boot from where nothing says which.
_BOOT_ORDER = ("ide", "scsi", "virtio", "sata")
_ARCHES = ("", "x86_64", "i386", "i686")
_TYPE = re.compile(r"(?:pc|q35|pc-(?:i440fx|q35)-\d{1,2}\.\d{1,2}(?:\.\d{1,2})?)")
_CONTROLLERS = {
    "virtio-scsi-pci": "virtio-scsi-pci",
    "virtio-scsi-single": "virtio-scsi-pci",
    "lsi": "lsi53c895a",
    "lsi53c810": "lsi53c810",
    "megasas": "megasas",
    "pvscsi": "pvscsi",
}
_CARDS = {
    "virtio": "virtio-net-pci",
    "e1000": "e1000",
    "e1000-82540em": "e1000-82540em",
    "e1000-82544gc": "e1000-82544gc",
    "e1000-82545em": "e1000-82545em",
    "e1000e": "e1000e",
    "i82551": "i82551",
    "i82557b": "i82557b",
    "i82559er": "i82559er",
    "ne2k_pci": "ne2k_pci",
    "pcnet": "pcnet",
    "rtl8139": "rtl8139",
    "vmxnet3": "vmxnet3",
}

# What a guest does not notice, or what only Proxmox VE itself uses.
_UNNOTICED = re.compile(
    r"affinity|autostart|balloon|bootdisk|cicustom|cipassword|citype|ciupgrade|ciuser|cpulimit|cpuunits|"
    r"description|digest|freeze|hotplug|keyboard|lock|meta|migrate_downtime|migrate_speed|name|"
    r"nameserver|onboot|parent|protection|reboot|running(?:cpu|machine|-nets-host-mtu)|searchdomain|"
    r"shares|snaptime|spice_enhancements|sshkeys|startdate|startup|tablet|tags|tdf|template|"
    r"unused\d+|vmgenid|vmstate|vmstatestorage|ipconfig\d+|cdrom|smp|vcpus"
)
_DONE = re.compile(
    r"acpi|agent|arch|bios|boot|cores|cpu|efidisk0|kvm|localtime|machine|memory|ostype|scsihw|smbios1|"
    r"sockets|tpmstate0|vga|(?:ide|sata|scsi|virtio|net)\d+"
)
_HOST_WORDS = re.compile(r"args|hookscript")
_REASONS: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"hostpci\d+|usb\d+|parallel\d+"), "a device of the host it ran on"),
    (re.compile(r"serial\d+"), "the test has one serial port, its own"),
    (re.compile(r"virtiofs\d+"), "a folder of the host it ran on"),
    (re.compile(r"watchdog"), "it would restart the machine in the middle of the test"),
)
_WITHOUT = re.compile(
    r"audio\d+|rng0|ivshmem|numa\d*|hugepages|keephugepages|amd[-_]sev|intel[-_]tdx|allow-ksm"
)


class Purpose(NamedTuple):
    """What a machine is made for. `never`, `without`: why words of the host's, and extras, are left out.

    `kept`: keys of which the caller makes something itself; `has_drives`: CD drives and a boot from
    the network, too.
    """

    kept: re.Pattern[str]
    has_drives: bool
    never: str
    without: str


FOR_TEST = Purpose(
    re.compile(r"serial0"),
    False,
    "it runs words of its own choice on the host: a restore test never does that",
    "the machine of the test does without",
)

#: A network card's place, say `net0`; the same of disks and controllers. On `pc` pci.0 is the root,
#: on q35 a bridge behind others.
_SLOTS: Mapping[str, tuple[str, int]] = {
    "balloon0": ("pci.0", 3),
    "scsihw0": ("pci.0", 5),
    "scsihw1": ("pci.0", 6),
    "ahci0": ("pci.0", 7),
    "qga0": ("pci.0", 8),
    **{f"virtio{n}": ("pci.0", 10 + n) for n in range(6)},
    **{f"virtio{n}": ("pci.2", n - 5) for n in range(6, 16)},
    **{f"net{n}": ("pci.0", 18 + n) for n in range(6)},
    **{f"net{n}": ("pci.1", n - 5) for n in range(6, 32)},
    **{f"virtioscsi{n}": ("pci.3", n + 1) for n in range(31)},
    "scsihw2": ("pci.4", 1),
    "scsihw3": ("pci.4", 2),
    "scsihw4": ("pci.4", 3),
}


def _place(name: str) -> PciPlace:
    return PciPlace(*_SLOTS[name])


def config_without_one(devices: Sequence[str]) -> str:
    """Return a configuration for an archive that has none: its disks, and what any guest boots with."""
    lines = ["memory: 1024", "cores: 1", "scsihw: virtio-scsi-pci"]
    taken = [name for name in devices if _DISK.fullmatch(name.removeprefix("drive-"))]
    lines += [f"{name.removeprefix('drive-')}: {name}" for name in taken]
    keys = {name.removeprefix("drive-") for name in taken}
    free = (f"virtio{n}" for n in range(16) if f"virtio{n}" not in keys)
    for name in devices:
        if name == "drive-efidisk0":
            lines += ["bios: ovmf", "efidisk0: x,efitype=4m"]
        elif name not in taken and not name.startswith("drive-tpmstate"):
            key = next(free, "")
            if key:
                lines.append(f"{key}: {name}")
    return "\n".join(lines)


def machine_of_proxmox(
    text: str, devices: Sequence[str], limits: Limits, purpose: Purpose = FOR_TEST
) -> MachineSpec:
    """Return the machine. `devices`: the archive's, but for its memory. Raises MachineConfigError."""
    return _ProxmoxReader(parse_config(text), devices, limits, purpose).machine()


class _ProxmoxReader:
    """One configuration on its way to a machine."""

    def __init__(
        self,
        config: Mapping[str, str],
        devices: Sequence[str],
        limits: Limits,
        purpose: Purpose,
    ) -> None:
        self._purpose = purpose
        self._config = config
        self._devices = devices
        self._limits = limits
        self._notes = Notes()
        self._controllers: dict[str, DeviceSpec] = {}
        self._is_q35 = "q35" in config.get("machine", "")

    def machine(self) -> MachineSpec:
        config, notes = self._config, self._notes
        if config.get("arch", "") not in _ARCHES:
            raise MachineConfigError(
                f"the machine is not of this kind of processor (arch: {config['arch'][:40]}): only "
                "x86_64 machines can be booted here"
            )
        kind = self._type()
        memory_bytes, cpus = limited(self._memory(), self._cpus(), self._limits, notes)
        self._bridges()
        firmware = self._firmware()
        tpm = self._tpm()
        disks = self._disks(firmware, tpm)
        agent = words_of(config.get("agent", "0"), "enabled")
        os_type = config.get("ostype", "")
        spec = MachineSpec(
            type=kind,
            memory_bytes=memory_bytes,
            cpus=cpus,
            firmware=firmware,
            controllers=(),
            disks=disks,
            nics=tuple(self._nics()),
            vga_place=PciPlace("pcie.0", 1) if self._is_q35 else PciPlace("pci.0", 2),
            agent_port=DeviceSpec("virtio-serial-pci", "qga0", _place("qga0")),
            agent_expected=is_on(agent.first),
            tpm=tpm,
            uuid=self._uuid(),
            has_acpi=config.get("acpi", "1") != "0",
            has_local_time=is_on(config.get("localtime", "1" if os_type[:1] == "w" else "0")),
            can_use_kvm=config.get("kvm", "1") != "0",
            omissions=(),
        )
        self._name_the_rest()
        if agent.options.get("type", "virtio") != "virtio":
            notes.leave_out("agent", "type=isa: its port is a virtio port here")
        # Asked for last: devices have brought some of them along.
        return spec._replace(controllers=tuple(self._controllers.values()), omissions=notes.all())

    def _number(self, key: str, default: int, most: int, value: str | None = None) -> int:
        text = self._config.get(key, str(default)) if value is None else value
        found = number(text, 1, most)
        if found is None:
            self._notes.leave_out(key, f"not a valid number: {text}")
            return default
        return found

    def _type(self) -> str:
        text = words_of(self._config.get("machine", "pc"), "type").first.partition("+")[0]
        if not _TYPE.fullmatch(text):
            if text:
                self._notes.leave_out("machine", f"not a known type: {text}")
            return "q35" if self._is_q35 else "pc"
        return text

    def _memory(self) -> int:
        words = words_of(self._config.get("memory", "512"), "current")
        return self._number("memory", 512, 1 << 24, words.first) << 20

    def _cpus(self) -> int:
        if "smp" in self._config and "cores" not in self._config:
            return self._number("smp", 1, 512)
        cpus = self._number("cores", 1, 512) * self._number("sockets", 1, 8)
        return min(cpus, self._number("vcpus", cpus, 4096))

    def _uuid(self) -> str:
        words = words_of(self._config.get("smbios1", ""))
        others = sorted(set(words.options) - {"uuid", "base64"})
        if others and not self._purpose.kept.fullmatch("smbios1"):
            self._notes.leave_out("smbios1", f"only its uuid is kept, not {', '.join(others)}")
        found = words.options.get("uuid", "").lower()
        if found and not is_uuid(found):
            self._notes.leave_out("smbios1", "its uuid is not valid")
            return ""
        return found

    # --- Firmware, TPM ---

    def _firmware(self) -> FirmwareSpec:
        if self._config.get("bios", "seabios") != "ovmf":
            if self._config.get("bios", "seabios") != "seabios":
                self._notes.leave_out("bios", f"not a known one: {self._config['bios']}")
            return FirmwareSpec()
        options = words_of(self._config.get("efidisk0", "")).options
        variables = next((d for d in self._devices if d in ("drive-efidisk0", "efidisk0")), "")
        if not variables:
            self._notes.leave_out(
                "efidisk0", "it is not in the archive: the firmware has new variables"
            )
        is_small = options.get("efitype", "2m") != "4m" and "efidisk0" in self._config
        is_secure = is_on(options.get("pre-enrolled-keys", "0"))
        return FirmwareSpec("uefi", is_secure, variables, is_small)

    def _tpm(self) -> TpmSpec | None:
        if "tpmstate0" not in self._config:
            return None
        options = words_of(self._config["tpmstate0"]).options
        names = ("drive-tpmstate0-backup", "drive-tpmstate0", "tpmstate0")
        state = next((d for d in self._devices if d in names), "")
        if not state:
            self._notes.leave_out(
                "tpmstate0", "it is not in the archive: the machine has a new TPM"
            )
        return TpmSpec("2.0" if options.get("version") == "v2.0" else "1.2", state)

    # --- Disks ---

    def _disks(self, firmware: FirmwareSpec, tpm: TpmSpec | None) -> tuple[DiskSpec, ...]:
        notes = self._notes
        other = {firmware.variables, tpm.state if tpm else ""}
        other |= {name for name in self._devices if name.startswith("drive-efidisk")}
        other |= {name for name in self._devices if name.startswith("drive-tpmstate")}
        wanted: dict[str, Sequence[str]] = {}
        for key in sorted(self._config, key=_disk_order):
            match = _DISK.fullmatch(key)
            if not match:
                continue
            words = words_of(self._config[key], "file")
            if int(match[2]) >= _MOST_DISKS[match[1]]:
                notes.leave_out(key, "there is no such place for a disk")
            elif words.options.get("media") == "cdrom" and self._purpose.has_drives:
                other.add(f"drive-{key}")
            elif words.options.get("media") == "cdrom" and f"drive-{key}" not in self._devices:
                notes.leave_out(key, "a CD drive")
            elif words.options.get("media") == "cdrom":
                # The archive has what was in it; a drive that is a disk boots nothing else.
                notes.leave_out(key, "a CD drive, although the archive has what is in it")
                other.add(f"drive-{key}")
            else:
                wanted[key] = (f"drive-{key}", key, words.first)
        sources = Sources([name for name in self._devices if name not in other])
        found = matched(sources, wanted, notes)
        if not found:
            raise MachineConfigError(
                "the configuration has no disk that is in the archive: nothing can boot"
            )
        order = self._boot_order(found)
        return tuple(
            DiskSpec(key, source, self._disk_device(key), order.get(key))
            for key, source in found.items()
        )

    def _boot_order(self, found: Mapping[str, str]) -> dict[str, int]:
        """Return by disk its index, from 1 on."""
        words = words_of(self._config.get("boot", ""))
        wanted = [key for key in words.options.get("order", "").split(";") if key]
        if not wanted and "bootdisk" in self._config:
            wanted = [self._config["bootdisk"]]
        chosen = [key for key in dict.fromkeys(wanted) if self._can_boot(key, found)]
        for key in wanted:
            if key not in chosen and _NET.fullmatch(key):
                self._notes.leave_out("boot", f"{key}: it does not boot from the network")
            elif key not in chosen:
                self._notes.leave_out("boot", f"{key} is not in this machine")
        if not chosen:
            chosen = sorted(found, key=_boot_rank)[:1]
        return {key: index for index, key in enumerate(chosen, 1)}

    def _can_boot(self, key: str, found: Mapping[str, str]) -> bool:
        is_drive = "media=cdrom" in self._config.get(key, "") and bool(_DISK.fullmatch(key))
        is_other = self._purpose.has_drives and (is_drive or _NET.fullmatch(key) is not None)
        return key in found or (is_other and key in self._config)

    def _disk_device(self, key: str) -> DeviceSpec:
        match = _DISK.fullmatch(key)
        if match is None:
            raise MachineConfigError(f"not a disk's key: {key}")
        kind, index = match[1], int(match[2])
        words = words_of(self._config[key])
        marks = self._marks(key, kind, words)
        if kind == "virtio":
            return DeviceSpec("virtio-blk-pci", key, _place(key), marks)
        if kind == "sata":
            self._controllers["ahci0"] = DeviceSpec("ahci", "ahci0", _place("ahci0"))
            return DeviceSpec("ide-hd", key, None, (("bus", f"ahci0.{index}"), *marks))
        if kind == "ide":
            return DeviceSpec("ide-hd", key, None, (*self._ide_place(index), *marks))
        return DeviceSpec("scsi-hd", key, None, (*self._scsi_place(index), *marks))

    def _marks(self, key: str, kind: str, words: Words) -> tuple[Property, ...]:
        """What a guest knows a disk by."""
        marks: list[Property] = []
        serial = words.options.get("serial", "")
        if serial:
            if is_serial(serial):
                marks.append(("serial", serial))
            else:
                self._notes.leave_out(key, "its serial number, which is not a plain one")
        if kind == "scsi":
            marks.append(("device_id", f"drive-{key}"))
        wwn = words.options.get("wwn", "")
        if wwn and kind in ("scsi", "sata", "ide"):
            if re.fullmatch(r"0x[0-9a-fA-F]{16}", wwn):
                marks.append(("wwn", wwn))
            else:
                self._notes.leave_out(key, "its wwn, which is not a valid one")
        if words.options.get("ssd") == "1" and kind != "virtio":
            marks.append(("rotation_rate", 1))
        return tuple(marks)

    def _ide_place(self, index: int) -> tuple[Property, ...]:
        if not self._is_q35:
            return (("bus", f"ide.{index // 2}"), ("unit", index % 2))
        # Each of q35's six buses has one place; Proxmox VE itself uses the first two.
        return (("bus", f"ide.{index // 2 + (2 if index % 2 else 0)}"),)

    def _scsi_place(self, index: int) -> tuple[Property, ...]:
        kind = self._config.get("scsihw", "lsi")
        driver = _CONTROLLERS.get(kind)
        if driver is None:
            self._notes.leave_out("scsihw", f"not a known one: {kind}")
            kind, driver = "virtio-scsi-pci", "virtio-scsi-pci"
        if kind == "virtio-scsi-single":
            name, most = f"virtioscsi{index}", 1
        else:
            most = 7 if kind.startswith("lsi") else 256
            name = f"scsihw{index // most}"
        self._controllers[name] = DeviceSpec(driver, name, _place(name))
        if kind.startswith("lsi") or kind == "pvscsi":
            return (("bus", f"{name}.0"), ("scsi-id", index % most))
        return (("bus", f"{name}.0"), ("channel", 0), ("scsi-id", 0), ("lun", index))

    # --- Network, bridges ---

    def _nics(self) -> Iterator[NicSpec]:
        for key in sorted(self._config, key=_disk_order):
            match = _NET.fullmatch(key)
            if not match:
                continue
            words = words_of(self._config[key], "model")
            model = words.first or next(iter(words.options), "")
            mac = words.options.get(model, words.options.get("macaddr", ""))
            if int(match[1]) >= _MOST_NETS:
                self._notes.leave_out(key, "there is no such network card")
            elif model not in _CARDS:
                self._notes.leave_out(key, f"not a known kind of card: {model or 'none is named'}")
            elif mac and not is_mac(mac):
                self._notes.leave_out(key, "its address is not a valid one")
            else:
                properties: tuple[Property, ...] = (("mac", mac.upper()),) if mac else ()
                device = DeviceSpec(_CARDS[model], key, _place(key), properties)
                yield NicSpec(key, device, self._address(match[1]))

    def _address(self, index: str) -> str:
        """Return what cloud-init gives the card; empty: DHCP, or nobody says."""
        return words_of(self._config.get(f"ipconfig{index}", "")).options.get("ip", "")

    def _bridges(self) -> None:
        """PCI bridges as Proxmox VE has them, whether they are used or not: they count."""

        def bridge(name: str, bus: str, slot: int) -> None:
            number_ = ("chassis_nr", int(name[-1]) + self._is_q35)
            self._controllers[name] = DeviceSpec(
                "pci-bridge", name, PciPlace(bus, slot), (number_,)
            )

        if self._is_q35:
            for port in range(4):
                name = f"ich9-pcie-port-{port + 1}"
                place = PciPlace("pcie.0", 0x1C, port, is_multifunction=True)
                marks = (("port", port + 1), ("chassis", port + 1))
                self._controllers[name] = DeviceSpec("pcie-root-port", name, place, marks)
            dmi = DeviceSpec("i82801b11-bridge", "pcidmi", PciPlace("pcie.0", 0x1E))
            self._controllers["pcidmi"] = dmi
            for index in range(4):
                bridge(f"pci.{index}", "pcidmi", index + 1)
        else:
            bridge("pci.1", "pci.0", 30)
            bridge("pci.2", "pci.0", 31)
            if self._config.get("scsihw") == "virtio-scsi-single":
                bridge("pci.3", "pci.0", 5)
        scsi = [int(m[2]) for m in map(_DISK.fullmatch, self._config) if m and m[1] == "scsi"]
        if (
            any(14 <= index < 31 for index in scsi)
            and self._config.get("scsihw", "lsi")[:3] == "lsi"
        ):
            bridge("pci.4", "pci.1", 28)

    # --- The rest ---

    def _name_the_rest(self) -> None:
        config, notes, kept = self._config, self._notes, self._purpose.kept
        for key in config:
            if _DONE.fullmatch(key) or _UNNOTICED.fullmatch(key) or kept.fullmatch(key):
                continue
            reason = next((text for known, text in _REASONS if known.fullmatch(key)), "")
            if _HOST_WORDS.fullmatch(key):
                reason = self._purpose.never
            elif _WITHOUT.fullmatch(key):
                reason = self._purpose.without
            notes.leave_out(key, reason or "not a key that this program knows")
        if config.get("cpu") and not kept.fullmatch("cpu"):
            notes.leave_out(
                "cpu",
                f"{words_of(config['cpu'], 'cputype').first}: it has the host's, or the emulator's",
            )
        is_standard = config.get("vga", "std").partition(",")[0] in ("std", "serial0")
        if not is_standard and not kept.fullmatch("vga"):
            notes.leave_out("vga", "it has a standard one")


def _disk_order(key: str) -> tuple[str, int]:
    letters = key.rstrip("0123456789")
    digits = key[len(letters) :]
    return letters, int(digits[:6] or 0)


def _boot_rank(key: str) -> tuple[int, int]:
    letters, digits = _disk_order(key)
    return _BOOT_ORDER.index(letters), digits
