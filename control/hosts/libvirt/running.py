# SPDX-License-Identifier: Apache-2.0
"""A domain during one backup, as the coordinator sees it: what it has, its instant, its end."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.control.coordinator.job import Disk
from vmapipe.control.hosts.libvirt.backup_xml import archive_of, checkpoint_name
from vmapipe.control.hosts.libvirt.connect import is_remote, shown_uri
from vmapipe.control.hosts.libvirt.domain import (
    NVRAM_NAME,
    Chosen,
    DomainDisk,
    choose,
    images_of,
    proxmox_map,
    read_domain,
    why_not_at_rest,
    why_not_pulled,
)
from vmapipe.control.hosts.libvirt.freezer import freezing_of
from vmapipe.control.hosts.libvirt.guardian_client import DomainGuardianClient
from vmapipe.control.qemu.disks import TPM_NAME, DiskChoiceOptions, LeftOut
from vmapipe.control.qemu.freezing import Freezing, frozen_by
from vmapipe.control.qemu.image_damage import TruncatedLook
from vmapipe.control.qemu.vmstate import Instant
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.latency import Felt, Means, worst
from vmapipe.runtime.text import name_text

if TYPE_CHECKING:
    from vmapipe.control.coordinator.steering import LatencySource
    from vmapipe.control.hosts.libvirt.monitor_proxy import MonitorProxyClient
    from vmapipe.control.qemu.machine import RunningMachine

#: Configs of the archive beside NAME.xml.
MAP_NAME = "vmapipe-devices.map"
# Of the system's libvirt, where a domain's XML names no other.
_NVRAM_PLACE = "/var/lib/libvirt/qemu/nvram/{}_VARS.fd"
_VERSION = re.compile(r"version (\d+)\.(\d+)")
_VERSION_S = 10.0


class Wishes(NamedTuple):
    """What the command line says. `limit_bytes`: of all scratch files, 0: what is free."""

    domain: str
    uri: str = ""
    scratch: str = ""
    limit_bytes: int = 0
    disks: Sequence[str] = ()
    freezes: bool = False


class DomainBackup:
    """One backup of one domain. Call `choose`; the job calls `begin`, `poll` and `end`.

    Raises Failure, UsageError.
    """

    def __init__(self, wishes: Wishes) -> None:
        """Ask libvirt about the domain, and remove what a crashed backup has left."""
        if is_remote(wishes.uri):
            raise UsageError(
                f"--connect {shown_uri(wishes.uri)}: the disks' exports are sockets of that host: run "
                "this there, and send the archive with --archiver or through ssh"
            )
        self._wishes = wishes
        self._guardian = DomainGuardianClient(wishes.uri, wishes.domain, wishes.scratch)
        self._socket = ""
        self._taken: list[Chosen] = []
        self._others: list[str] = []
        #: As the producers read them, after `choose`.
        self.disks: list[Disk] = []
        # The checkpoint of this archive, the disks whose changes it records, and since when those are known.
        self._checkpoint = ""
        self._recorded: list[str] = []
        self._since: dict[str, str] = {}
        # Where our own engine does the work.
        self._proxy: MonitorProxyClient | None = None
        self._machine: RunningMachine | None = None
        self._nvram = ""
        self._look = TruncatedLook()
        self._has_tpm = self._has_ended = False
        #: Texts for the user; the caller that prints them removes them.
        self.notices: list[str] = []
        try:
            self._seen = self._guardian.ask("look")
            self.is_running = bool(self._seen["running"])
            self._domain = read_domain(self._seen["active"] or self._seen["inactive"])
        except BaseException:
            self.end()
            raise
        if removed := self._seen["removed"]:
            self.notices.append(
                f"removed what a crashed backup has left in the domain: {', '.join(removed)}"
            )

    @property
    def fd(self) -> int:
        """Readable when `poll` has something to see."""
        return self._guardian.fd

    def push(self, guest_wait_s: int) -> RunningMachine:
        """Return the domain's QEMU, reached through libvirt's monitor: the disks are `machine`'s then."""
        if not self.is_running:
            raise UsageError(
                f"--push is for a domain that runs, and {name_text(self._domain.name)} is shut off: leave "
                "it out"
            )
        # Imported here: a backup through libvirt's own job starts sooner without.
        from vmapipe.control.hosts.libvirt.monitor_proxy import MonitorProxyClient
        from vmapipe.control.qemu.machine import RunningMachine

        self._proxy = MonitorProxyClient(self._wishes.uri, self._seen["uuid"])
        self._machine = RunningMachine(self._proxy.path, guest_wait_s)
        return self._machine

    @property
    def freezing(self) -> Freezing | None:
        """How the guest is frozen where `machine` makes the instant; None: it is not."""
        is_wanted = self._machine is not None and self._wishes.freezes
        return freezing_of(self._wishes.uri, self._seen["uuid"]) if is_wanted else None

    def choose(self) -> tuple[list[Disk], list[LeftOut]]:
        """Return the disks as the producers read them, and what is left out."""
        self._taken, left_out = choose(self._domain, self._wishes.disks)
        if self._machine is not None:
            self.disks = self._choose_pushed(self._machine)
        elif self.is_running:
            self.disks, left_out = self._choose_running(left_out)
        else:
            self.disks, left_out = self._choose_at_rest(left_out)
        return self.disks, left_out

    def _choose_running(self, left_out: list[LeftOut]) -> tuple[list[Disk], list[LeftOut]]:
        if self._wishes.freezes and not self._domain.has_agent:
            raise UsageError(
                f"--freeze: the domain {name_text(self._domain.name)} has no channel for a guest agent"
            )
        at_rest = [chosen for chosen in self._taken if chosen.disk.is_read_only]
        self._taken = [chosen for chosen in self._taken if not chosen.disk.is_read_only]
        if not self._taken:
            raise UsageError(
                f"nothing to back up: the domain {name_text(self._domain.name)} has no writable disk with a medium"
            )
        self._check_pulled()
        self._look.expect(images_of(self._taken))
        names = {chosen.disk.target for chosen in self._taken}
        self._others = [d.target for d in self._domain.disks if d.target not in names]
        places = self._guardian.ask("prepare", qemu=self._seen["qemu"])
        self._socket = places["socket"]
        disks = [
            Disk(name, f"nbd+unix:///{_quoted(disk.target)}?socket={_quoted(self._socket)}")
            for name, disk in self._taken
        ]
        disks += [_disk_at_rest(chosen, chosen.disk.path) for chosen in at_rest]
        if not self._wishes.disks:
            stored, without = self._stored_state(places["folder"])
            disks += stored
            left_out += without
        return disks, left_out

    def recorded_archives(self) -> frozenset[bytes]:
        """Return the uuids of the archives since which changes of the domain's disks are known."""
        return frozenset(uuid.UUID(archive_of(name)).bytes for name in self._seen["checkpoints"])

    def track(self, archive: bytes, base: bytes | None) -> list[Disk]:
        """Record changes from this archive's instant on; return the disks, read since `base` where that can be.

        Call it after `choose`. Both are archives' uuids.
        """
        if not self.is_running:
            return self.disks
        # libvirt keeps bitmaps in qcow2 images only.
        self._recorded = [d.disk.target for d in self._taken if d.disk.image_format == "qcow2"]
        self._checkpoint = checkpoint_name(str(uuid.UUID(bytes=archive)))
        if base is not None:
            name = checkpoint_name(str(uuid.UUID(bytes=base)))
            known = self._seen["checkpoints"].get(name, {})
            # Another image has its target now: its bitmap of this name is another disk's.
            self._since = {
                d.disk.target: name
                for d in self._taken
                if d.disk.path and known.get(d.disk.target) == d.disk.path
            }
        targets = {chosen.name: chosen.disk.target for chosen in self._taken}
        self.disks = [
            disk._replace(reading=(*disk.reading, f"--bitmap={targets[disk.name]}"))
            if targets.get(disk.name) in self._since
            else disk
            for disk in self.disks
        ]
        return self.disks

    def configs(self) -> tuple[list[str], list[int]]:
        """Return the archive's configs as `NAME=PATH`, and the descriptors that go with them."""
        name = self._domain.name.replace("/", "_")
        texts = {f"{name}.xml": self._seen["inactive"]}
        if self._seen["active"]:
            texts[f"{name}.active.xml"] = self._seen["active"]
        if lines := proxmox_map(self._taken):
            texts[MAP_NAME] = lines
        words, fds = [], []
        for config, text in texts.items():
            fd = os.memfd_create("vmapipe-config", 0)
            with open(fd, "wb", closefd=False) as file:
                file.write(text.encode("utf-8", "surrogateescape"))
            os.lseek(fd, 0, os.SEEK_SET)
            words.append(f"{config}=/dev/fd/{fd}")
            fds.append(fd)
        return words, fds

    def begin(self, emit: Emit, cancel: Cancel) -> Instant | None:
        """Begin libvirt's job: the instant. None: the domain is shut off, or has no disk in use."""
        if not self.is_running or not self._socket:
            return None
        with self._frozen(emit, cancel):
            answer = self._guardian.ask(
                "begin",
                cancel.fd,
                targets=[chosen.disk.target for chosen in self._taken],
                left_out=self._others,
                checkpoint=self._checkpoint,
                recorded=self._recorded,
                since=self._since,
                limit=self._wishes.limit_bytes,
                nvram=self._nvram,
                tpm=self._has_tpm,
                qemu=self._seen["qemu"],
            )
        if answer["why_full"]:
            text = f"all disks are read in full: {answer['why_full']}"
            emit({"event": "notice", "text": text})
        return Instant("", answer["held_s"])

    def measure(self, bound_s: float, notices: list[str]) -> LatencySource | None:
        """Measure what the guest feels by libvirt's own numbers; None: it is shut off."""
        if not self.is_running:
            return None
        notices.append(
            "libvirt tells the mean of a guest's requests: --guest-latency holds for that, not for 99 of "
            "100 (with --push for those)"
        )
        return _DomainLatency(self._guardian, [d.disk.target for d in self._taken], bound_s)

    def poll(self) -> None:
        """Take what the guardian has said. Raises Failure when the snapshot is lost."""
        if self._has_ended:
            return
        self._guardian.take()
        if self._guardian.lost:
            raise Failure(self._guardian.lost)
        self._look.poll(self._seen["qemu"], self.notices)

    def end(self, *, stored: bool = False) -> str:
        """End libvirt's job and remove all files; return a text when something remains. Never raises.

        `stored`: the archive is, and the changes since it are what the next one needs.
        """
        if self._has_ended:
            return ""
        self._has_ended = True
        self._look.end(self.notices, stored=stored)
        if self._proxy is not None:
            self._proxy.close()
        text = ""
        try:
            self._guardian.ask("end", stored=stored)
        except Failure as failure:
            text = (
                f"the end of the domain's backup job: {failure}; it is tried on, and `vmapipe cleanup "
                f"--libvirt {self._wishes.domain}` does it later"
            )
        self._guardian.leave()
        if text and self._guardian.is_gone:
            text = self._clean_up_ourselves(text)
        return text

    def _clean_up_ourselves(self, text: str) -> str:
        """Where the guardian was killed: do its work here."""
        other = DomainGuardianClient(self._wishes.uri, self._wishes.domain, self._wishes.scratch)
        try:
            other.ask("look")
            return ""
        except Failure as failure:
            return f"{text} ({failure})"
        finally:
            other.leave()

    # --- Which disks ---

    def _choose_pushed(self, machine: RunningMachine) -> list[Disk]:
        wanted = [f"{name}={disk.alias}" for name, disk in self._taken]
        if not self._wishes.disks:
            wanted += [NVRAM_NAME] if self._domain.nvram else []
            wanted += [TPM_NAME] if self._domain.has_tpm and not self._seen["tpm"] else []
        choice = machine.choose(DiskChoiceOptions(wanted))
        return [Disk(disk.name, "", size_bytes=disk.size_bytes) for disk in choice.disks]

    def _check_pulled(self) -> None:
        """Refuse disks whose guest a pulled backup could harm."""
        for _, disk in self._taken:
            version = self._qemu_version() if disk.has_io_thread else (0, 0)
            if reason := why_not_pulled(disk, version):
                raise Failure(f"disk {name_text(disk.target)} {reason}")

    def _qemu_version(self) -> tuple[int, int]:
        """Return the running QEMU's version as far as it can be known; else (0, 0)."""
        pid = self._seen["qemu"]
        try:
            program = os.readlink(f"/proc/{pid}/exe")
            # An older one goes on after its package was upgraded: its file is `… (deleted)`.
            answer = subprocess.run(
                [program, "--version"], capture_output=True, timeout=_VERSION_S, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return (0, 0)
        match = _VERSION.search(answer.stdout.decode(errors="replace"))
        return (int(match[1]), int(match[2])) if match else (0, 0)

    def _stored_state(self, folder: str) -> tuple[list[Disk], list[LeftOut]]:
        """Firmware variables and the TPM's state, which the guardian stores at the instant."""
        disks, left_out = [], []
        domain = self._domain
        if domain.nvram:
            try:
                with open(domain.nvram, "rb"):
                    self._nvram = domain.nvram
                disks.append(_file_disk(NVRAM_NAME, f"{folder}/{NVRAM_NAME}", domain.nvram_format))
            except OSError as error:
                reason = f"the firmware's variables {domain.nvram} cannot be read: {error.strerror}"
                left_out.append(LeftOut(NVRAM_NAME, reason, "warn"))
        if domain.has_tpm:
            if reason := self._seen["tpm"]:
                left_out.append(LeftOut(TPM_NAME, f"the TPM's state: {reason}", "warn"))
            else:
                self._has_tpm = True
                disks.append(Disk(TPM_NAME, f"{folder}/{TPM_NAME}"))
        return disks, left_out

    def _choose_at_rest(self, left_out: list[LeftOut]) -> tuple[list[Disk], list[LeftOut]]:
        """The images of a domain that is shut off, read under QEMU's locks."""
        disks, kept = [], []
        for chosen in self._taken:
            if reason := why_not_at_rest(chosen.disk):
                left_out.append(LeftOut(chosen.disk.target, reason, "warn"))
                continue
            path = self._seen["volumes"].get(chosen.disk.target, chosen.disk.path)
            disks.append(_disk_at_rest(chosen, path))
            kept.append(chosen)
        self._taken = kept
        domain = self._domain
        if (domain.has_uefi or domain.nvram) and not self._wishes.disks:
            # An XML with firmware='efi' does not say where libvirt has put them.
            path = domain.nvram or _NVRAM_PLACE.format(domain.name)
            if os.path.exists(path):
                disks.append(_file_disk(NVRAM_NAME, path, domain.nvram_format))
            else:
                reason = (
                    f"the firmware's variables are not at {path}: was the domain never started?"
                )
                left_out.append(LeftOut(NVRAM_NAME, reason, "warn"))
        if domain.has_tpm and not self._wishes.disks:
            reason = "the TPM's state can be read while the domain runs only"
            left_out.append(LeftOut(TPM_NAME, reason, "warn"))
        return disks, left_out

    # --- The instant ---

    @contextlib.contextmanager
    def _frozen(self, emit: Emit, cancel: Cancel) -> Iterator[None]:
        if not self._wishes.freezes:
            yield
            return
        if self._seen["paused"]:
            # Nothing in it can answer, nor write.
            text = "the guest is not running: its file systems are backed up without its agent"
            emit({"event": "notice", "text": text})
            yield
            return
        # Noted where it is found after any crash.
        self._guardian.ask("frozen", is_frozen=True)
        with frozen_by(freezing_of(self._wishes.uri, self._seen["uuid"]), emit, cancel):
            yield
        self._guardian.ask("frozen", is_frozen=False)


class _DomainLatency:
    """What a domain's guest feels of its disks, as libvirt counts it."""

    # It asks QEMU each time.
    every_s = 1.0
    # It does not say since when there was no request.
    guest_is_idle = False

    def __init__(
        self, guardian: DomainGuardianClient, targets: Sequence[str], bound_s: float
    ) -> None:
        self._guardian, self._targets = guardian, targets
        self._means = Means(bound_s)
        self.take()

    def take(self) -> Felt:
        told = self._guardian.ask("requests", targets=self._targets)
        return worst([self._means.take(target, *counts) for target, counts in told.items()])


def _disk_at_rest(chosen: Chosen, path: str) -> Disk:
    disk: DomainDisk = chosen.disk
    if disk.kind == "network":
        return Disk(chosen.name, _nbd_uri(disk))
    return _file_disk(chosen.name, path, disk.image_format)


def _file_disk(name: str, path: str, image_format: str) -> Disk:
    if image_format == "raw":
        return Disk(name, path)
    # libvirt's QEMU opens what the image refers to as well.
    return Disk(name, path, reading=(f"--format={image_format}", "--others"))


def _nbd_uri(disk: DomainDisk) -> str:
    transport, where, port = disk.host
    if transport == "unix":
        return f"nbd+unix:///{_quoted(disk.path)}?socket={_quoted(where)}"
    return f"nbd://{where}:{port or 10809}/{_quoted(disk.path)}"


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, errors="surrogateescape")
