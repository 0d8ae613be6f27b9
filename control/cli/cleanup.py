# SPDX-License-Identifier: Apache-2.0
"""`vmapipe cleanup`: removes what a crashed backup has left in a running QEMU, or in a domain of libvirt's."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from vmapipe.control.cli.backup_arguments import add_domain_options
from vmapipe.control.qmp.addresses import add_monitor_options
from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.process import run
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line

DESCRIPTION = """\
Remove from a running QEMU, or a domain of libvirt's, what a backup has left that
was killed together with its guardian (jobs, nodes, scratch files), and let the
guest go on. The next backup does the same by itself. A backup that still runs is
left alone, and so is everything whose name does not begin with `vmapipe-`.
The records of what has changed since an archive (backup --base; bitmaps of QEMU's,
checkpoints of libvirt's) stay, unless they cannot be used any more; --bitmaps
removes them all.
"""

EPILOG = """\
exit codes: 0 nothing of ours is there any more, 1 a backup runs, or QEMU is not to be reached
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    add_monitor_options(parser, help="the QMP monitor of this QEMU")
    add_domain_options(parser, help="the domain, by name or uuid")
    parser.add_argument(
        "--push",
        action="store_true",
        help="with --libvirt: also what a backup with --push has left in the domain's QEMU (the domain "
        "is tainted by that)",
    )
    parser.add_argument(
        "--pve",
        type=int,
        metavar="VMID",
        help="this machine of a Proxmox VE node; and the lock that a killed `vmapipe backup --pve` has "
        "left in its configuration goes, too",
    )
    parser.add_argument(
        "--pve-root",
        metavar="DIR",
        help="with --pve: the node's files are below this folder (default: $VMAPIPE_PVE_ROOT, or /)",
    )
    parser.add_argument(
        "--bitmaps",
        action="store_true",
        help="remove the records of what has changed since an archive, too (dirty bitmaps): the next "
        "backup with --base is a full one, and QEMU takes and loads internal snapshots again",
    )
    options = parser.parse_args(argv)
    return run(prog, lambda: _clean_up_what(options))


def _clean_up_what(options: argparse.Namespace) -> None:
    if sum(word is not None for word in (options.qmp, options.libvirt, options.pve)) != 1:
        raise UsageError("say where: one of --qmp ADDRESS, --libvirt DOMAIN and --pve VMID")
    if options.qmp is not None:
        _clean_up(options.qmp, share=options.qmp_share, bitmaps=options.bitmaps)
    elif options.libvirt is not None:
        _clean_up_domain(options.libvirt, options.connect, options.scratch, bitmaps=options.bitmaps)
        if options.push:
            _clean_up_pushed(options.libvirt, options.connect, bitmaps=options.bitmaps)
    else:
        _clean_up_pve(options.pve, options.pve_root, bitmaps=options.bitmaps)


def _clean_up_domain(name: str, uri: str, scratch: str, *, bitmaps: bool) -> None:
    # Imported here: `--help` comes sooner without.
    from vmapipe.control.hosts.libvirt.connect import Host
    from vmapipe.control.hosts.libvirt.jobs import DomainJobs, remove_leftovers
    from vmapipe.control.hosts.libvirt.scratch import DEFAULT_PLACE

    with contextlib.closing(Host(uri)) as host:
        jobs = DomainJobs(host, host.domain(name))
        removed = remove_leftovers(jobs, scratch or DEFAULT_PLACE)
        kept = list(jobs.checkpoints())
        if bitmaps:
            for checkpoint in kept:
                jobs.remove_checkpoint(checkpoint)
            removed, kept = removed + kept, []
        _tell(removed, kept)


def _clean_up_pushed(name: str, uri: str, *, bitmaps: bool) -> None:
    from vmapipe.control.hosts.libvirt.monitor_proxy import MonitorProxyClient

    with contextlib.closing(MonitorProxyClient(uri, name)) as proxy:
        _clean_up(proxy.path, share=False, bitmaps=bitmaps)


def _clean_up_pve(vmid: int, root: str | None, *, bitmaps: bool) -> None:
    """Remove what a killed backup has left of a Proxmox VE node's machine. Raises Failure."""
    from vmapipe.control.hosts.pve.lock import BackupLock
    from vmapipe.control.hosts.pve.node import PveNode, root_of
    from vmapipe.control.hosts.pve.standstill import undo_for

    node = PveNode(root_of(root))
    node.config(vmid)
    if node.is_dead:
        raise Failure(
            "this node does not run: none of its machines can be locked, or unlocked, here"
        )
    lock = BackupLock(node, vmid)
    try:
        if text := undo_for(node, vmid):
            print(text)
        if node.is_running(vmid):
            _clean_up(node.socket(vmid, "qmp"), share=True, bitmaps=bitmaps)
        was_left = lock.remove()
    finally:
        lock.close()
    text = (
        "removed the lock that a killed backup has left" if was_left else "no lock of ours is left"
    )
    print(f"VM {vmid}: {text}")


def _clean_up(address: str, *, share: bool, bitmaps: bool) -> None:
    # Imported here: `--help` comes sooner without.
    from vmapipe.control.qemu.leftovers import (
        connect_or_unblock,
        kept_records,
        remove_leftovers,
        remove_records,
        remove_worthless_records,
    )
    from vmapipe.control.qemu.qemu_process import pid_of_qemu, uid_of_qemu
    from vmapipe.control.qmp.addresses import parse_address
    from vmapipe.control.qmp.connection import QmpGone

    kept: tuple[str, ...] = ()
    link = connect_or_unblock(address, share=share)
    try:
        path = parse_address(address).path
        removed = remove_leftovers(
            link, lambda: uid_of_qemu(path, pid_of_qemu(link.peer_pid, uuid=""))
        )
        try:
            removed += remove_worthless_records(link)
            if bitmaps:
                removed += remove_records(link)
            kept = kept_records(link)
        except QmpGone:
            # A QEMU that a backup kept for a guest that had powered off ends now, its records with it.
            if not removed:
                raise
    finally:
        link.close()
    _tell(removed, kept)


def _tell(removed: Sequence[str], kept: Sequence[str] = ()) -> None:
    names = ", ".join(one_line(name, MAX_NAME_CHARS) for name in removed)
    print(one_line(f"removed {names}") if removed else "there was nothing to remove")
    if kept:
        print(one_line(f"kept for incremental backups: {', '.join(kept)} (--bitmaps removes them)"))
