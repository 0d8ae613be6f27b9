# SPDX-License-Identifier: Apache-2.0
"""Processor, maker, graphics, random numbers, watchdog of a Proxmox VE machine, in libvirt's words. Pure."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence

from vmapipe.access.machine.domain_xml import Element, made
from vmapipe.access.machine.proxmox_config import is_on, words_of
from vmapipe.access.machine.spec import MachineSpec, Notes, number

Config = Mapping[str, str]
_VIDEOS = {
    "std": "vga",
    "cirrus": "cirrus",
    "vmware": "vmvga",
    "qxl": "qxl",
    "qxl2": "qxl",
    "qxl3": "qxl",
    "qxl4": "qxl",
    "virtio": "virtio",
    "virtio-gl": "virtio",
    "none": "none",
}
_SMBIOS = {
    "manufacturer": "manufacturer",
    "product": "product",
    "version": "version",
    "serial": "serial",
    "sku": "sku",
    "family": "family",
}


def cpu_of(config: Config, spec: MachineSpec, notes: Notes) -> Element:
    """Return the processor, and how many there are."""
    words = words_of(config.get("cpu", "kvm64"), "cputype")
    model = words.first or "kvm64"
    sockets = number(config.get("sockets", "1"), 1, 8) or 1
    topology = made("topology", sockets="1", cores=str(spec.cpus), threads="1")
    if sockets > 1 and spec.cpus % sockets == 0:
        cores = str(spec.cpus // sockets)
        topology = made("topology", sockets=str(sockets), cores=cores, threads="1")
    if model in ("host", "max"):
        mode = "host-passthrough" if model == "host" else "maximum"
        cpu = made("cpu", topology, mode=mode)
    elif re.fullmatch(r"x86-64-v[234](-AES)?", model):
        # libvirt has no such names: the host's own is at least that.
        notes.leave_out("cpu", f"{model}: the machine has this host's model of processor")
        cpu = made("cpu", topology, mode="host-model")
    elif model.startswith("custom-") or not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", model):
        notes.leave_out("cpu", f"{model}: the machine has this host's model of processor")
        cpu = made("cpu", topology, mode="host-model")
    else:
        name = made("model", text=model, fallback="allow")
        cpu = made("cpu", name, topology, mode="custom", match="exact", check="none")
    flags = words.options.get("flags", "")
    for flag in filter(None, flags.split(";")):
        if match := re.fullmatch(r"([+-])([a-z0-9_.-]{1,40})", flag):
            policy = "require" if match[1] == "+" else "disable"
            if match[2].startswith(("hv-", "hv_")):
                notes.leave_out("cpu", f"its flag {flag}")
            else:
                cpu.children.append(made("feature", policy=policy, name=match[2]))
    others = sorted(set(words.options) - {"cputype", "flags"})
    if others:
        notes.leave_out("cpu", f"its {', '.join(others)}")
    return cpu


def sysinfo_of(config: Config, uuid: str, notes: Notes) -> Iterator[Element]:
    """Yield what the machine says of its maker."""
    options = words_of(config.get("smbios1", "")).options
    is_coded = is_on(options.get("base64", "0"))
    for key, value in options.items():
        if key in ("uuid", "base64"):
            continue
        text: str | None = value
        if is_coded:
            try:
                text = base64.b64decode(value, validate=True).decode()
            except (binascii.Error, ValueError):
                text = None
        if key not in _SMBIOS or not text or not text.isprintable():
            notes.leave_out("smbios1", f"its {key}")
        else:
            yield made("entry", text=text, name=_SMBIOS[key])
    if uuid:
        yield made("entry", text=uuid, name="uuid")


def video_of(config: Config, address: Sequence[Element], notes: Notes) -> Iterator[Element]:
    """Yield the graphics card and the way to see it."""
    words = words_of(config.get("vga", "std"), "type")
    if re.fullmatch(r"serial\d", words.first):
        yield made("video", made("model", type_="none"))
        return
    model = _VIDEOS.get(words.first or "std")
    if model is None:
        notes.leave_out("vga", f"{words.first}: it has a standard one")
        model = "vga"
    if model == "none":
        yield made("video", made("model", type_="none"))
        return
    if words.first == "virtio-gl":
        notes.leave_out("vga", "virtio-gl: it has no acceleration")
    memory = number(words.options.get("memory", ""), 4, 512)
    element = made("model", type_=model)
    if memory and model in ("vga", "cirrus", "vmvga"):
        element.attributes = {**element.attributes, "vram": str(memory << 10)}
    yield made("video", element, *address)
    kind = "spice" if model == "qxl" else "vnc"
    yield made("graphics", type_=kind)


def rng_of(config: Config, address: Sequence[Element], notes: Notes) -> Element:
    """Return the source of random numbers, which `rng0` says."""
    words = words_of(config["rng0"], "source")
    limit = number(words.options.get("max_bytes", "1024"), 1, 1 << 30)
    period = number(words.options.get("period", "1000"), 1, 1 << 30)
    rates = [made("rate", bytes=str(limit), period=str(period))] if limit and period else []
    if words.first != "/dev/urandom":
        notes.leave_out("rng0", f"{words.first}: it comes from /dev/urandom")
    return made("rng", *rates, *address, model="virtio")


def watchdog_of(config: Config, address: Sequence[Element], notes: Notes) -> Iterator[Element]:
    """Yield the watchdog, if there is one."""
    if "watchdog" not in config:
        return
    words = words_of(config["watchdog"], "model")
    model, action = words.first or "i6300esb", words.options.get("action", "reset")
    if model not in ("i6300esb", "ib700"):
        notes.leave_out("watchdog", f"{model}: not a known kind")
        return
    if action not in ("reset", "shutdown", "poweroff", "pause", "none"):
        notes.leave_out("watchdog", f"its action {action}: it resets the machine")
        action = "reset"
    place = address if model == "i6300esb" else []
    yield made("watchdog", *place, model=model, action=action)


def hyperv_features() -> Element:
    """What qemu-server gives to a Windows guest."""
    names = ("relaxed", "vapic", "vpindex", "runtime", "synic", "reset", "ipi")
    switches = [made(name, state="on") for name in names]
    spinlocks = made("spinlocks", state="on", retries="8191")
    return made(
        "hyperv", *switches, spinlocks, made("stimer", state="on"), made("tlbflush", state="on")
    )
