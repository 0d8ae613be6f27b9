# SPDX-License-Identifier: Apache-2.0
"""A machine of a Proxmox VE node: what a backup of it would meet. Its files are only read."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vmapipe.control.hosts.doctor.findings import Diagnosis, DiskTaken, Finding
from vmapipe.control.hosts.doctor.running_qemu import QemuWishes, diagnose_qemu
from vmapipe.control.hosts.pve.machine import MachineConfig, disks_at_rest
from vmapipe.control.hosts.pve.node import PveNode
from vmapipe.control.qemu.disks import DiskChoiceOptions, LeftOut
from vmapipe.runtime.errors import Failure


def diagnose_guest(vmid: int, root: str = "/") -> Diagnosis:
    """Look at the machine with this number. Every failure is a finding."""
    about = f"Proxmox VE's machine {vmid}"
    try:
        node = PveNode(root)
        config = node.config(vmid)
        findings = [*_configuration(config)]
        if node.is_running(vmid):
            return _running(node, vmid, config, about, findings)
        return _at_rest(node, config, about, findings)
    except Failure as failure:
        return Diagnosis(about, [Finding("problem", "Proxmox VE", str(failure))])


def _configuration(config: MachineConfig) -> Iterator[Finding]:
    if config.lock:
        yield Finding(
            "problem",
            "lock",
            f"its configuration is locked ({config.lock}): something else works on it",
            "wait for that; of a crashed backup: vmapipe backup --pve removes its own lock, else qm unlock",
        )
    for remark in config.remarks():
        yield Finding("info", "configuration", remark)
    for key, volume in config.unused:
        yield Finding("info", "configuration", f"{key}: {volume} is no drive's, and not backed up")


def _running(
    node: PveNode, vmid: int, config: MachineConfig, about: str, before: list[Finding]
) -> Diagnosis:
    configured = config.disks
    excluded = {disk.device: disk.excluded for disk in configured if disk.excluded}
    ours = {d.device for d in configured if d.options.get("media") != "cdrom"}
    wishes = DiskChoiceOptions(
        (), excluded, frozenset(ours - set(excluded)), frozenset(d.device for d in configured)
    )
    agent = node.socket(vmid, "qga") if config.freezes else ""
    seen = diagnose_qemu(QemuWishes(node.socket(vmid, "qmp"), share=True, disks=wishes), about)
    findings = [*before, *seen.findings]
    if agent:
        found = f"{agent} {'is there' if os.path.exists(agent) else 'is not there'}"
        text = f"its configuration wants file systems frozen; {found}"
        findings.append(Finding("info", "guest agent", text))
    return Diagnosis(about, findings, seen.disks, seen.left_out)


def _at_rest(
    node: PveNode, config: MachineConfig, about: str, findings: list[Finding]
) -> Diagnosis:
    """Raises Failure."""
    disks = []
    for found in disks_at_rest(config, node.storages(), node.name):
        path = node.path(found.volume.path)
        if not found.volume.lv and not os.path.exists(path):
            findings.append(
                Finding(
                    "problem",
                    "disks",
                    f"disk {found.disk.device}: {path} is not there",
                    "is its storage mounted, or mapped?",
                )
            )
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        disks.append(DiskTaken(found.disk.device, size))
    left_out = [LeftOut(d.device, d.excluded, "info") for d in config.disks if d.excluded]
    findings.append(Finding("ok", "machine", "it does not run: its volumes are read at rest"))
    if not disks:
        findings.append(
            Finding("warning", "disks", "none: the archive would have the configuration only")
        )
    return Diagnosis(about, findings, disks, left_out)
