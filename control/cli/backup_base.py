# SPDX-License-Identifier: Apache-2.0
"""The base of a backup, as the command line asks for it: found, and reported where there is none."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from vmapipe.control.coordinator.job import Disk
from vmapipe.control.coordinator.output_spec import is_path
from vmapipe.producer.pull.arguments import parse_nbd_disk
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.uuids import random_uuid

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base
    from vmapipe.control.hosts.libvirt.running import DomainBackup
    from vmapipe.control.qemu.bitmaps import BaseArchive
    from vmapipe.control.qemu.machine import RunningMachine
    from vmapipe.runtime.child_event_types import BaseChosenEvent

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


def add_base_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("incremental (docs/operations/incremental.md)")
    group.add_argument(
        "--base",
        default="none",
        metavar="auto|ARCHIVE|none",
        help="take what is unchanged from an earlier archive with a manifest; auto: from the newest of "
        "this machine beside the new one. The new archive is as full as any other (default: none)",
    )
    group.add_argument(
        "--full-every",
        type=whole_number,
        metavar="N",
        help="with --base: after so many incremental archives the next one is full; 0: never "
        f"(default: {FULL_EVERY})",
    )
    group.add_argument(
        "--sample",
        type=percent,
        metavar="PERCENT",
        help="with --base and --qmp: so much of what QEMU has not recorded as changed is read all the "
        "same and compared with the base, at least 64 clusters; any difference makes a full backup of "
        f"this one; 0: none (default: {SAMPLE_PERCENT:g})",
    )


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
    if options.no_manifest or options.manifest:
        text = (
            "this archive cannot be the base of a later one, whose backup will be full: its manifest is not "
            "beside it (--manifest, --no-manifest)"
        )
        emit({"event": "notice", "text": text})
    if is_chosen_there(options):
        if machine is not None:
            track(options, machine, "the service has not said which")
        return None
    # Imported here: other backups start sooner without.
    from vmapipe.archiver.base.choice import usable_base

    if options.monitor is not None:
        _report(emit, devices, "a monitor that serves disks does not record what changes in them")
        return None
    recorder = machine or domain
    recorded = recorder.recorded_archives() if recorder else frozenset[bytes]()
    found = usable_base(_find(options, devices, recorded), options.full_every)
    if machine is not None:
        if options.sample and not isinstance(found, str) and not found.totals.cluster_digests_bytes:
            found = _without_digests(found.archive)
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
    if is_path(options.archive) or is_object(options.archive):
        return choose_base(options.archive, devices, recorded)
    return f"{options.archive} is not a file or an object: only beside one is a base looked for"


def track(options: argparse.Namespace, machine: RunningMachine, found: Base | str) -> None:
    """Let QEMU record from this archive's instant on, under its uuid, and use what it has recorded."""
    from vmapipe.control.coordinator.live_base import base_archive

    options.uuid = random_uuid()
    _track_since(options, machine, found if isinstance(found, str) else base_archive(found))


def _track_since(
    options: argparse.Namespace, machine: RunningMachine, base: BaseArchive | str
) -> None:
    from vmapipe.control.qemu.change_tracking import TrackingOptions

    why_full = base if isinstance(base, str) else ""
    since = None if isinstance(base, str) else base
    machine.track_changes(TrackingOptions(options.uuid, since, why_full, options.sample))


def is_chosen_there(options: argparse.Namespace) -> bool:
    """Tell whether a service chooses the base."""
    return bool(options.archiver) and options.base == "auto" and options.monitor is None


def service_base_options(
    options: argparse.Namespace, machine: RunningMachine | None
) -> Sequence[str]:
    """Return what a service has to know to choose the base."""
    recorded = machine.recorded_archives() if machine else frozenset[bytes]()
    since = sorted(each.hex() for each in recorded if each)
    return [f"--full-every={options.full_every}", *(f"--recorded={each}" for each in since)]


def base_taker(
    options: argparse.Namespace, machine: RunningMachine | None
) -> Callable[[BaseChosenEvent], None] | None:
    """Return who takes the base that a service has chosen, before the instant; None: nobody has to."""
    if machine is None:
        return None

    def take(chosen: BaseChosenEvent) -> None:
        from vmapipe.control.qemu.bitmaps import BaseArchive

        if chosen["reason"]:
            _track_since(options, machine, chosen["reason"])
        elif options.sample and not chosen["compares"]:
            _track_since(options, machine, _without_digests(chosen["archive"]))
        else:
            sizes = {device["name"]: device["bytes"] for device in chosen["devices"]}
            _track_since(options, machine, BaseArchive(bytes.fromhex(chosen["uuid"]), sizes))

    return take


def _without_digests(archive: str) -> str:
    return (
        f"{archive} has no digests of its clusters, with which a sample of what has not changed could "
        "be compared (--sample 0 does without)"
    )


def check_base_options(options: argparse.Namespace) -> None:
    """Fill in what follows from others. Raises UsageError."""
    for name, value in (("--full-every", options.full_every), ("--sample", options.sample)):
        if value is not None and options.base == "none":
            raise UsageError(f"{name} says something of --base: give that, too")
    if options.full_every is None:
        options.full_every = FULL_EVERY
    if options.sample is None:
        options.sample = SAMPLE_PERCENT
    if options.base == "none":
        return
    if not options.base:
        raise UsageError("--base is empty: say auto, none, or the path of an archive")
    if options.uuid and options.qmp:
        raise UsageError(
            "--base with --qmp: QEMU's records of what has changed are named after the uuid of their "
            "archive, and each archive needs one of its own: leave out --uuid"
        )
    if options.archiver:
        _check_with_service(options)
    if options.stable:
        raise UsageError(
            "--stable gives all archives of a machine one uuid; --base tells by it which archive a "
            "machine's changes count from: use one of them"
        )
    if options.reproducible:
        raise UsageError(
            "--reproducible makes the same bytes of the same disks; with --base they depend on the base"
        )


def _check_with_service(options: argparse.Namespace) -> None:
    """Raises UsageError."""
    if options.base != "auto":
        raise UsageError(
            "--base with --archiver is auto or none: a client names no archives at a service, which "
            "chooses the newest of the same machine by itself"
        )
    if options.libvirt is not None:
        raise UsageError(
            "--base with --libvirt needs an archiver of this host: libvirt's checkpoint is chosen by "
            "the base before a service has said which that is"
        )
    if any(parse_nbd_disk(text).bitmap for text in options.nbd):
        raise UsageError(
            "bitmap= with --archiver: what a bitmap counts from cannot be held against a base that "
            "only the service sees; leave out bitmap=, or have the archiver on this host"
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
    is_named = is_path(options.archive) or is_object(options.archive)
    return is_named and are_files and not options.trim
