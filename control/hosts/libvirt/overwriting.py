# SPDX-License-Identifier: Apache-2.0
"""The domain that a restore overwrites: whether it may, and what becomes of its disks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.control.hosts.libvirt.host_facts import paths_of
from vmapipe.control.hosts.libvirt.places import Occupied, Place, PoolPlace
from vmapipe.control.hosts.libvirt.removal import description_of, paths_in_use
from vmapipe.control.hosts.libvirt.undo import Made, made_of
from vmapipe.runtime.errors import Failure, UsageError


def find_domain(host: Host, name: str) -> Any:
    """Return the domain of a name; None: there is none. Raises LibvirtFailure."""
    try:
        return host.call(host.connection.lookupByName, name)
    except LibvirtFailure as failure:
        if failure.code != host.lib.VIR_ERR_NO_DOMAIN:
            raise
        return None


def domain_to_overwrite(host: Host, name: str, *, overwrite: bool) -> Any:
    """Return the domain that has the name; None: there is none. Raises Failure where it has to stay."""
    domain = find_domain(host, name)
    if domain is None:
        return None
    if not overwrite:
        raise UsageError(
            f"libvirt has a domain {name} already, which is not touched: --name another, or "
            "--overwrite"
        )
    if host.call(domain.isActive):
        raise Failure(f"the domain {name} is running: `virsh shutdown {name}` first")
    if host.call(domain.hasManagedSaveImage):
        raise Failure(
            f"the domain {name} has a saved memory, which would go on with other disks: `virsh "
            f"managedsave-remove {name}` first"
        )
    if host.call(domain.snapshotNum):
        raise Failure(
            f"the domain {name} has snapshots, which are of its old disks: remove them first "
            f"(`virsh snapshot-list {name}`), or --name another"
        )
    return domain


class OldDisks:
    """What is not needed any more when a restore is complete: at places that the new disks wanted, and
    the overwritten domain's others of such names.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._old: list[tuple[Place, Occupied]] = []
        self._stays: list[str] = []

    def add(self, place: Place, old: Occupied | None) -> None:
        if old is not None:
            self._old.append((place, old))

    def check(
        self, host: Host, name: str, existing: Any, place: Place, keys: Iterable[str]
    ) -> None:
        """See what an overwritten domain's disks are. Raises UsageError: another domain uses one."""
        known = {old.path for _, old in self._old}
        old_paths = paths_of(description_of(host, existing)) if existing is not None else ()
        names = "|".join(map(re.escape, keys))
        ours = re.compile(rf"{re.escape(name)}-(?:{names})(?:-\d+)?(?:\.raw|\.qcow2)?")
        for path in sorted(set(old_paths) - known):
            found = place.find(path) if ours.fullmatch(os.path.basename(path)) else None
            if found is not None:
                self._old.append((place, found))
            elif os.path.exists(path):
                self._stays.append(path)
        if not self._old:
            return
        paths = {old.path for _, old in self._old}
        for domain in host.call(host.connection.listAllDomains):
            other = domain.name()
            used = paths & paths_of(description_of(host, domain))
            if used and other != name:
                raise UsageError(
                    f"{sorted(used)[0]} is a disk of the domain {other}, and is not overwritten: "
                    "--name another"
                )

    def made(self) -> tuple[Made, ...]:
        """Return them as they are now, for a process that removes them later."""
        found = []
        for place, old in self._old:
            pool = place.name if isinstance(place, PoolPlace) else ""
            try:
                found.append(made_of(old.path, pool, old.volume))
            except OSError:
                continue  # it has gone
        return tuple(found)

    def tell_staying(self) -> None:
        for path in self._stays:
            self._notice(f"{path}, which the domain had before, stays")

    def remove(self, host: Host) -> None:
        """The domain is defined, and whole: remove what it has no use for."""
        try:
            used = paths_in_use(host) if self._old else frozenset()
        except LibvirtFailure:
            used = frozenset(old.path for _, old in self._old)
        for place, old in self._old:
            if old.path in used:
                self._stays.append(old.path)
                continue
            try:
                place.remove_old(old)
                self._notice(f"removed {old.path}, which the domain had before")
            except Failure as failure:
                self._notice(f"{old.path} is not needed any more, and stays: {failure}")
        self.tell_staying()


def drop_checkpoints(host: Host, domain: Any, notice: Callable[[str], None]) -> None:
    """Forget an overwritten domain's checkpoints: their bitmaps were on its old disks."""
    try:
        for checkpoint in host.call(domain.listAllCheckpoints):
            host.call(checkpoint.delete, host.lib.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    except LibvirtFailure as failure:
        notice(f"the old disks' checkpoints stay known to libvirt: {failure}")


def take_back(host: Host, domain: Any, before: str, notice: Callable[[str], None]) -> None:
    """Undefine a domain that could not be started; `before`: the XML of what had its name, or empty."""
    lib = host.lib
    try:
        if before:
            host.call(host.connection.defineXML, before)
            return
        flags = lib.VIR_DOMAIN_UNDEFINE_NVRAM
        try:
            # Libvirt before 8.9 knows nothing of it, and removes the state by itself.
            host.call(domain.undefineFlags, flags | getattr(lib, "VIR_DOMAIN_UNDEFINE_TPM", 0))
        except LibvirtFailure as failure:
            if failure.code != lib.VIR_ERR_INVALID_ARG:
                raise
            host.call(domain.undefineFlags, flags)
    except LibvirtFailure as failure:
        notice(f"the domain stays defined: {failure}")
