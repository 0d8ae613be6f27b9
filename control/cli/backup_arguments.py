# SPDX-License-Identifier: Apache-2.0
"""The options that only `vmapipe backup` has, by theme."""

from __future__ import annotations

import argparse
import os
import re
import stat

from vmapipe.archiver.arguments import lock_arguments
from vmapipe.control.cli.backup_sealing import sealing_options
from vmapipe.control.coordinator.job import Disk
from vmapipe.control.coordinator.priorities import buffer_of_each
from vmapipe.control.coordinator.service import Service
from vmapipe.control.coordinator.steering import LatencyWish
from vmapipe.control.qmp.addresses import add_monitor_options
from vmapipe.producer.pull.arguments import add_nbd_options, parse_nbd_disk, parse_uri
from vmapipe.producer.pull.uri import is_nbd_uri
from vmapipe.runtime.arguments import (
    add_connect_option,
    add_first_group,
    add_tcp_options,
    check_endpoint,
    kib_per_s,
    latency,
    minutes,
    size,
    split_named,
)
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.image_format import format_of_content
from vmapipe.runtime.text import name_text, without_user


def add_source_options(parser: argparse.ArgumentParser) -> None:
    what = add_first_group(parser, "what to back up")
    what.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="[NAME=]PATH[,format=FORMAT]",
        help="a disk, and its name in the archive (default: the file's name); images that are not "
        "raw need their format (qcow2, vmdk, vhdx, vdi, ...), and ,snapshot=NAME or ,offset=BYTES "
        "may follow; may be repeated",
    )
    add_nbd_options(what, several=True)
    what.add_argument(
        "--force-share",
        action="store_true",
        help="read disks at rest although another program may write to them: the archive may then "
        "hold what never was on the disk at one time",
    )
    what.add_argument(
        "--monitor",
        metavar="SOCKET",
        help="back up the disks of this monitor while they are in use; --disk NAME then chooses "
        "some of them",
    )
    add_monitor_options(
        what,
        help="back up the disks of the running QEMU whose QMP monitor this is (--disk [NAME=]DEVICE "
        "then chooses some of them, by their name in the archive, device, node or id, and NAME is "
        "what one is called in the archive)",
    )
    what.add_argument(
        "--state",
        action="store_true",
        help="with --qmp: the machine's memory and devices, too, of the same instant as the disks; "
        "docs/operations/backup.md tells how to let the machine go on from there",
    )
    what.add_argument(
        "--agent",
        metavar="SOCKET",
        help="freeze the guest's file systems for the instant, through this guest agent "
        "(with --qmp or --monitor); they are thawed whatever happens",
    )
    what.add_argument(
        "--freeze",
        action="store_true",
        help="with --libvirt: freeze the guest's file systems for the instant, through its agent; with "
        "--agent, which freezes without it, too: says so in a script",
    )


def add_libvirt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("domains of libvirt's")
    add_domain_options(
        group,
        help="back up this domain, by name or uuid: running, all disks of one instant, through "
        "libvirt's own backup job; shut off, its images (--disk [NAME=]TARGET then chooses some disks, "
        "such as vda; --freeze freezes the guest's file systems for the instant)",
    )
    group.add_argument(
        "--scratch-size",
        type=size,
        default=0,
        metavar="SIZE",
        help="most that all scratch files together may take; when they are full the backup fails, and "
        "the guest goes on (default: all that is free but 256M)",
    )

    group.add_argument(
        "--push",
        action="store_true",
        help="have QEMU send old data itself, through libvirt's monitor: no scratch files, and any disk; "
        "libvirt marks the domain as tainted (custom-monitor), and does not know of the backup",
    )


def add_domain_options(group: argparse._ActionsContainer, help: str) -> None:
    """Add the options that name a domain, and where a backup of it has its scratch files."""
    group.add_argument("--libvirt", metavar="DOMAIN", help=help)
    group.add_argument(
        "--connect",
        default="",
        metavar="URI",
        help="where libvirt is: qemu:///system, qemu:///session (default: LIBVIRT_DEFAULT_URI, or what "
        "libvirt chooses)",
    )
    group.add_argument(
        "--scratch",
        default="",
        metavar="DIR",
        help="where QEMU keeps what the guest overwrites during a backup, in a folder that is removed "
        "afterwards (default: /var/tmp)",
    )


def check_libvirt(options: argparse.Namespace) -> None:
    """Check what goes with --libvirt. Raises UsageError."""
    if options.libvirt is None:
        for name in ("connect", "scratch", "scratch_size", "push"):
            if getattr(options, name):
                raise UsageError(f"--{name.replace('_', '-')} belongs to --libvirt")
        return
    others = ("pve", "qmp", "monitor", "nbd", "state", "agent", "vmid", "spool", "reproducible")
    for name in others:
        if getattr(options, name) not in (None, False, "", []):
            raise UsageError(f"--{name} does not go with --libvirt{_INSTEAD.get(name, '')}")


_INSTEAD = {
    "agent": ": libvirt has the guest agent's socket, and --freeze freezes through it",
    "state": ": libvirt's backup job is of the disks only",
    "spool": ": old data waits in scratch files (--scratch)",
}


def add_speed_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--speed",
        type=size,
        default=0,
        metavar="BYTES/S",
        help="read at most this much a second, all disks together; K, M, G, T are powers of 1024 "
        "(what a guest's writes save is not slowed down)",
    )
    parser.add_argument(
        "--guest-latency",
        type=latency,
        metavar="TIME",
        help="read more slowly while the guest of disks in use waits longer than this for more than one "
        "in a hundred of its reads and writes (like 20ms, 0.1s; default: off)",
    )
    parser.add_argument(
        "--latency-floor",
        type=size,
        default=8 << 20,  # a terabyte in 35 hours; a disk that turns hardly feels it
        metavar="BYTES/S",
        help="what --guest-latency leaves the backup in any case (default: 8M)",
    )


def latency_wish(options: argparse.Namespace) -> LatencyWish | None:
    """Return what the guest may feel; None: that is not measured. Raises UsageError."""
    if options.guest_latency is None:
        return None
    if not (options.qmp or options.monitor or options.libvirt or options.pve):
        raise UsageError(
            "--guest-latency is for disks that a guest uses (--qmp, --monitor, --libvirt, --pve): for "
            "disks at rest there is --speed"
        )
    return LatencyWish(options.guest_latency, max(1, options.latency_floor))


def add_proxmox_options(parser: argparse.ArgumentParser) -> None:
    proxmox = parser.add_argument_group("as Proxmox VE does it")
    proxmox.add_argument(
        "--vmid",
        type=int,
        metavar="N",
        help="name everything as Proxmox VE's vzdump does for this machine, so that qmrestore "
        "takes it: ARCHIVE is then a folder, and a log is written beside the archive",
    )
    proxmox.add_argument(
        "--notes", default="", metavar="TEXT", help="with --vmid: notes beside the archive"
    )


def add_pve_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "machines of this Proxmox VE node",
        "Running or not, each into an archive of its own, one after the other. ARCHIVE is a folder, or a\n"
        "storage with content backup; without it, as /etc/vzdump.conf says.",
    )
    group.add_argument(
        "--pve",
        action="append",
        default=[],
        metavar="VMID|all|POOL|TAG",
        help="back up these machines: numbers, all of this node, those of a pool (pool:NAME) or with a "
        "tag (tag:NAME); with commas, or repeated",
    )
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="VMID|POOL|TAG",
        help="with --pve: but not these",
    )
    group.add_argument(
        "--mode",
        choices=("snapshot", "suspend", "stop"),
        help="with --pve: back up a running machine as it runs (snapshot, the default); paused until the "
        "backup has begun (suspend); or shut down first, and started again with the backup (stop)",
    )
    group.add_argument(
        "--stopwait",
        type=minutes,
        metavar="MINUTES",
        help="with --mode stop: a machine may take so long to shut down (default: 10, or vzdump.conf's)",
    )
    group.add_argument(
        "--bwlimit",
        type=kib_per_s,
        metavar="KIB/S",
        help="with --pve: --speed in vzdump's unit, KiB a second",
    )
    group.add_argument(
        "--protected",
        action="store_true",
        help="with --pve: mark the archives as protected from pruning",
    )
    group.add_argument(
        "--pve-root",
        metavar="DIR",
        help="with --pve: the node's files are below this folder (default: $VMAPIPE_PVE_ROOT, or /)",
    )


def check_without_pve(options: argparse.Namespace) -> None:
    """Raises UsageError for options that only a backup with --pve has."""
    for word in ("exclude", "pve_root", "mode", "stopwait", "bwlimit", "protected"):
        if getattr(options, word):
            raise UsageError(f"--{word.replace('_', '-')} belongs to --pve")


def add_drill_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the restore test")
    group.add_argument(
        "--drill",
        action="store_true",
        help="when the archive is stored, boot the machine in it and say whether it did, as `vmapipe "
        "drill` does; exit code 4 if it did not, and the archive stays",
    )
    group.add_argument(
        "--drill-plan", metavar="FILE", help="with --drill: what has to answer, as TOML"
    )


def add_service_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("to a service on another host")
    group.add_argument(
        "--archiver",
        metavar="ENDPOINT",
        help="store the archive at this service (tcp://HOST:PORT) and not on this host: ARCHIVE is "
        "then its name there, a plain one, and --threads the service's own",
    )
    add_tcp_options(group, "our key pair, and the archiver's server.pub")
    add_connect_option(group)


def buffer_options(options: argparse.Namespace, disks: int) -> list[str]:
    """Return the options of the buffer of each of so many live disks. Raises UsageError."""
    return [
        f"--buffer={buffer_of_each(options.buffer, options.buffer_total, disks)}",
        f"--spool={options.spool}",
        f"--spool-size={options.spool_size}",
        f"--guest-wait={options.guest_wait}",
    ]


def open_configs(options: argparse.Namespace) -> list[int]:
    """Descriptors of configs that are pipes (stdin, a shell's `<(…)`), which only we can read.

    Rewrites their words in `options.config` to name the descriptor.
    """
    fds = []
    for index, text in enumerate(options.config):
        name, path = split_named(text)
        try:
            if not stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith("/dev/"):
                continue
            # The process that reads it waits for its writer, and can be stopped.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise Failure(f"unable to read file '{path}': {os_error_text(error)}") from error
        fds.append(fd)
        options.config[index] = f"{name}=/dev/fd/{fd}"
    return fds


def archiver_options(options: argparse.Namespace) -> list[str]:
    """The options that a backup hands on to its archiver."""
    # With "=", because a name may begin with a dash.
    argv = [f"--config={config}" for config in options.config]
    if options.compress:
        argv.append(f"--compress={options.compress}")
    argv += sealing_options(options)
    argv += lock_arguments(options)
    if not options.archiver:
        argv.append(f"--threads={options.threads}")
    if options.manifest:
        argv.append(f"--manifest={options.manifest}")
    if options.no_manifest:
        argv.append("--no-manifest")
    elif options.json and not options.archiver:
        argv.append("--manifest-events")
    if options.reproducible:
        argv.append("--reproducible")
    if options.uuid:
        argv.append(f"--uuid={options.uuid.hex()}")
    if options.stable:
        argv.append("--stable")
        if not options.archiver:
            argv += [f"--hold={options.buffer}", *(["--in-turn"] if in_turn(options) else [])]
    return argv


def in_turn(options: argparse.Namespace) -> bool:
    """Return whether one disk is read after the other: its extents then follow each other, too."""
    is_live = options.qmp or options.monitor or options.libvirt
    return options.reproducible or (options.stable and not is_live and not options.archiver)


def check_order(options: argparse.Namespace) -> None:
    """Raises UsageError for options about the archive's order that cannot be."""
    if options.reproducible and (options.qmp or options.monitor or options.libvirt):
        raise UsageError(
            "--reproducible is for disks at rest: it takes one disk after the other, and the guest "
            "would wait for its turn"
        )
    if options.reproducible and options.stable:
        raise UsageError(
            "--reproducible gives another uuid as soon as the time differs: leave it out with --stable"
        )


# What may follow an image's path, and what a format's name looks like.
_READING = ("format", "snapshot", "offset", "others")
_WORD = r"[a-z0-9][a-z0-9-]*"


def parse_nbd(text: str, options: argparse.Namespace) -> Disk:
    """`NAME=URI[,bitmap=B]`, to be pulled. Raises UsageError."""
    name, uri, bitmap = parse_nbd_disk(text)
    if bitmap and options.base == "none":
        raise UsageError(
            f"disk {name_text(name)}: bitmap= says what has changed since an earlier archive: name "
            "that with --base"
        )
    words = [f"--nbd-timeout={options.nbd_timeout}", *(["--trim"] if options.trim else [])]
    words += [f"--bitmap={bitmap}"] if bitmap else []
    return Disk(name, uri, reading=tuple(words))


def parse_disk(text: str) -> Disk:
    """`[NAME=]PATH[,format=FORMAT][,snapshot=NAME][,offset=BYTES][,others=yes]`. Raises UsageError."""
    body, found = text, dict[str, str]()
    text = without_user(text)
    while True:
        rest, comma, last = body.rpartition(",")
        key, equals, value = last.partition("=")
        if not comma or not equals or key not in _READING:
            break
        body = rest
        if key in found:
            raise UsageError(f"{text}: {key} comes twice")
        found[key] = value
    disk = Disk(*split_named(body))
    if is_nbd_uri(disk.path):
        parse_uri(disk.name, disk.path)
    if "format" in found:
        if not re.fullmatch(_WORD, found["format"]):
            raise UsageError(f"{text}: {found['format']!r} is not a valid format")
        return Disk(disk.name, disk.path, reading=_reading_words(text, found))
    if found:
        raise UsageError(f"{text}: say the format, too: {without_user(body)},format=qcow2,…")
    if is_nbd_uri(disk.path):
        raise UsageError(f"{text}: for an NBD export, say --nbd {text}")
    if "://" in disk.path:
        raise UsageError(f"{text}: say what is there: {text},format=raw (or qcow2, …)")
    image_format = _looks_like(disk.path)
    if image_format:
        raise UsageError(
            f"{disk.path} looks like a {image_format} image, which a guest can write into its raw "
            f"disk: say {text},format=raw if the disk is raw, or {text},format={image_format} if "
            "you know that it was made as such an image"
        )
    return disk


def _reading_words(text: str, found: dict[str, str]) -> tuple[str, ...]:
    argv = [f"--format={found['format']}"]
    if "snapshot" in found:
        argv.append(f"--snapshot={found['snapshot']}")
    if "others" in found:
        if found["others"] not in ("yes", "no"):
            raise UsageError(f"{text}: others is yes or no, not {found['others']!r}")
        argv += ["--others"] * (found["others"] == "yes")
    if "offset" in found:
        try:
            argv.append(f"--offset={size(found['offset'])}")
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{text}: {error}") from error
    return tuple(argv)


def _looks_like(path: str) -> str:
    """The format of an image that is not raw, by its content; empty: raw, or unreadable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""  # the producer will say what is wrong
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) and not stat.S_ISBLK(os.fstat(fd).st_mode):
            return ""
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        found = format_of_content(lambda offset, length: os.pread(fd, length, offset), size_bytes)
    except OSError:
        return ""
    finally:
        os.close(fd)
    return found.driver if found is not None else ""


def service_of(options: argparse.Namespace) -> Service | None:
    """Return the service that `--archiver` names. Raises UsageError for options that need our own archiver."""
    if options.archiver is None:
        if options.keys or options.insecure_plain_tcp:
            raise UsageError("--keys and --insecure-plain-tcp belong to --archiver")
        return None
    check_endpoint(options.archiver, plain_tcp=options.insecure_plain_tcp, keys=options.keys)
    # Imported here: most archives are made on this host.
    from vmapipe.protocol.service import archive_name_fault

    fault = archive_name_fault(options.archive)
    if fault:
        raise UsageError(
            f"{options.archive!r}: with --archiver, ARCHIVE is a file's name at the service: {fault}"
        )
    if options.manifest:
        raise UsageError("--manifest FILE: a service stores the manifest beside the archive")
    if options.vmid is not None:
        raise UsageError(
            "--vmid writes a log beside the archive; with --archiver, name it yourself"
        )
    if options.reproducible:
        raise UsageError("--reproducible is for an archiver of this host")
    argv = [f"--connect-timeout={options.connect_timeout}"]
    if options.keys:
        argv.append(f"--keys={options.keys}")
    if options.insecure_plain_tcp:
        argv.append("--insecure-plain-tcp")
    return Service(options.archiver, tuple(argv))
