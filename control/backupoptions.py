# SPDX-License-Identifier: Apache-2.0
"""The options of `vmapipe backup` that are nobody else's, by theme."""

from __future__ import annotations

import argparse

from vmapipe.control.qmp.addresses import add_monitor_options
from vmapipe.runtime.arguments import add_connect_option, add_tcp_options, size


def add_source_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to back up")
    what.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="[NAME=]PATH[,format=FORMAT]",
        help="a disk, and its name in the archive (default: the file's name); images that are not "
        "raw need their format (qcow2, vmdk, vhdx, vdi, ...), and ,snapshot=NAME or ,offset=BYTES "
        "may follow; may be repeated",
    )
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
        "--freeze", action="store_true", help="what --agent is for; needs it, and may be left out"
    )


def add_speed_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--speed",
        type=size,
        default=0,
        metavar="BYTES/S",
        help="read at most this much a second, all disks together; K, M, G, T are powers of 1024 "
        "(what a guest's writes save is not slowed down)",
    )


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


def add_service_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--archiver",
        metavar="ENDPOINT",
        help="store the archive at this service (tcp://HOST:PORT) and not on this host: ARCHIVE is "
        "then its name there, a plain one, and --threads the service's own",
    )
    add_tcp_options(parser, "our key pair, and the archiver's server.pub")
    add_connect_option(parser)
