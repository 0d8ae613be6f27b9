# SPDX-License-Identifier: Apache-2.0
"""What a host's libvirt can do for a domain, asked of it before anything is restored."""

from __future__ import annotations

import contextlib
import os

from vmapipe.access.machine.accelerator import KVM, accelerator
from vmapipe.access.machine.domain import Draft, HostFacts
from vmapipe.access.machine.domain_xml import parse_xml, render_xml
from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.control.hosts.libvirt.host_facts import QemuUser, host_of, user_of
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure


def facts_of(host: Host, capabilities: str, draft: Draft, cancel: Cancel) -> HostFacts:
    """Return what a host has for a domain. Raises Failure, Cancelled."""
    arch = draft.root.find("os/type").get("arch", "x86_64")
    wants_kvm = draft.wants_kvm
    if wants_kvm and os.access("/dev/kvm", os.R_OK | os.W_OK):
        # In some virtual machines it is there, and a guest on it hangs.
        wants_kvm = accelerator(cancel) == KVM
    texts = dict[str, str]()
    for kind in ("kvm", "qemu"):
        with contextlib.suppress(LibvirtFailure):
            texts[kind] = host.call(host.connection.getDomainCapabilities, None, arch, None, kind)
    networks: list[str] = []
    with contextlib.suppress(LibvirtFailure):
        found = host.call(host.connection.listAllNetworks)
        networks = [network.name() for network in found]
    return host_of(
        capabilities,
        texts.get("kvm", ""),
        texts.get("qemu", ""),
        arch,
        networks,
        wants_kvm=wants_kvm,
    )


def user_at(capabilities: str, uri: str) -> QemuUser | None:
    """Return the user of libvirt's QEMU; a user's own ("session") daemon's is the daemon's."""
    found = user_of(capabilities)
    if found is not None:
        return found
    _, _, socket = uri.partition("socket=")
    with contextlib.suppress(OSError):
        status = os.stat(socket.partition("&")[0])
        return QemuUser(status.st_uid, status.st_gid)
    return None


def check_domain(host: Host, xml: str) -> None:
    """Raises Failure for a domain's XML that libvirt would not take, without defining it."""
    root = parse_xml(xml.encode())
    devices = root.find("devices")
    # For a network card libvirt makes a device of this host, even to answer this.
    devices.children = [child for child in devices.children if child.tag != "interface"]
    try:
        host.call(host.connection.domainXMLToNative, "qemu-argv", render_xml(root), 0)
    except LibvirtFailure as failure:
        # Other errors are of a start, or of a daemon that does not answer this: defining it tells.
        if failure.code in (host.lib.VIR_ERR_XML_ERROR, host.lib.VIR_ERR_XML_DETAIL):
            raise Failure(f"libvirt does not take the domain: {failure}") from failure
