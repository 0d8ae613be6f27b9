# SPDX-License-Identifier: Apache-2.0
"""The backup job of a domain: whether there is one and whose, its end, and what a crashed one has left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from vmapipe.control.hosts.libvirt.backup_xml import (
    SOCKET,
    archive_of,
    checkpoint_disks,
    our_job,
)
from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.control.hosts.libvirt.scratch import DEFAULT_PLACE, ScratchFolder, left_folders
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.text import name_text

# QEMU ends the job within a tenth of a second, unless its storage hangs.
_END_S = 30.0
_POLL_S = 0.02
# Why a domain is paused or off, in libvirt's numbers (virDomainPausedReason, virDomainShutoffReason).
_PAUSED_FOR_IO_ERROR = 5
_OFF_REASONS = {
    1: "it was shut down",
    2: "it was destroyed (virsh destroy)",
    3: "it has crashed, or its QEMU was killed",
    4: "it was migrated to another host",
    5: "it was saved to a file (virsh save)",
    6: "it could not be started",
}


class DomainJobs:
    """A domain and its jobs; every method raises Failure."""

    def __init__(self, host: Host, domain: Any) -> None:
        self.host = host
        self.domain = domain
        self.name = str(domain.name())
        self.uuid = str(domain.UUIDString())

    @property
    def is_running(self) -> bool:
        return bool(self.host.call(self.domain.isActive))

    def state(self) -> tuple[int, int]:
        """Return libvirt's numbers of the state and of its reason."""
        state, reason = self.host.call(self.domain.state)
        return state, reason

    @property
    def is_paused(self) -> bool:
        return bool(self.state()[0] == self.host.lib.VIR_DOMAIN_PAUSED)

    def job_xml(self) -> str:
        """Return the XML of its backup job; empty: it has none."""
        lib = self.host.lib
        try:
            return str(self.host.call(self.domain.backupGetXMLDesc))
        except LibvirtFailure as failure:
            gone = (lib.VIR_ERR_NO_DOMAIN_BACKUP, lib.VIR_ERR_NO_DOMAIN)
            if failure.code in gone or (
                failure.code == lib.VIR_ERR_OPERATION_INVALID and not self._is_active()
            ):
                return ""
            raise

    def why_ended(self) -> str:
        """Return why there is no backup job any more, in words."""
        lib = self.host.lib
        try:
            state, reason = self.state()
        except LibvirtFailure as failure:
            if failure.code != lib.VIR_ERR_NO_DOMAIN:
                raise
            return (
                "it has ended and is not defined any more (destroyed, migrated away or undefined)"
            )
        if state in (lib.VIR_DOMAIN_SHUTOFF, lib.VIR_DOMAIN_CRASHED):
            return _OFF_REASONS.get(reason, "it is shut off")
        return "somebody has ended its backup job (virsh domjobabort)"

    def end(self) -> bool:
        """End its backup job, and let a guest go on that was paused by a full scratch space.

        True: it was paused.
        """
        deadline = time.monotonic() + _END_S
        asked_at = 0.0
        while self.job_xml():
            if time.monotonic() > deadline:
                raise Failure(
                    f"the backup job of {name_text(self.name)} does not end: is a disk of it, or of its "
                    "scratch files, stuck? `virsh domjobabort` ends it later"
                )
            if time.monotonic() - asked_at > 1.0:
                asked_at = time.monotonic()
                # It may have ended just now.
                with contextlib.suppress(LibvirtFailure):
                    self.host.call(self.domain.abortJob)
            time.sleep(_POLL_S)
        return self._go_on()

    def _go_on(self) -> bool:
        """QEMU pauses a guest whose write finds no room in a scratch file: the write is tried again."""
        if not self._is_active():
            return False
        if self.state() != (self.host.lib.VIR_DOMAIN_PAUSED, _PAUSED_FOR_IO_ERROR):
            return False
        self.host.call(self.domain.resume)
        return True

    def checkpoints(self) -> dict[str, dict[str, str]]:
        """Return the checkpoints of ours by name: the disks of each, as `checkpoint_disks` has them."""
        lib = self.host.lib
        try:
            found = self.host.call(self.domain.listAllCheckpoints)
        except LibvirtFailure as failure:
            if failure.code == lib.VIR_ERR_NO_SUPPORT:
                return {}
            raise
        names = {str(checkpoint.getName()): checkpoint for checkpoint in found}
        return {
            name: checkpoint_disks(self.host.call(checkpoint.getXMLDesc))
            for name, checkpoint in names.items()
            if archive_of(name)
        }

    def remove_checkpoint(self, name: str) -> None:
        """Remove one of ours, if it is there."""
        lib = self.host.lib
        try:
            checkpoint = self.host.call(self.domain.checkpointLookupByName, name)
            try:
                self.host.call(checkpoint.delete)
            except LibvirtFailure:
                # Its bitmap is gone (another program removed it, the image was replaced).
                flag = lib.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
                self.host.call(checkpoint.delete, flag)
        except LibvirtFailure as failure:
            if failure.code not in (lib.VIR_ERR_NO_DOMAIN_CHECKPOINT, lib.VIR_ERR_NO_DOMAIN):
                raise

    def thaw(self) -> None:
        """Thaw the guest's file systems; those that are not frozen stay as they are."""
        self.host.call(self.domain.fsThaw)

    def _is_active(self) -> bool:
        try:
            return self.is_running
        except LibvirtFailure as failure:
            if failure.code != self.host.lib.VIR_ERR_NO_DOMAIN:
                raise
            return False


def remove_leftovers(jobs: DomainJobs, place: str = DEFAULT_PLACE) -> list[str]:
    """End the job and remove the files that a crashed backup has left; return what was removed.

    Raises Failure where a backup of this domain is alive, ours or another program's.
    """
    removed: list[str] = []
    folders = dict.fromkeys(left_folders(place, jobs.uuid))
    xml = jobs.job_xml() if jobs.is_running else ""
    if xml:
        ours = our_job(xml)
        who = f"the domain {name_text(jobs.name)}"
        if ours is None:
            raise Failure(
                f"another program's backup of {who} is running (`virsh domjobinfo` shows it): wait "
                "for its end, or end it with `virsh domjobabort`"
            )
        # Without its folder (somebody has removed it) nothing is alive that could use it.
        folder = ScratchFolder.find(ours.folder)
        if folder is None and os.path.exists(ours.folder):
            raise Failure(f"another backup of {who} is running, or being ended; wait for its end")
        try:
            if jobs.end():
                removed.append("the pause of the guest, whose scratch space was full")
        finally:
            if folder is not None:
                folder.close()
        removed.append("a backup job")
        folders[ours.folder] = None
        if SOCKET.fullmatch(os.path.basename(ours.socket)):
            with contextlib.suppress(OSError):
                os.unlink(ours.socket)
    for path in folders:
        removed += _remove_folder(jobs, path)
    return removed


def _remove_folder(jobs: DomainJobs, path: str) -> list[str]:
    folder = ScratchFolder.find(path)
    if folder is None:
        return []
    removed = []
    if folder.is_frozen and jobs.is_running:
        try:
            jobs.thaw()
        except Failure as failure:
            folder.close()
            raise Failure(
                f"THE GUEST MAY STILL BE FROZEN: {failure}. Thaw it by hand: `virsh domfsthaw "
                f"{jobs.name}`"
            ) from failure
        removed.append("the freezing of the guest's file systems")
    if text := folder.remove():
        raise Failure(text)
    return [*removed, path]


def until_reached(
    uri: str, name: str, patience_s: float, is_over: Callable[[], bool] = lambda: False
) -> DomainJobs | None:
    """Connect, and try again while libvirt's daemon does not answer; None: not in that time.

    Raises LibvirtFailure where it answers that the domain is not there.
    """
    deadline = time.monotonic() + patience_s
    while True:
        host = None
        try:
            host = Host(uri)
            return DomainJobs(host, host.domain(name))
        except LibvirtFailure as failure:
            if host is not None:
                is_absent = failure.code == host.lib.VIR_ERR_NO_DOMAIN
                host.close()
                if is_absent:
                    raise
            if time.monotonic() > deadline or is_over():
                return None
        time.sleep(0.5)
