# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's: what a backup of it would meet. Over a connection that is read-only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from vmapipe.control.hosts.doctor.findings import Diagnosis, DiskTaken, Finding
from vmapipe.control.hosts.doctor.releases import Release, known_faults
from vmapipe.control.hosts.doctor.running_qemu import image_findings
from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure, is_remote, shown_uri
from vmapipe.control.hosts.libvirt.domain import (
    Domain,
    choose,
    images_of,
    read_domain,
    why_not_at_rest,
    why_not_pulled,
)
from vmapipe.control.hosts.libvirt.jobs import DomainJobs
from vmapipe.control.hosts.libvirt.scratch import DEFAULT_PLACE, RESERVE_BYTES
from vmapipe.control.qemu.qemu_process import command_line, pid_of_qemu
from vmapipe.control.qemu.tpm import find_tpm, read_now
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.text import human_bytes, name_text

# Backups in pull mode with <backup> came with 6.0, with checkpoints and resumes that work in 7.2.
_OLDEST = (7, 2)


def diagnose_domain(name: str, uri: str = "", scratch: str = "") -> Diagnosis:
    """Look at a domain; `scratch`: where scratch files would be made. Every failure is a finding."""
    about = f"libvirt's domain {name_text(name)}"
    if is_remote(uri):
        text = f"{shown_uri(uri)}: the disks' exports are sockets of that host"
        way_out = "run this there, and send the archive with --archiver or through ssh"
        return Diagnosis(about, [Finding("problem", "libvirt", text, way_out)])
    try:
        with contextlib.closing(Host(uri, read_only=True)) as host:
            return _DomainExamination(host, host.domain(name), scratch or DEFAULT_PLACE).diagnosis(
                about
            )
    except Failure as failure:
        return Diagnosis(about, [Finding("problem", "libvirt", str(failure))])


class _DomainExamination:
    def __init__(self, host: Host, domain: Any, place: str) -> None:
        self._host = host
        self._place = place
        self._jobs = DomainJobs(host, domain)
        self._is_running = self._jobs.is_running
        self._domain: Domain = read_domain(host.call(domain.XMLDesc, 0))

    def diagnosis(self, about: str) -> Diagnosis:
        """Raises LibvirtFailure."""
        domain = self._domain
        chosen, left_out = choose(domain, ())
        findings = [*self._libvirt()]
        disks = []
        for name, disk in chosen:
            size = self._size(disk.target)
            if self._is_running:
                reason = why_not_pulled(disk, self._release)
            else:
                reason = why_not_at_rest(disk)
                reason = f"is not readable at rest: {reason}" if reason else ""
            if reason:
                findings.append(Finding("problem", "disks", f"disk {name_text(name)} {reason}"))
            else:
                disks.append(DiskTaken(name, size))
        if not chosen:
            findings.append(Finding("problem", "disks", "nothing to back up: no disk can be taken"))
        if self._is_running:
            findings += image_findings(images_of(chosen), pid_of_qemu(None, domain.uuid))
            findings += self._scratch(sum(disk.size_bytes for disk in disks))
            findings += self._state()
        return Diagnosis(about, findings, disks, left_out)

    def _libvirt(self) -> Iterator[Finding]:
        host = self._host
        library = _release(host.call(host.connection.getLibVersion))
        qemu = self._release = _release(host.call(host.connection.getVersion))
        text = f"{_text(library)}, for QEMU {_text(qemu)} (a machine that runs longer may have an older one)"
        if library < _OLDEST:
            way_out = "a newer libvirt, or vmapipe backup --qmp with a monitor of its own"
            yield Finding("problem", "libvirt", f"{text}: it is older than 7.2", way_out)
        else:
            yield Finding("ok", "libvirt", text)
        yield from known_faults(qemu, ("nbd",))
        if not self._is_running:
            yield Finding(
                "ok", "domain", "it is shut off: its images are read at rest, under their locks"
            )
            return
        state = "paused" if self._jobs.is_paused else "running"
        yield Finding(
            "ok", "domain", f"it is {state}: libvirt's own backup job, no restart, no taint"
        )
        try:
            if self._jobs.job_xml():
                yield Finding(
                    "problem",
                    "job",
                    "a backup job of it is running, or was left by a crashed backup",
                    "wait for its end, or: vmapipe cleanup --libvirt",
                )
        except LibvirtFailure as failure:
            yield Finding("info", "job", f"its backup job cannot be looked at: {failure}")
        with contextlib.suppress(LibvirtFailure):
            names = [c.getName() for c in host.call(self._jobs.domain.listAllCheckpoints, 0)]
            if names:
                known = ", ".join(name_text(name) for name in names[:10])
                yield Finding("info", "checkpoints", f"{len(names)}: {known}")

    def _size(self, target: str) -> int:
        with contextlib.suppress(LibvirtFailure):
            return int(self._host.call(self._jobs.domain.blockInfo, target, 0)[0])
        return 0

    def _scratch(self, total_bytes: int) -> Iterator[Finding]:
        try:
            status = os.statvfs(self._place)
        except OSError as error:
            text = f"{self._place}: {os_error_text(error)}"
            yield Finding("problem", "scratch space", text, "--scratch DIR: a folder with room")
            return
        free = status.f_bavail * status.f_frsize
        text = f"{human_bytes(free)} are free in {self._place}, the disks have {human_bytes(total_bytes)}"
        if free <= RESERVE_BYTES:
            yield Finding("problem", "scratch space", text, "--scratch DIR: a folder with room")
        elif free < total_bytes // 10:
            why = "; what the guest overwrites during the backup is kept there"
            yield Finding("warning", "scratch space", text + why, "--scratch DIR, --scratch-size")
        else:
            yield Finding("ok", "scratch space", text)

    def _state(self) -> Iterator[Finding]:
        """What is stored beside disks, and the agent."""
        domain = self._domain
        if domain.has_agent:
            text = "the domain has its channel; --freeze freezes file systems through libvirt"
            yield Finding("ok", "guest agent", text)
        else:
            yield Finding(
                "info",
                "guest agent",
                "no channel for it: a backup is as after a power cut, which journals are made for",
            )
        if domain.nvram and not os.access(domain.nvram, os.R_OK):
            text = f"{domain.nvram} cannot be read, and would be left out"
            yield Finding("warning", "firmware's variables", text, "run this as root")
        if domain.has_tpm:
            pid = pid_of_qemu(None, domain.uuid)
            try:
                if pid is None:
                    raise Failure("its QEMU is not among the processes that we see")
                read_now(find_tpm(command_line(pid)))
                yield Finding("ok", "TPM", "its state can be read")
            except Failure as failure:
                text = f"its state would be left out: {failure}"
                yield Finding("warning", "TPM", text, "run this as root")


def _release(number: int) -> Release:
    """Read libvirt's way of a version: 1,000,000 x major + 1000 x minor + release."""
    return number // 1_000_000, number // 1000 % 1000, number % 1000


def _text(release: Release) -> str:
    return ".".join(map(str, release))
