# SPDX-License-Identifier: Apache-2.0
"""`vmapipe monitor`: the command line of the monitor."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.control.monitor.commands import serve_disks, serve_machine
from vmapipe.control.monitor.guards import MonitorDisk, check_disks
from vmapipe.control.qmp.addresses import add_monitor_options
from vmapipe.control.qmp.sockets import listen_unix
from vmapipe.runtime.arguments import (
    add_buffer_options,
    add_plain_tcp_option,
    make_parser,
    split_named,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.process import run

DESCRIPTION = """\
Serve raw images or block devices to guests over NBD, so that they can be backed
up while the guests write to them; or stand beside a running QEMU (--qmp). Its
socket speaks QMP with the commands backup, query-backup and backup-cancel
(docs/monitor.md), and `vmapipe backup --monitor SOCKET ARCHIVE` uses it.
Runs until it is ended by a signal or by quit; what guests are doing is finished
first, and a backup that runs is cancelled.
"""

EPILOG = """\
example, with QEMU as the guest:
  vmapipe monitor --listen /run/vm/monitor.sock \\
      --disk sda=/srv/vm.raw --export sda=/run/vm/sda.sock
  qemu-system-x86_64 -drive \\
      file=nbd+unix:///sda?socket=/run/vm/sda.sock,format=raw,if=virtio
  vmapipe backup --monitor /run/vm/monitor.sock vm.vma

the same by QMP, and beside a QEMU that has its disks itself:
  vmapipe monitor --listen /run/vm/backup.sock --qmp /run/vm/qmp.sock
  qmp-shell /run/vm/backup.sock
  (QEMU) backup backup-file=/srv/vm.vma speed=104857600
  (QEMU) query-backup

Give QEMU reconnect-delay=60 (-blockdev driver=nbd,…), and a monitor that is
started anew is not noticed by the guest.

exit codes: 0 ended by a signal, as it should be, 1 failed, 2 wrong use
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "--listen",
        required=True,
        metavar="SOCKET",
        help="the monitor's own socket, which speaks QMP (only its owner can connect)",
    )
    served = parser.add_argument_group("disks that the monitor serves")
    served.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a raw image or block device, and its name; may be repeated",
    )
    served.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME=SOCKET",
        help="serve this disk on a Unix socket, or on tcp://HOST:PORT; may be repeated, "
        "and several disks may share a socket",
    )
    served.add_argument(
        "--socket-mode",
        type=_octal,
        default=0o600,
        metavar="OCTAL",
        help="permissions of the exports' sockets: whoever may connect may write (default: 600)",
    )
    add_plain_tcp_option(served)
    qemu = parser.add_argument_group("the disks of a running QEMU")
    add_monitor_options(
        qemu,
        help="back up the disks of the running QEMU whose QMP monitor this is, which is used only "
        "while a backup runs, and for the moment of a question",
    )
    qemu.add_argument(
        "--agent",
        metavar="SOCKET",
        help="freeze the guest's file systems for the instant of each backup, through this agent",
    )
    add_buffer_options(parser)
    add_report_options(parser)
    options = parser.parse_args(argv)
    return run(prog, lambda: _serve(options))


def _octal(text: str) -> int:
    try:
        value = int(text, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid mode like 660")
    return value


def _serve(options: argparse.Namespace) -> None:
    if options.qmp is None:
        disks = parse_disks(options.disk, options.export)
    elif options.disk or options.export:
        raise UsageError("--qmp is for disks that a QEMU has; --disk and --export are for others")
    elif options.spool:
        raise UsageError("--spool has no use with --qmp: use --buffer")
    else:
        disks = []
    cancel = Cancel()
    cancel.on_signals()
    with renderer("serve", options, sys.stdout) as emit:
        # First of all: a monitor that serves there already has the disks, too.
        listener = listen_unix(options.listen, 0o600, socket.SOCK_STREAM)
        try:
            if options.qmp is None:
                serve_disks(disks, options, listener, cancel, emit)
            else:
                serve_machine(options, listener, cancel, emit)
        finally:
            listener.close()
        emit({"event": "notice", "text": f"{cancel.reason}: what guests are doing is finished"})


def parse_disks(disks: Sequence[str], exports: Sequence[str]) -> list[MonitorDisk]:
    """Raises UsageError."""
    served = [MonitorDisk(*split_named(text)) for text in disks]
    check_disks(served)
    for text in exports:
        # The disks' names are known, and may have a "=" in them.
        owner = next((disk for disk in served if text.startswith(f"{disk.name}=")), None)
        if owner is None:
            raise UsageError(f"--export {text}: no --disk has this name")
        owner.exports.append(text.removeprefix(f"{owner.name}="))
    for disk in served:
        if not disk.exports:
            raise UsageError(f"disk {disk.name!r} has no --export {disk.name}=SOCKET")
    return served
