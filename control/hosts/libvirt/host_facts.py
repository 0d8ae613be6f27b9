# SPDX-License-Identifier: Apache-2.0
"""What a host can do, out of the texts that libvirt gives of it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from vmapipe.access.machine.domain import HostFacts
from vmapipe.access.machine.domain_xml import Element, XmlError, parse_xml
from vmapipe.runtime.errors import Failure

_LABEL = re.compile(r"\+(\d{1,10}):\+(\d{1,10})")


class QemuUser(NamedTuple):
    """The user that QEMU runs as."""

    uid: int
    gid: int


def host_of(
    capabilities: str,
    kvm_domain: str,
    qemu_domain: str,
    arch: str,
    networks: Iterable[str],
    *,
    wants_kvm: bool,
) -> HostFacts:
    """Return what machines can be here.

    `capabilities`: of the host; `kvm_domain`, `qemu_domain`: of domains of these types, empty where
    there are none. Raises Failure.
    """
    has_kvm = wants_kvm and bool(kvm_domain)
    text = kvm_domain if has_kvm else qemu_domain
    if not text:
        raise Failure(f"libvirt has no QEMU here that runs machines of the kind {arch}")
    devices = _parsed(text).find("devices")
    return HostFacts(
        "kvm" if has_kvm else "qemu",
        frozenset(_machines(_parsed(capabilities), arch)),
        frozenset(networks),
        _values(devices.find("video"), "modelType"),
        _values(devices.find("graphics"), "type"),
    )


def user_of(capabilities: str) -> QemuUser | None:
    """Return the user that libvirt's QEMU runs as; None: the one that the daemon runs as."""
    for model in _parsed(capabilities).find("host").all("secmodel"):
        if model.find("model").text.strip() != "dac":
            continue
        for label in model.all("baselabel"):
            if match := _LABEL.fullmatch(label.text.strip()):
                return QemuUser(int(match[1]), int(match[2]))
    return None


def paths_of(domain: str) -> frozenset[str]:
    """Return the files and devices that a domain's XML names as disks, or as firmware's variables."""
    root = _parsed(domain)
    found = {root.find("os/nvram").text.strip()}
    for disk in root.find("devices").all("disk"):
        source = disk.find("source")
        found |= {source.get("file"), source.get("dev")}
    return frozenset(path for path in found if path)


def _parsed(text: str) -> Element:
    try:
        return parse_xml(text.encode())
    except XmlError as error:
        raise Failure(f"libvirt's answer cannot be read: {error}") from error


def _machines(capabilities: Element, arch: str) -> Iterable[str]:
    for guest in capabilities.all("guest"):
        if guest.find("os_type").text.strip() != "hvm":
            continue
        for kind in guest.all("arch"):
            if kind.get("name") != arch:
                continue
            # Those of a kind of domain, too, which may have some of its own.
            for place in (kind, *kind.all("domain")):
                for machine in place.all("machine"):
                    yield machine.text.strip()
                    if machine.get("canonical"):
                        yield machine.get("canonical")


def _values(element: Element, name: str) -> frozenset[str]:
    for enum in element.all("enum"):
        if enum.get("name") == name:
            return frozenset(value.text.strip() for value in enum.all("value"))
    return frozenset()
