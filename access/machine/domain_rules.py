# SPDX-License-Identifier: Apache-2.0
"""What a stranger's domain XML may bring along: an allow-list of elements, attributes and their values. Pure.

Nothing in the list can hold a path, an address, a name of something on the host, or a program. What
is not in it is left out, and named; so is whatever libvirt will invent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vmapipe.access.machine.domain_xml import Element
from vmapipe.access.machine.spec import Notes

_VALUES: Mapping[str, str] = {
    "switch": r"on|off|yes|no",
    "number": r"\d{1,15}",
    "signed": r"-?\d{1,15}",
    "hex": r"0x[0-9a-fA-F]{1,8}|\d{1,8}",
    # No slash, no colon: neither a path nor an address.
    "word": r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}",
    "unit": r"b|bytes|[KMGT]i?B|[kKMGT]",
    "mac": r"[0-9A-Fa-f][02468ACEace](?::[0-9A-Fa-f]{2}){5}",
    "serial": r"[A-Za-z0-9_.+-]{1,36}",
    "wwn": r"[0-9a-fA-F]{16}",
    # By which a guest knows its maker; printable, of which `filtered` sees to.
    "line": r"[^\n]{1,256}",
    "text": r"(?s).{1,8000}",
}

# A line an element: its path, `*` where there may be several of it, `+` where it is nothing without a
# child, its attributes and the kind of
# their values (`=`, or `!` where the element is nothing without), the kind of its text.
_TABLE = r"""\
title text!line
description text!text
memory unit=unit dumpCore=switch text!number
currentMemory unit=unit text!number
vcpu placement=static current=number text!number
vcpus+
vcpus/vcpu* id!number enabled!yes|no hotpluggable=yes|no order=number
iothreads text!number
iothreadids+
iothreadids/iothread* id!number
os
os/type arch!x86_64|i686 machine!word text!hvm
os/boot* dev!hd|cdrom|network|fd
os/bootmenu enable!yes|no timeout=number
os/bios useserial=yes|no rebootTimeout=signed
os/smbios mode!emulate|sysinfo
sysinfo+ type!smbios
sysinfo/bios+
sysinfo/bios/entry* name!vendor|version|date|release text!line
sysinfo/system+
sysinfo/system/entry* name!manufacturer|product|version|serial|uuid|sku|family text!line
sysinfo/baseBoard*+
sysinfo/baseBoard/entry* name!manufacturer|product|version|serial|asset|location text!line
sysinfo/chassis+
sysinfo/chassis/entry* name!manufacturer|version|serial|asset|sku text!line
sysinfo/oemStrings+
sysinfo/oemStrings/entry* text!line
features
features/acpi
features/apic eoi=on|off
features/pae
features/hap state=on|off
features/viridian
features/privnet
features/pmu state=on|off
features/vmport state=on|off
features/pvspinlock state=on|off
features/vmcoreinfo state=on|off
features/smm state=on|off
features/smm/tseg unit=unit text!number
features/ioapic driver!kvm|qemu
features/msrs unknown!ignore|fault
features/kvm+
features/kvm/{hidden,hint-dedicated,poll-control,pv-ipi} state!on|off
features/hyperv mode=custom|passthrough
features/hyperv/{relaxed,vapic,vpindex,runtime,synic,reset,frequencies,reenlightenment,tlbflush,ipi,evmcs,avic} state!on|off
features/hyperv/spinlocks state!on|off retries=number
features/hyperv/stimer state!on|off
features/hyperv/stimer/direct state!on|off
features/hyperv/vendor_id state!on|off value=[A-Za-z0-9_.+-]{1,12}
cpu mode=custom|host-model|host-passthrough|maximum match=minimum|exact|strict check=none|partial|full migratable=on|off
cpu/model fallback=allow|forbid vendor_id=[^,]{12} text!word
cpu/vendor text!word
cpu/topology sockets!number dies=number cores!number threads!number
cpu/feature* policy!force|require|optional|disable|forbid name!word
cpu/cache mode!emulate|passthrough|disable level=[123]
cpu/maxphysaddr mode!emulate|passthrough bits=number
cpu/numa+
cpu/numa/cell* id=number cpus=[0-9,^-]{1,200} memory!number unit=unit discard=yes|no
clock offset!utc|localtime|variable adjustment=signed|reset basis=utc|localtime
clock/timer* name!platform|pit|rtc|hpet|tsc|kvmclock|hypervclock|armvtimer present=yes|no tickpolicy=delay|catchup|merge|discard track=boot|guest|wall frequency=number mode=auto|native|emulate|paravirt|smpsafe
clock/timer/catchup threshold=number slew=number limit=number
on_poweroff text!destroy|restart|preserve
on_reboot text!destroy|restart|preserve
on_crash text!destroy|restart|preserve
pm+
pm/suspend-to-mem enabled!yes|no
pm/suspend-to-disk enabled!yes|no
devices
devices/controller* type!pci|usb|ide|fdc|scsi|sata|virtio-serial|ccid index=number model=word ports=number vectors=number
devices/controller/model name!pci-bridge|i82801b11-bridge|pcie-pci-bridge|ioh3420|pcie-root-port|x3130-upstream|xio3130-downstream|pxb|pxb-pcie
devices/controller/target chassisNr=number chassis=number port=hex busNr=number hotplug=on|off
devices/controller/driver queues=number cmd_per_lun=number max_sectors=number ioeventfd=on|off iothread=number iommu=on|off ats=on|off packed=on|off page_per_vq=on|off
devices/controller/master startport!number
devices/controller/pcihole64 unit=unit text!number
devices/controller/address @address
devices/disk* device=disk|lun|cdrom|floppy
devices/disk/driver cache=default|none|writethrough|writeback|directsync|unsafe io=threads|native|io_uring discard=ignore|unmap detect_zeroes=off|on|unmap ioeventfd=on|off event_idx=on|off iothread=number queues=number queue_size=number iommu=on|off ats=on|off packed=on|off error_policy=stop|report|ignore|enospace rerror_policy=stop|report|ignore
devices/disk/target dev!word bus!virtio|scsi|sata|ide|usb|fdc rotation_rate=number removable=on|off
devices/disk/iotune+
devices/disk/iotune/{total_bytes_sec,read_bytes_sec,write_bytes_sec,total_iops_sec,read_iops_sec,write_iops_sec,total_bytes_sec_max,read_bytes_sec_max,write_bytes_sec_max,total_iops_sec_max,read_iops_sec_max,write_iops_sec_max,size_iops_sec} text!number
devices/disk/blockio logical_block_size=number physical_block_size=number
devices/disk/readonly
devices/disk/serial text!serial
devices/disk/wwn text!wwn
devices/disk/vendor text![\x20-~]{1,8}
devices/disk/product text![\x20-~]{1,16}
devices/disk/boot order!number
devices/disk/address @address
devices/interface*
devices/interface/mac address!mac
devices/interface/model type![A-Za-z0-9_-]{1,40}
devices/interface/driver name=qemu|vhost txmode=iothread|timer ioeventfd=on|off event_idx=on|off queues=number rx_queue_size=number tx_queue_size=number iommu=on|off ats=on|off packed=on|off
devices/interface/mtu size!number
devices/interface/boot order!number
devices/interface/address @address
devices/serial*
devices/serial/target port=number type=isa-serial|usb-serial|pci-serial
devices/serial/target/model name!isa-serial|usb-serial|pci-serial
devices/serial/address @address
devices/console*
devices/console/target type=serial|virtio port=number
devices/console/address @address
devices/channel*
devices/channel/target type!virtio name!org.qemu.guest_agent.0|com.redhat.spice.0
devices/channel/address @address
devices/input* type!mouse|tablet|keyboard bus=ps2|usb|virtio
devices/input/address @address
devices/graphics* type!vnc|spice
devices/sound* model!ac97|es1370|ich6|ich9|pcspk|sb16|usb
devices/sound/codec* type!duplex|micro|output
devices/sound/address @address
devices/video*
devices/video/model type!vga|cirrus|vmvga|qxl|virtio|none|bochs|ramfb ram=number vram=number vram64=number vgamem=number heads=number primary=yes|no
devices/video/model/resolution x!number y!number
devices/video/address @address
devices/memballoon model!virtio|virtio-transitional|virtio-non-transitional|none autodeflate=on|off freePageReporting=on|off
devices/memballoon/stats period!number
devices/memballoon/address @address
devices/rng* model!virtio|virtio-transitional|virtio-non-transitional
devices/rng/rate bytes!number period=number
devices/rng/address @address
devices/watchdog* model!i6300esb|ib700|diag288|itco action=reset|shutdown|poweroff|pause|none|inject-nmi
devices/watchdog/address @address
devices/tpm model=tpm-tis|tpm-crb
devices/panic* model=isa|pseries|hyperv|s390|pvpanic
devices/panic/address @address
devices/hub* type!usb
devices/hub/address @address
devices/iommu model!intel|virtio
devices/iommu/driver intremap=on|off caching_mode=on|off eim=on|off iotlb=on|off aw_bits=number
devices/iommu/address @address
"""
# `@address`, by their type: a place on a bus of the machine's own.
_ADDRESSES: Mapping[str, tuple[str, ...]] = {
    "pci": ("domain", "bus", "slot", "function", "multifunction"),
    "drive": ("controller", "bus", "target", "unit"),
    "virtio-serial": ("controller", "bus", "port"),
    "usb": ("bus", "port"),
    "isa": ("iobase", "irq"),
    "ccid": ("controller", "slot"),
}
#: By a controller's type its models; of a type that is not here it has none.
CONTROLLER_MODELS: Mapping[str, frozenset[str]] = {
    kind: frozenset(models.split())
    for kind, models in {
        "pci": "pci-root pcie-root pci-bridge dmi-to-pci-bridge pcie-to-pci-bridge pcie-root-port "
        "pcie-switch-upstream-port pcie-switch-downstream-port pci-expander-bus pcie-expander-bus",
        "usb": "piix3-uhci piix4-uhci ehci ich9-ehci1 ich9-uhci1 ich9-uhci2 ich9-uhci3 pci-ohci "
        "nec-xhci qemu-xhci none",
        "scsi": "auto buslogic lsilogic lsisas1068 lsisas1078 vmpvscsi virtio-scsi "
        "virtio-transitional virtio-non-transitional",
        "virtio-serial": "virtio virtio-transitional virtio-non-transitional",
        "ide": "piix3 piix4 ich6",
    }.items()
}
_ADDRESS_VALUE = re.compile(r"0x[0-9a-fA-F]{1,8}|\d{1,8}")
_USB_PORT = re.compile(r"\d{1,3}(?:\.\d{1,3}){0,3}")
# Of each element there may be so many, whatever a text says; a machine has 254 disks at most.
_MOST_OF_A_KIND = 300
# What libvirt writes by itself, or what this program makes anew: nobody misses it.
_UNNOTICED = frozenset(
    {
        "name", "uuid", "genid", "devices/emulator", "devices/disk/source", "devices/disk/alias",
        "devices/disk/backingStore", "devices/interface/source", "devices/interface/target",
        "devices/interface/alias", "devices/interface/link", "os/loader", "os/nvram",
        "os/firmware", "seclabel", "resource", "devices/tpm/backend", "devices/rng/backend",
        "devices/graphics/listen", "devices/serial/source", "devices/console/source",
        "devices/channel/source", "devices/audio", "on_lockfailure", "devices/disk/mirror",
    }
)  # fmt: skip
_UNNOTICED_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    path: frozenset(names.split())
    for path, names in {
        "devices/disk": "type snapshot model",
        "devices/disk/driver": "name type",
        "devices/disk/target": "tray",
        "devices/interface": "type managed trustGuestRxFilters",
        "devices/serial": "type",
        "devices/console": "type tty",
        "devices/channel": "type",
        "devices/channel/target": "state",
        "devices/graphics": "autoport port listen tlsPort keymap",
        "os": "firmware",
        "clock": "start",
        "vcpu": "cpuset",
    }.items()
}
_REASONS: Mapping[str, str] = {
    "metadata": "what other programs keep about it",
    "commandline": "it runs words of its own choice on the host: a restore never does that",
    "override": "it changes the host's command line: a restore never does that",
    "hostdev": "a device of the host it ran on",
    "redirdev": "a device of another host",
    "filesystem": "a folder of the host it ran on",
    "shmem": "memory that it shared with others on the host it ran on",
    "smartcard": "a device of the host it ran on",
    "vsock": "a number of the host it ran on",
    "lease": "a file of the host it ran on",
    "parallel": "a device or file of the host it ran on",
    "crypto": "a device of the host it ran on",
    "memory": "memory that is plugged in: the machine has what <memory> says",
    "numatune": "places on the host it ran on",
    "cputune": "limits and places on the host it ran on",
    "blkiotune": "limits on the host it ran on",
    "memtune": "limits on the host it ran on",
    "memoryBacking": "memory of the host it ran on",
    "maxMemory": "room for memory that is plugged in",
    "launchSecurity": "keys of the host it ran on",
    "encryption": "the restored disk is not encrypted",
    "shareable": "the restored disk is this machine's alone",
    "transient": "what the machine writes is kept",
    "bandwidth": "a limit on the host it ran on",
    "vlan": "a network of the host it ran on",
    "filterref": "a filter of the host it ran on",
    "virtualport": "a switch of the host it ran on",
    "script": "it runs a program on the host: a restore never does that",
    "kernel": "a file of the host it ran on: the disk's own boot loader has to do",
    "initrd": "a file of the host it ran on: the disk's own boot loader has to do",
    "cmdline": "it belongs to a kernel of the host it ran on",
}


class _Rule:
    """An element that may be kept."""

    def __init__(self) -> None:
        self.attributes: dict[str, re.Pattern[str]] = {}
        self.needed: set[str] = set()
        self.text: re.Pattern[str] | None = None
        self.is_repeated = False
        self.is_address = False
        self.needs_child = False
        self.children: dict[str, _Rule] = {}


def _parse(table: str) -> _Rule:
    root = _Rule()
    for line in table.splitlines():
        path, *words = line.split()
        above, _, last = path.rstrip("*+").rpartition("/")
        parent = root
        for tag in filter(None, above.split("/")):
            parent = parent.children[tag]
        for tag in last.strip("{}").split(","):
            rule = parent.children[tag] = _rule(words)
            rule.is_repeated, rule.needs_child = "*" in path, "+" in path
    return root


def _rule(words: list[str]) -> _Rule:
    rule = _Rule()
    for word in words:
        match = re.match(r"(\w+)([=!])(.+)", word)
        if match is None:
            rule.is_address = True
            continue
        name, sign, kind = match.groups()
        pattern = re.compile(_VALUES.get(kind, kind))
        if name == "text":
            rule.text = pattern
        else:
            rule.attributes[name] = pattern
        if sign == "!":
            rule.needed.add(name)
    return rule


_RULES = _parse(_TABLE)


def filtered(domain: Element, notes: Notes) -> Element:
    """Return a domain with what may be kept of it; what is left out is noted."""
    return _Filter(notes).element(domain, _RULES, "") or Element("domain", {})


class _Filter:
    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def element(self, element: Element, rule: _Rule, path: str) -> Element | None:
        """Return what may be kept of an element; None: nothing."""
        kept = Element(element.tag, self._attributes(element, rule, path))
        text = element.text.strip()
        if rule.text is not None and text:
            if rule.text.fullmatch(text) and text.replace("\n", "").replace("\t", "").isprintable():
                kept.text = text
            else:
                self._leave_out(path, f"not a value that is known: {text}")
        here = set(kept.attributes) | ({"text"} if kept.text else set())
        if not rule.needed <= here:
            self._leave_out(path, "it is not complete")
            return None
        counts: dict[str, int] = {}
        for child in element.children:
            below = f"{path}/{child.tag}" if path else child.tag
            known = rule.children.get(child.tag)
            if known is None:
                self._unknown(child, below)
                continue
            found = self.element(child, known, below)
            if found is None:
                continue
            counts[child.tag] = counts.get(child.tag, 0) + 1
            if counts[child.tag] > (_MOST_OF_A_KIND if known.is_repeated else 1):
                self._leave_out(below, "it comes more often than it can")
            else:
                kept.children.append(found)
        if (rule.needs_child and not kept.children) or (rule.is_address and not kept.attributes):
            self._leave_out(path, "there is nothing in it that is known")
            return None
        return kept

    def _attributes(self, element: Element, rule: _Rule, path: str) -> dict[str, str]:
        if rule.is_address:
            return self._address(element, path)
        kept = {}
        silent = _UNNOTICED_ATTRIBUTES.get(path, frozenset())
        for name, value in element.attributes.items():
            pattern = rule.attributes.get(name)
            if pattern is not None and pattern.fullmatch(value) and value.isprintable():
                kept[name] = value
            elif path and name not in silent and not name.startswith("xmlns"):
                self._leave_out(path, f"its {name} ({value})")
        return kept

    def _address(self, element: Element, path: str) -> dict[str, str]:
        kind = element.get("type")
        known = _ADDRESSES.get(kind)
        if known is None:
            self._leave_out(path, f"a place of the kind {kind}")
            return {}
        kept = {"type": kind}
        for name in known:
            value = element.get(name)
            pattern = _USB_PORT if (kind, name) == ("usb", "port") else _ADDRESS_VALUE
            is_switch = name == "multifunction" and value in ("on", "off")
            if is_switch or (name != "multifunction" and pattern.fullmatch(value)):
                kept[name] = value
        return kept

    def _unknown(self, element: Element, path: str) -> None:
        if path in _UNNOTICED or element.tag in ("alias", "acpi"):
            return
        # expat gives prefixes as they are: qemu:commandline, qemu:override.
        name = element.tag.rpartition(":")[2]
        self._leave_out(path, _REASONS.get(name, "not a part that is known here"))

    def _leave_out(self, path: str, reason: str) -> None:
        self._notes.leave_out(path.removeprefix("devices/"), reason)
