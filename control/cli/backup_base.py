# SPDX-License-Identifier: Apache-2.0
"""The base of a backup, as the command line asks for it: found, and reported where there is none."""

from __future__ import annotations

import argparse
import os
import stat
import uuid
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from vmapipe.control.coordinator.job import Disk
from vmapipe.control.coordinator.output_spec import is_path
from vmapipe.producer.pull.arguments import parse_nbd_disk
from vmapipe.runtime.events import Emit

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base
    from vmapipe.control.hosts.libvirt.running import DomainBackup
    from vmapipe.control.qemu.machine import RunningMachine

#: So many incremental archives follow a full one: what no check finds ends with it.
FULL_EVERY = 30


#: So much of what has not changed is read all the same, in percent.
SAMPLE_PERCENT = 1.0


def whole_number(text: str) -> int:
    """Parse a number of archives."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(text)


def percent(text: str) -> float:
    """Parse a percentage; 0 is none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a percentage: 0 to 100")
    return value


def base_of(
    options: argparse.Namespace,
    devices: Sequence[str],
    machine: RunningMachine | None,
    emit: Emit,
    domain: DomainBackup | None = None,
) -> Base | None:
    """Return the base; None: there is none, and it is reported why.

    A running QEMU reports it later, and is told here what its records may build on. `domain`: whose
    changes libvirt records.
    """
    if options.base == "none":
        return None
    # Imported here: other backups start sooner without.
    from vmapipe.control.coordinator.live_base import usable_base

    if options.monitor is not None:
        _report(emit, devices, "a monitor that serves disks does not record what changes in them")
        return None
    recorder = machine or domain
    recorded = recorder.recorded_archives() if recorder else frozenset[bytes]()
    found = usable_base(_find(options, devices, recorded), options.full_every)
    if machine is not None:
        if options.sample and not isinstance(found, str) and not found.totals.cluster_digests_bytes:
            found = (
                f"{found.archive} has no digests of its clusters, with which a sample of what has not "
                "changed could be compared (--sample 0 does without)"
            )
        track(options, machine, found)
        # Of no use where QEMU has not recorded since then.
        return found if not isinstance(found, str) and found.uuid in recorded else None
    if not isinstance(found, str):
        return found
    _report(emit, devices, found)
    return None


def _report(emit: Emit, devices: Sequence[str], reason: str) -> None:
    """Report why all disks are backed up in full."""
    emit(
        {
            "event": "base",
            "archive": "",
            "uuid": "",
            "devices": [{"name": name, "incremental": False, "reason": reason} for name in devices],
        }
    )


def _find(
    options: argparse.Namespace, devices: Sequence[str], recorded: Collection[bytes]
) -> Base | str:
    from vmapipe.archiver.base.check import check_base
    from vmapipe.archiver.base.choice import choose_base

    if options.base != "auto":
        return check_base(options.base)
    if is_path(options.archive):
        return choose_base(options.archive, devices, recorded)
    return f"{options.archive} is not a file: only beside one is a base looked for"


def track(options: argparse.Namespace, machine: RunningMachine, found: Base | str) -> None:
    """Let QEMU record from this archive's instant on, under its uuid, and use what it has recorded."""
    from vmapipe.control.coordinator.live_base import base_archive
    from vmapipe.control.qemu.change_tracking import TrackingOptions

    options.uuid = uuid.uuid4().bytes
    machine.track_changes(
        TrackingOptions(
            options.uuid,
            None if isinstance(found, str) else base_archive(found),
            found if isinstance(found, str) else "",
            options.sample,
        )
    )


def without_foreign_bitmaps(
    disks: Sequence[Disk], exports: Sequence[str], base: bytes, emit: Emit
) -> list[Disk]:
    """Return the disks, without bitmaps named after another archive than the base, or another disk of it."""
    # Imported here: other backups start sooner without.
    from vmapipe.control.qemu.bitmaps import archive_of, disk_of

    foreign = dict[str, str]()
    for export in map(parse_nbd_disk, exports):
        other = ""
        if archive_of(export.bitmap) not in (b"", base):
            other = "records since another archive than the base"
        elif disk_of(export.bitmap) not in ("", export.name):
            other = f"is of another disk in the base: {disk_of(export.bitmap)!r}"
        if other:
            foreign[export.name] = f"--bitmap={export.bitmap}"
            text = f"disk {export.name!r}: all of it is read: the bitmap {export.bitmap!r} {other}"
            emit({"event": "notice", "text": text})
    return [
        disk._replace(reading=tuple(w for w in disk.reading if w != foreign.get(disk.name)))
        for disk in disks
    ]


def can_run_again(options: argparse.Namespace, pass_fds: Sequence[int]) -> bool:
    """Tell whether nothing of a failed backup is left, and all that it was given can be read again."""
    # What --trim has freed cannot be.
    are_files = all(stat.S_ISREG(os.fstat(fd).st_mode) for fd in pass_fds)
    return is_path(options.archive) and are_files and not options.trim
