# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup`: the command line of a backup job."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from vmapipe.archiver.arguments import add_output_options
from vmapipe.control.cli.backup_arguments import (
    add_drill_options,
    add_libvirt_options,
    add_proxmox_options,
    add_pve_options,
    add_service_options,
    add_source_options,
    add_speed_option,
    archiver_options,
    buffer_options,
    check_libvirt,
    check_order,
    check_without_pve,
    in_turn,
    latency_wish,
    open_configs,
    parse_disk,
    parse_nbd,
    service_of,
)
from vmapipe.control.cli.backup_base import (
    add_base_options,
    base_of,
    base_taker,
    can_run_again,
    check_base_options,
    is_chosen_there,
    service_base_options,
    track,
    without_foreign_bitmaps,
)
from vmapipe.control.cli.backup_domain import (
    choose_in_domain,
    freezing_for,
    open_domain,
    push_machine,
    track_domain,
)
from vmapipe.control.cli.backup_sealing import archive_ending, check_sealing
from vmapipe.control.coordinator.job import BackupJob, Disk, JobPlan
from vmapipe.control.coordinator.observers import (
    JobContext,
    ParentContext,
    add_attending_options,
    job_context,
)
from vmapipe.control.coordinator.output_spec import goes_to_stdout, inherited_fds, is_path
from vmapipe.control.coordinator.priorities import add_priority_options, priorities
from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.control.coordinator.service import Service
from vmapipe.runtime.arguments import (
    add_buffer_options,
    add_child_options,
    make_parser,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.events import ChildCommands, ignore
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.process import run, run_child
from vmapipe.runtime.uuids import random_uuid

if TYPE_CHECKING:
    from vmapipe.control.coordinator.proxmox import ConfigDisk, Configs
    from vmapipe.control.qemu.disks import LeftOut
    from vmapipe.control.qemu.machine import RunningMachine

DESCRIPTION = """\
Back up disks into one VMA archive: disks at rest (raw image files or block
devices, NBD exports), those of a running QEMU, of a domain of libvirt's, or those
that a monitor serves to a running guest; disks in use all at one instant.
A process of its own reads each disk; another writes the archive, which appears
under its name only when it is complete and on disk. Holes and zeroes cost
next to nothing; of a running QEMU's disk some 0.04 s a GiB, but in qcow2
without a backing file.
"""

EPILOG = """\
ARCHIVE is a new file, - (stdout), a FIFO or character device, exec:COMMAND,
fd:N, /dev/fdset/N or s3://BUCKET/KEY (credentials as for any S3 tool: AWS_... or
~/.aws). Beside a file or object, ARCHIVE.manifest.json gets the digests with
which `vmapipe verify` finds damaged data.

A disk that cannot be read where a running guest writes costs the backup, not
the guest's write, with QEMU from 10.1 on, with 10.0, and with 7.2 from 7.2.15
on. Not with the two last ones for a moment at the instant itself, nor for disks
of a qemu-storage-daemon, below a throttle filter, of several devices, removable
ones, 7.2's in an I/O thread, and large thin ones that are mostly empty: there
and with other versions the write fails as QEMU's own backup lets it.

examples:
  vmapipe backup --disk drive-scsi0=/srv/vm.raw --config qemu-server.conf vm.vma
  vmapipe backup --disk /dev/vg0/vm --compress zstd vm.vma.zst
  vmapipe backup --nbd 'vda=nbd+unix:///vda?socket=/run/backup.sock' vm.vma
  vmapipe backup --libvirt vm --compress zstd vm.vma.zst
  vmapipe backup --qmp /run/vm/qmp.sock --config vm.conf vm.vma
  vmapipe backup --qmp /run/vm/qmp.sock --state --config vm.conf vm.vma
  vmapipe backup --monitor /run/vm/monitor.sock --config vm.conf vm.vma
  vmapipe backup --qmp /run/vm/qmp.sock --vmid 100 --config 100.conf /var/lib/vz/dump
  vmapipe backup --pve all --exclude 105 --compress zstd local
  vmapipe backup --disk /srv/vm.raw - | ssh backup.example 'cat > vm.vma'
  vmapipe backup --archiver tcp://backup.example:7777 --keys /etc/vmapipe/keys \\
                 --disk /srv/vm.raw vm.vma

exit codes: 0 stored, 1 failed (nothing was stored, but where --drill could not test), 2 wrong use,
4 stored, and with --drill the machine did not boot, 130/143 ended by a signal
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG, has_log=True)
    add_source_options(parser)
    add_libvirt_options(parser)
    add_output_options(parser)
    add_service_options(parser)
    add_buffer_options(parser)
    add_speed_option(add_priority_options(parser))
    add_proxmox_options(parser)
    add_pve_options(parser)
    add_drill_options(parser)
    add_base_options(parser)
    add_report_options(parser)
    add_attending_options(parser)
    add_child_options(parser)
    parser.add_argument(
        "archive",
        metavar="ARCHIVE",
        nargs="?",
        help="where the archive goes; with --pve a folder, or a storage of Proxmox VE",
    )
    options = parser.parse_args(argv)
    if options.pve:
        # Imported here: other backups start sooner without.
        from vmapipe.control.cli.backup_pve import backup_machines

        return run(prog, lambda: backup_machines(options))
    if options.archive is None:
        parser.error("the following arguments are required: ARCHIVE")
    if options.parent_fd is None:
        return run(prog, lambda: _backup(options))
    commands = ChildCommands()
    return run_child(
        prog,
        options.parent_fd,
        lambda cancel, emit: _backup(options, ParentContext(emit, cancel, commands)),
        ignore,
        commands.put,
    )


def _backup(options: argparse.Namespace, parent: ParentContext | None = None) -> None:
    service = service_of(options)
    _check(options)
    if options.vmid is not None:
        # Imported here, as all that only these archives need: other backups start sooner without.
        from vmapipe.control.coordinator.proxmox import archive_name

        name = archive_name(options.vmid, time.time(), archive_ending(options))
        options.archive = os.path.join(options.archive, name)
    # First of all, before we open descriptors of our own.
    pass_fds = [*([] if service else inherited_fds(options.archive))]
    pass_fds += [*inherited_fds(options.manifest or ""), *open_configs(options)]
    place = service.name_of(options.archive) if service else _full_name(options.archive)
    if parent is not None:
        with job_context(options, place, parent) as around:
            run_job(options, service, pass_fds, around)
        return
    cancel = Cancel()
    cancel.on_signals()
    # With the archive on stdout, every word goes to stderr.
    to_stdout = not service and goes_to_stdout(options.archive)
    stream = sys.stderr if to_stdout else sys.stdout
    with renderer("backup", options, stream) as emit:
        with job_context(options, place, ParentContext(emit, cancel, ChildCommands())) as around:
            run_job(options, service, pass_fds, around)
        if options.drill:
            # Here: other backups start sooner without.
            from vmapipe.control.cli.drill import drill_stored

            drill_stored(options.archive, options.drill_plan, cancel, emit)


def _full_name(archive: str) -> str:
    """Return its name as seen from another folder."""
    return os.path.abspath(archive) if is_path(archive) else archive


def _check_drill(options: argparse.Namespace) -> None:
    """Raises UsageError."""
    if options.drill_plan and not options.drill:
        raise UsageError("--drill-plan belongs to --drill")
    if options.drill and (options.archiver or not is_path(options.archive)):
        raise UsageError(
            "--drill boots from an archive that is a file of this host: run `vmapipe drill` where the "
            "archive is"
        )
    if options.drill and options.parent_fd is not None:
        raise UsageError("--drill is for a backup that is started by hand")
    if options.drill and options.vmid is None and not _is_for_a_file(options.archive):
        raise UsageError(f"--drill needs an archive that is a file: {options.archive} is none")


def _is_for_a_file(archive: str) -> bool:
    """What is there already is refused later, with the reason."""
    return os.path.isfile(archive) or not os.path.exists(archive)


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError."""
    _check_drill(options)
    check_without_pve(options)
    check_libvirt(options)
    if options.freeze and not options.agent and options.libvirt is None:
        raise UsageError(
            "--freeze needs --agent SOCKET: only the guest's own agent can freeze its file systems"
        )
    if options.agent and options.qmp is None and options.monitor is None:
        raise UsageError("--agent needs --qmp or --monitor: a disk at rest needs no freezing")
    if options.state and options.qmp is None:
        raise UsageError("--state needs --qmp: only QEMU can save a machine's memory")
    if options.qmp_share and options.qmp is None:
        raise UsageError("--qmp-share says how --qmp is used: it needs that")
    if options.qmp_share and options.state:
        raise UsageError(
            "--state needs QEMU's monitor for itself, from the instant until the memory is saved: "
            "leave out --qmp-share"
        )
    if options.state and options.agent:
        raise UsageError(
            "--state needs no --agent: what is in the guest's memory is saved with it, and the "
            "restored guest would still be frozen"
        )
    check_order(options)
    latency_wish(options)
    if options.force_share and (options.qmp or options.monitor or options.libvirt):
        raise UsageError(
            "--force-share is for disks at rest: a disk in use is read as of one instant"
        )
    if options.nbd and (options.qmp or options.monitor):
        raise UsageError(
            "--nbd is for exports that do not change: the disks of --qmp and --monitor are of an "
            "instant of their own; make two archives"
        )
    check_base_options(options)
    check_sealing(options)
    if options.trim and not options.nbd:
        raise UsageError("--trim frees what --nbd has read: it needs that")
    if options.notes and options.vmid is None:
        raise UsageError("--notes needs --vmid: only Proxmox VE's archives have a place for them")
    if options.vmid is not None and is_object(options.archive):
        raise UsageError(
            "--vmid makes a log and notes beside the archive: ARCHIVE is a folder then"
        )


def run_job(
    options: argparse.Namespace,
    service: Service | None,
    pass_fds: list[int],
    around: JobContext,
    configs: Configs | None = None,
) -> None:
    """Run one backup to its end. `configs`: of --vmid, if they have been read. Raises Failure."""
    machine, domain = open_machine(options), open_domain(options)
    try:
        if options.vmid is not None and configs is None:
            from vmapipe.control.coordinator.proxmox import read_configs

            configs = read_configs(options.config, options.vmid, around.cancel)
        if domain:
            machine = push_machine(options, domain)
            disks, left_out, fds = choose_in_domain(options, domain, around.emit)
            pass_fds = pass_fds + fds
        else:
            disks, left_out = choose_disks(options, configs.disks if configs else (), machine)
        for name, reason, level in left_out:
            around.emit({"event": "skipped", "device": name, "reason": reason, "level": level})
        if configs:
            options.config, fds = configs.stored([disk.name for disk in disks])
            pass_fds = pass_fds + fds
        names = [disk.name for disk in disks]
        base = base_of(options, names, machine, around.emit, domain)
        chosen_there = is_chosen_there(options)
        if base is not None and options.nbd:
            disks = without_foreign_bitmaps(disks, options.nbd, base.uuid, around.emit)
        disks = disks if machine else track_domain(options, domain, disks, base)
        plan = JobPlan(
            job_id=around.job_id,
            disks=disks,
            base=base.archive if base else "auto" if chosen_there else "",
            base_options=service_base_options(options, machine) if chosen_there else (),
            on_base=base_taker(options, machine) if chosen_there else None,
            with_digests=options.base != "none"
            and not (domain or options.monitor or (machine and not options.sample)),
            archive=options.archive,
            archiver_options=archiver_options(options),
            speed_bytes_s=options.speed,
            latency=latency_wish(options),
            pass_fds=pass_fds,
            buffer_options=buffer_options(options, len(disks)),
            machine=machine,
            with_memory=options.state,
            snapshot=None if machine else domain,
            freezing=freezing_for(options, domain),
            service=service,
            in_turn=in_turn(options),
            priorities=priorities(options),
            server=around.server,
        )
        job = BackupJob(plan)
        try:
            job.run(around.emit, around.cancel, around.commands)
        except Failure:
            if not job.base_damage or not can_run_again(options, pass_fds):
                raise
            _run_full(options, configs.disks if configs else (), job, around)
    finally:
        if machine:
            machine.end()
        if domain:
            domain.end()


def _run_full(
    options: argparse.Namespace,
    configured: Sequence[ConfigDisk],
    failed: BackupJob,
    around: JobContext,
) -> None:
    """Back up in full what could not be backed up with its base. Raises Failure."""
    text = f"{failed.base_damage}. This is a full backup instead"
    around.emit({"event": "notice", "text": text})
    machine, domain = open_machine(options), open_domain(options)
    try:
        disks = list(failed.plan.disks)
        if domain:
            machine = push_machine(options, domain)
            disks, _ = domain.choose()
        elif machine:
            disks, _ = choose_disks(options, configured, machine)
        if machine and disks != failed.plan.disks:
            raise Failure(f"{failed.base_damage}; and the machine's disks have changed meanwhile")
        if machine:
            track(options, machine, failed.base_damage)
        elif domain:
            options.uuid = None
            disks = track_domain(options, domain, disks, None)
        plan = failed.plan._replace(
            disks=disks,
            base="",
            on_base=None,
            # A service knows the one before by its id.
            job_id=random_uuid(),
            machine=machine,
            snapshot=None if machine else domain,
            archiver_options=archiver_options(options),
        )
        BackupJob(plan).run(around.emit, around.cancel, around.commands)
    finally:
        if machine:
            machine.end()
        if domain:
            domain.end()


def open_machine(options: argparse.Namespace) -> RunningMachine | None:
    """Raises UsageError, Failure."""
    if options.qmp is None:
        return None
    if options.monitor is not None:
        raise UsageError("--qmp and --monitor are two ways to disks in use: choose one")
    if options.spool:
        raise UsageError(
            "--spool has no use with --qmp: QEMU sends as fast as we take, so it would fill up; "
            "use --buffer and --speed"
        )
    # Imported here: it takes as long as all the rest of a start.
    from vmapipe.control.qemu.machine import RunningMachine

    return RunningMachine(
        options.qmp, options.guest_wait, with_memory=options.state, share=options.qmp_share
    )


def _disks_at_rest(options: argparse.Namespace) -> list[Disk]:
    """Raises UsageError."""
    shared = ("--force-share",) if options.force_share else ()
    disks = [parse_disk(text) for text in options.disk]
    disks += [parse_nbd(text, options) for text in options.nbd]
    return [disk._replace(reading=(*disk.reading, *shared)) for disk in disks]


def choose_disks(
    options: argparse.Namespace,
    configured: Sequence[ConfigDisk] = (),
    machine: RunningMachine | None = None,
) -> tuple[list[Disk], list[LeftOut]]:
    """Return the disks to back up, and those of the machine that are not. Raises UsageError, Failure.

    `configured`: what the configuration of a machine with --vmid says of its disks.
    """
    excluded = {d.device: d.excluded for d in configured if d.excluded}
    if machine is None and options.monitor is None and not configured:
        return _disks_at_rest(options), []
    # Imported here: a backup of disks at rest starts sooner without.
    from vmapipe.control.qemu.disks import DiskChoiceOptions

    if machine:
        read_only = {d.device for d in configured if d.options.get("media") != "cdrom"}
        only = frozenset(d.device for d in configured) if options.pve else None
        taken = frozenset(read_only - set(excluded))
        wishes = DiskChoiceOptions(options.disk, excluded, taken, only)
        choice = machine.choose(wishes)
        disks = [Disk(disk.name, "", size_bytes=disk.size_bytes) for disk in choice.disks]
        left_out = list(choice.left_out)
    elif options.monitor is not None:
        disks, left_out = _choose_served(options, excluded)
    else:
        disks, left_out = _disks_at_rest(options), []
    if configured:
        known = {disk.name for disk in disks} | {out.device for out in left_out}
        left_out += _not_there(configured, known, excluded)
    return disks, left_out


def _not_there(
    configured: Sequence[ConfigDisk], known: Collection[str], excluded: Mapping[str, str]
) -> list[LeftOut]:
    """Return the disks of the configuration that the machine does not have."""
    from vmapipe.control.coordinator.proxmox import NOT_THERE
    from vmapipe.control.qemu.disks import LeftOut

    return [
        LeftOut(
            disk.device,
            excluded.get(disk.device, NOT_THERE),
            "warn" if disk.is_backed_up else "info",
        )
        for disk in configured
        if disk.device not in known
    ]


def _choose_served(
    options: argparse.Namespace, excluded: Mapping[str, str]
) -> tuple[list[Disk], list[LeftOut]]:
    """Choose among a monitor's disks. Raises UsageError, Failure."""
    from vmapipe.control.monitor.client import guarded_disks
    from vmapipe.control.qemu.disks import NOT_CHOSEN, LeftOut

    served = {disk.name: disk for disk in guarded_disks(options.monitor)}
    for name in options.disk:
        if name not in served:
            known = ", ".join(sorted(served))
            raise UsageError(f"the monitor at {options.monitor} has no disk {name!r}, but {known}")
    wanted = dict.fromkeys(options.disk or (name for name in served if name not in excluded))
    return [Disk(name, "", served[name].guard) for name in wanted], [
        LeftOut(name, NOT_CHOSEN if options.disk else excluded[name], "info")
        for name in served
        if name not in wanted
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "vmapipe backup"))
