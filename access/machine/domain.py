# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's out of an archive's configuration: a draft first, then its XML. Pure.

The draft has what the configuration says of the machine, and nothing of any host. What belongs to
this host (names, addresses, paths, networks) comes in at the end, from the caller alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vmapipe.access.machine.domain_rules import CONTROLLER_MODELS, filtered
from vmapipe.access.machine.domain_xml import Element, made, render_xml
from vmapipe.access.machine.firmware import Firmware
from vmapipe.access.machine.libvirt_parts import (
    ELSEWHERE,
    chosen_disks,
    domain_of,
    firmware_of,
    matched_disks,
    tpm_of,
)
from vmapipe.access.machine.spec import (
    FirmwareSpec,
    MachineConfigError,
    Notes,
    Omission,
    TpmSpec,
    is_uuid,
    known_type,
)

#: What a domain may be called, for messages: its disks' files have the name, with -vda-99.qcow2 behind it.
NAME_RULE = (
    "a name has up to 64 characters (200 bytes), no slash, no '..', nothing that does not print, and "
    "begins with neither a sign nor a space"
)
_MAX_NAME_CHARS, _MAX_NAME_BYTES = 64, 200
# Names of libvirt's networks and of bridges; a bridge's has 15 letters.
_NETWORK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]{0,63}")
_AGENT, _SPICE = "org.qemu.guest_agent.0", "com.redhat.spice.0"
_DRIVES = ("cdrom", "floppy")
# Of a processor and its clocks what only KVM has.
_KVM_FEATURES = ("hyperv", "kvm", "pmu", "pvspinlock", "ioapic", "msrs")
_KVM_TIMERS = ("kvmclock", "hypervclock", "tsc")
_USUAL_VIDEOS = ("virtio", "vga", "cirrus", "qxl", "bochs", "none")


class DraftDisk(NamedTuple):
    """`key`: its name in the domain (vda); `source`: the archive's device that is its content.

    An empty one: a drive in which nothing is.
    """

    key: str
    source: str
    element: Element


class DraftCard(NamedTuple):
    """A network card; `network`: of libvirt's networks the one that it was in, or empty."""

    key: str
    element: Element
    network: str


class Draft(NamedTuple):
    """A domain without anything of a host's. `name`, `uuid`: as the configuration has them, or empty."""

    root: Element
    name: str
    uuid: str
    disks: tuple[DraftDisk, ...]
    cards: tuple[DraftCard, ...]
    firmware: FirmwareSpec
    tpm: TpmSpec | None
    has_generation: bool
    omissions: tuple[Omission, ...]
    tpm_model: str = "tpm-tis"
    wants_kvm: bool = True

    @property
    def machine(self) -> str:
        return self.root.find("os/type").get("machine", "pc")

    @property
    def is_q35(self) -> bool:
        return "q35" in self.machine

    @property
    def sources(self) -> dict[str, str]:
        """By a disk's name the archive's device that is its content."""
        return {disk.key: disk.source for disk in self.disks if disk.source}


class ArchiveBelow(NamedTuple):
    """What an overlay stands on: an export of an archive's server, by its Unix socket."""

    export: str
    socket: str


class Placement(NamedTuple):
    """Where a disk is on this host. `below`: it is an overlay of a machine that is restored live."""

    kind: Literal["file", "block"]
    path: str
    image_format: str
    below: ArchiveBelow | None = None


class Network(NamedTuple):
    """What network cards are connected to; `none`: to nothing, their link is down."""

    kind: Literal["network", "bridge", "user", "none"] = "none"
    name: str = ""


class HostFacts(NamedTuple):
    """What this host can do. Empty sets: it does not say."""

    domain_type: Literal["kvm", "qemu"]
    machines: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()
    videos: frozenset[str] = frozenset()
    graphics: frozenset[str] = frozenset()


class Identity(NamedTuple):
    """Whom the domain is. `macs`: one a card, in order; empty: those of the configuration."""

    name: str
    uuid: str
    macs: Sequence[str] = ()


def is_domain_name(text: str) -> bool:
    """Tell whether a domain, and the files of its disks, can be called so."""
    return (
        0 < len(text) <= _MAX_NAME_CHARS
        and text.isprintable()  # no stray byte is, so it can be encoded
        and len(text.encode()) <= _MAX_NAME_BYTES
        and text[0] not in "-.+ "
        and not text.endswith(" ")
        and "/" not in text
        and ".." not in text
    )


def parse_network(text: str) -> Network | None:
    """`NAME`, `bridge:NAME`, `user` or `none`; None: neither of them."""
    if text == "none":
        return Network("none")
    if text == "user":
        return Network("user")
    kind, colon, name = text.partition(":")
    if colon and kind == "bridge":
        return Network("bridge", name) if _NETWORK.fullmatch(name) and len(name) < 16 else None
    return Network("network", text) if _NETWORK.fullmatch(text) else None


def draft_of_libvirt(raw: bytes, names: Sequence[str]) -> Draft:
    """Return the draft. `names`: the archive's devices, but for its memory. Raises MachineConfigError."""
    notes = Notes()
    domain = domain_of(raw)
    devices = domain.find("devices")
    firmware, tpm = firmware_of(domain, names, notes), tpm_of(devices, names, notes)
    elements = chosen_disks(devices, notes, _DRIVES)
    disks = {key: disk for key, disk in elements.items() if disk.get("device") not in _DRIVES}
    taken = {firmware.variables, tpm.state if tpm else ""}
    found = matched_disks(disks, names, taken, notes)
    networks = [card.find("source").get("network") for card in devices.all("interface")]
    is_lent = [card.get("type") in ("hostdev", "vdpa") for card in devices.all("interface")]
    kept = filtered(domain, notes)
    cards = []
    for index, card in enumerate(kept.find("devices").all("interface")):
        key = f"interface{index}"
        if is_lent[index]:
            notes.leave_out(key, ELSEWHERE)
        else:
            network = networks[index] if _NETWORK.fullmatch(networks[index]) else ""
            cards.append(DraftCard(key, card, network))
    made_disks: list[DraftDisk] = []
    for disk in kept.find("devices").all("disk"):
        key = disk.find("target").get("dev")
        # One that comes twice, or that was left out, is another element of the same name.
        if key not in elements or key in {one.key for one in made_disks}:
            continue
        if key in found:
            made_disks.append(DraftDisk(key, found[key], disk))
        elif elements[key].get("device") in _DRIVES:
            notes.leave_out(key, "what is in the drive: it is empty")
            made_disks.append(DraftDisk(key, "", disk))
    uuid = domain.find("uuid").text.strip().lower()
    name, has_generation = domain.find("name").text.strip(), domain.has("genid")
    draft = Draft(
        kept, name, uuid, tuple(made_disks), tuple(cards), firmware, tpm, has_generation, ()
    )
    return checked(draft._replace(wants_kvm=domain.get("type") != "qemu"), notes)


def checked(draft: Draft, notes: Notes) -> Draft:
    """Return a draft of which only what may be kept is left, with backends of our own.

    Raises MachineConfigError.
    """
    kept, disks = draft.root, draft.disks
    if not any(disk.source for disk in disks):
        raise MachineConfigError(
            "the configuration has no disk that is in the archive: there is nothing to define"
        )
    if not kept.find("os/type").tag or not kept.find("memory").tag:
        raise MachineConfigError(
            "the configuration does not say what kind of machine it is, or how much memory it has"
        )
    if not kept.find("os/smbios").tag or not kept.has("sysinfo"):
        _remove(kept, "sysinfo")
        _remove(kept.find("os"), "smbios")
    devices = kept.find("devices")
    tpm_model = devices.find("tpm").get("model", "tpm-tis")
    others = [c for c in devices.children if c.tag not in ("disk", "interface")]
    devices.children = [*_devices(others, notes)]
    _check_boot(kept, disks, draft.cards, notes)
    return draft._replace(
        tpm_model=tpm_model,
        uuid=draft.uuid if is_uuid(draft.uuid) else "",
        omissions=notes.all(),
    )


def _devices(elements: Sequence[Element], notes: Notes) -> list[Element]:
    """Return devices that have backends, with backends of our own; the others as they are."""
    graphics = {e.get("type") for e in elements if e.tag == "graphics"}
    found, ports = [], set[str]()
    for element in elements:
        tag, attributes = element.tag, element.attributes
        if tag == "controller" and not _is_known(element):
            notes.leave_out("controller", f"{element.get('type')}: its model, or its place")
            continue
        if tag in ("tpm", "graphics"):
            continue  # they are made anew
        if tag in ("serial", "console"):
            element.attributes = {"type": "pty", **attributes}
        elif tag == "channel":
            name = element.find("target").get("name")
            if not name or name in ports or (name == _SPICE and "spice" not in graphics):
                notes.leave_out("channel", "a way to a program of the host it ran on")
                continue
            ports.add(name)
            kind = "spicevmc" if name == _SPICE else "unix"
            element.attributes = {"type": kind, **attributes}
        elif tag == "rng":
            element.children.append(made("backend", text="/dev/urandom", model="random"))
        elif tag == "video" and not element.has("model"):
            continue
        found.append(element)
    for kind in sorted(graphics):
        listen = made("listen", type_="address", address="127.0.0.1")
        found.append(made("graphics", listen, type_=kind, autoport="yes"))
    return found


def _is_known(controller: Element) -> bool:
    """Tell whether libvirt has such a controller."""
    kind, model = controller.get("type"), controller.get("model")
    if kind == "pci" and not (model and controller.get("index")):
        return False
    return not model or model in CONTROLLER_MODELS.get(kind, ())


def _check_boot(
    kept: Element, disks: Sequence[DraftDisk], cards: Sequence[DraftCard], notes: Notes
) -> None:
    """Each place in the boot order is one device's, and there is one order only."""
    used = set[str]()
    for element in (*(disk.element for disk in disks), *(card.element for card in cards)):
        order = element.find("boot").get("order")
        if order and (order in used or not int(order)):
            notes.leave_out("boot", f"a second device at place {order} of the boot order")
            _remove(element, "boot")
        elif order:
            used.add(order)
    if used:
        _remove(kept.find("os"), "boot")


def _remove(element: Element, *tags: str) -> None:
    element.children = [child for child in element.children if child.tag not in tags]


class DomainText(NamedTuple):
    """A domain's XML, and what is different on this host."""

    xml: str
    omissions: tuple[Omission, ...]


def domain_xml(
    draft: Draft,
    identity: Identity,
    placements: Mapping[str, Placement],
    host: HostFacts,
    network: Network | None,
    firmware: Firmware | None = None,
    variables: str = "",
) -> DomainText:
    """Return the domain's XML. `placements`: by a disk's name.

    `network`: None: each card is in the network that it was in, where this host has one of the
    name. `firmware`: this host's, for a machine with UEFI; `variables`: the file of its variables.
    """
    notes = Notes()
    # A copy: a draft may be finished more than once.
    root = _copy(draft.root)
    _remove(root, "name", "uuid", "genid")
    root.attributes = {"type": host.domain_type}
    head = [made("name", text=identity.name), made("uuid", text=identity.uuid)]
    if draft.has_generation:
        # Of a restored machine it has to be another one: libvirt makes it.
        head.append(made("genid"))
    root.children = [*head, *root.children]
    for entry in root.find("sysinfo/system").all("entry"):
        if entry.get("name") == "uuid":
            entry.text = identity.uuid
    _set_machine(root, host, notes)
    if host.domain_type == "qemu":
        _without_kvm(root)
        if draft.wants_kvm:
            reason = "this host has no KVM: the machine has an emulated processor"
            notes.leave_out("cpu", reason)
    if firmware is not None:
        _set_firmware(root, firmware, variables)
        if firmware.omission:
            notes.leave_out("firmware", firmware.omission)
    devices = root.find("devices")
    for video in devices.all("video"):
        model = video.find("model")
        if host.videos and model.get("type") not in host.videos:
            instead = next((kind for kind in _USUAL_VIDEOS if kind in host.videos), "vga")
            notes.leave_out("video", f"{model.get('type')}: this host's QEMU has {instead} instead")
            model.attributes = {"type": instead}
            _remove(video, "address")
    _set_graphics(devices, host, notes)
    if draft.tpm is not None:
        backend = made("backend", type_="emulator", version=draft.tpm.version)
        # The 1.2 has no other interface.
        kind = draft.tpm_model if draft.tpm.version == "2.0" else "tpm-tis"
        devices.children.append(made("tpm", backend, model=kind))
    for disk in draft.disks:
        devices.children.append(_disk(disk, placements.get(disk.key)))
    for index, card in enumerate(draft.cards):
        mac = identity.macs[index] if identity.macs else ""
        devices.children.append(_card(card, mac, host, network, notes))
    return DomainText(render_xml(root), notes.all())


def _copy(element: Element) -> Element:
    copied = Element(element.tag, dict(element.attributes))
    copied.text = element.text
    copied.children = [_copy(child) for child in element.children]
    return copied


def _set_machine(root: Element, host: HostFacts, notes: Notes) -> None:
    kind = root.find("os/type")
    machine = kind.get("machine", "pc")
    if host.machines:
        machine, note = known_type(machine, host.machines)
        if note:
            notes.leave_out("machine", note)
    kind.attributes = {"arch": kind.get("arch", "x86_64"), "machine": machine}


def _without_kvm(root: Element) -> None:
    """An emulated processor has neither the host's features, nor what only KVM gives to a guest."""
    cpu = root.find("cpu")
    kept = [child for child in cpu.children if child.tag in ("topology", "numa")]
    _remove(root, "cpu")
    root.children.append(made("cpu", *kept, mode="maximum"))
    _remove(root.find("features"), *_KVM_FEATURES)
    clock = root.find("clock")
    clock.children = [c for c in clock.children if c.get("name") not in _KVM_TIMERS]


def _set_firmware(root: Element, firmware: Firmware, variables: str) -> None:
    os_ = root.find("os")
    _remove(os_, "loader", "nvram")
    loader = made("loader", text=firmware.code, readonly="yes", type_="pflash")
    if firmware.is_secure:
        loader.attributes = {"readonly": "yes", "secure": "yes", "type": "pflash"}
    nvram = made("nvram", text=variables, template=firmware.variables)
    os_.children += [loader, nvram]
    if not root.has("features"):
        root.children.append(made("features"))
    features = root.find("features")
    if not features.has("acpi"):
        features.children.append(made("acpi"))
    if firmware.is_secure:
        _remove(features, "smm")
        features.children.append(made("smm", state="on"))


def _set_graphics(devices: Element, host: HostFacts, notes: Notes) -> None:
    if not host.graphics:
        return
    lost = [e for e in devices.all("graphics") if e.get("type") not in host.graphics]
    if not lost:
        return
    has_other = any(e.get("type") in host.graphics for e in devices.all("graphics"))
    devices.children = [
        child
        for child in devices.children
        if child not in lost and child.find("target").get("name") != _SPICE
    ]
    instead = "" if has_other or "vnc" not in host.graphics else ": it has vnc instead"
    notes.leave_out("graphics", f"{lost[0].get('type')}: this host's QEMU has none{instead}")
    if instead:
        listen = made("listen", type_="address", address="127.0.0.1")
        devices.children.append(made("graphics", listen, type_="vnc", autoport="yes"))


def _disk(disk: DraftDisk, placement: Placement | None) -> Element:
    element = _copy(disk.element)
    if placement is None:
        element.attributes = {"type": "file", "device": element.get("device", "cdrom")}
        _remove(element, "driver")
        return element
    device = element.get("device", "disk")
    element.attributes = {"type": placement.kind, "device": "disk" if device == "lun" else device}
    driver = element.find("driver").attributes
    _remove(element, "driver")
    element.children = [
        made("driver", name="qemu", type_=placement.image_format),
        made("source", **{"dev" if placement.kind == "block" else "file": placement.path}),
        *element.children,
    ]
    element.children[0].attributes = {**element.children[0].attributes, **driver}
    if placement.below is not None:
        _set_below(element, placement.below)
    return element


def _set_below(element: Element, below: ArchiveBelow) -> None:
    """Where the archive cannot be read the machine stands still; zeroes take no room in its copy."""
    driver = element.find("driver")
    wishes = {"discard": "unmap", "error_policy": "stop", "rerror_policy": "stop"}
    driver.attributes = {**driver.attributes, **wishes}
    host = made("host", transport="unix", socket=below.socket)
    source = made("source", host, protocol="nbd", name=below.export)
    end = made("backingStore")
    store = made("backingStore", made("format", type_="raw"), source, end, type_="network")
    element.children.insert(2, store)


def _card(
    card: DraftCard, mac: str, host: HostFacts, network: Network | None, notes: Notes
) -> Element:
    element = _copy(card.element)
    if network is None:
        network = Network("network", card.network) if card.network in host.networks else Network()
    if mac:
        _remove(element, "mac")
        element.children.insert(0, made("mac", address=mac))
    if network.kind in ("network", "bridge"):
        element.attributes = {"type": network.kind}
        element.children.append(made("source", **{network.kind: network.name}))
        return element
    # A program's network has neither queues nor packets of other sizes.
    _remove(element, "driver", "mtu")
    element.attributes = {"type": "user"}
    if network.kind == "none":
        was = f" (it was in {card.network})" if card.network else ""
        notes.leave_out(card.key, f"its network{was}: its link is down; --network says which")
        element.children.append(made("link", state="down"))
    return element
