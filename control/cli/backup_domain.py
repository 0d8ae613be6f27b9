# SPDX-License-Identifier: Apache-2.0
"""A backup of a domain of libvirt's, as the command line asks for it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vmapipe.control.coordinator.job import Disk
from vmapipe.runtime.events import Emit
from vmapipe.runtime.uuids import random_uuid

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base
    from vmapipe.control.hosts.libvirt.running import DomainBackup
    from vmapipe.control.qemu.disks import LeftOut
    from vmapipe.control.qemu.freezing import Freezing
    from vmapipe.control.qemu.machine import RunningMachine


def open_domain(options: argparse.Namespace) -> DomainBackup | None:
    """Return the domain of --libvirt; None: another source. Raises UsageError, Failure."""
    if options.libvirt is None:
        return None
    # Imported here: others start sooner without.
    from vmapipe.control.hosts.libvirt.running import DomainBackup, Wishes
    from vmapipe.control.hosts.libvirt.scratch import DEFAULT_PLACE

    return DomainBackup(
        Wishes(
            options.libvirt,
            options.connect,
            options.scratch or DEFAULT_PLACE,
            options.scratch_size,
            options.disk,
            options.freeze,
        )
    )


def freezing_for(options: argparse.Namespace, domain: DomainBackup | None) -> Freezing | None:
    """Return how the guest is frozen when a job begins; None: it is not, or the domain does so itself."""
    if not options.agent:
        return domain.freezing if domain else None
    # Imported here: most backups do without.
    from vmapipe.control.qemu.guest_agent import freezing_of

    return freezing_of(options.agent)


def push_machine(options: argparse.Namespace, domain: DomainBackup) -> RunningMachine | None:
    """Return the domain's QEMU for our own engine, with --push. Raises UsageError, Failure."""
    return domain.push(options.guest_wait) if options.push else None


def choose_in_domain(
    options: argparse.Namespace, domain: DomainBackup, emit: Emit
) -> tuple[list[Disk], list[LeftOut], list[int]]:
    """Return the disks, those that are left out, and the descriptors of the domain's configurations.

    Those are put in front of the user's. Raises Failure, UsageError.
    """
    disks, left_out = domain.choose()
    configs, fds = domain.configs()
    options.config = [*configs, *options.config]
    while domain.notices:
        emit({"event": "notice", "text": domain.notices.pop(0)})
    return disks, left_out, fds


def track_domain(
    options: argparse.Namespace,
    domain: DomainBackup | None,
    disks: list[Disk],
    base: Base | None,
) -> list[Disk]:
    """Let libvirt record from this archive's instant on, if --base asks for that; return the disks."""
    if domain is None or options.base == "none":
        return disks
    options.uuid = options.uuid or random_uuid()
    return domain.track(options.uuid, base.uuid if base else None)
