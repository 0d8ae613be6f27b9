# SPDX-License-Identifier: Apache-2.0
"""`vmapipe serve`: the devices of archives as NBD exports, without a restore."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import socket
import sys
import threading
from collections.abc import Sequence

from vmapipe.access.archive import OpenArchive, open_for_access
from vmapipe.access.disk import named_disks
from vmapipe.access.frames import FrameStorage
from vmapipe.access.serve import Shown, serve
from vmapipe.control.cli.caches import add_cache_options, caches_of
from vmapipe.control.cli.condition import why_slow
from vmapipe.control.cli.errors import naming
from vmapipe.control.cli.identity import (
    add_identity_option,
    add_signed_by_option,
    check_signed,
    identities_of,
)
from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.control.qmp.sockets import listen_unix
from vmapipe.protocol.nbd.constants import string_fault
from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.process import run
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import name_text

DESCRIPTION = """\
Serve the devices of an archive over NBD, without restoring it: for qemu-nbd, guestfish,
nbdfuse, qemu-img, virt-v2v, or a QEMU that boots from it. Read-only, unless --cow says
where writes are kept. What is read is compared with the manifest when it is first touched:
damage is an I/O error with its place, and never other data. It runs until Ctrl-C.
"""
EPILOG = """\
examples:
  vmapipe serve vm.vma.zst --listen vm.sock
  qemu-img convert 'nbd+unix:///drive-scsi0?socket=vm.sock' -O qcow2 disk.qcow2
  guestfish --ro --format=raw -a 'nbd:///drive-scsi0?socket=/run/vm.sock' -i
  vmapipe serve vm.vma --device drive-scsi0 --cow writes.img --listen vm.sock
  vmapipe serve --all /backup --listen all.sock      # exports are called ARCHIVE/DEVICE
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "--listen", required=True, metavar="SOCKET", help="the Unix socket to serve on"
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME",
        help="serve only this device; may be repeated",
    )
    parser.add_argument(
        "--cow",
        metavar="FILE",
        help="let clients write, and keep what they write in FILE (sparse); for one device",
    )
    parser.add_argument(
        "--all", metavar="DIR", help="serve all archives (*.vma, *.vma.zst, *.age) of a folder"
    )
    parser.add_argument(
        "--until-exit",
        type=int,
        metavar="PID",
        help="end when this process does: the machine that reads from it",
    )
    add_cache_options(parser)
    add_identity_option(parser)
    add_signed_by_option(parser)
    add_report_options(parser)
    parser.add_argument(
        "archives", nargs="*", metavar="ARCHIVE", help="a file, a block device, s3://BUCKET/KEY"
    )
    options = parser.parse_args(argv)
    return run(prog, lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    names = list(options.archives)
    if options.all is not None:
        names += _archives_of(options.all)
    if not names:
        raise UsageError("say which archive to serve, or --all DIR")
    if options.listen.startswith("tcp:"):
        raise UsageError(
            f"--listen {options.listen}: archives are served on a Unix socket only: name its path; for "
            "another host let ssh carry it (ssh -L SOCKET:SOCKET HOST)"
        )
    identities_of(options)  # a wrong one is told before anything is read
    cancel = Cancel()
    cancel.on_signals()
    if options.until_exit is not None:
        _end_with(options.until_exit, cancel)
    with contextlib.ExitStack() as stack:
        emit = stack.enter_context(renderer("serve", options, sys.stdout))
        opened = _open_all(names, options, cancel, emit, stack)
        shown = _shown(opened, options, emit)
        listener = listen_unix(options.listen, 0o600, socket.SOCK_STREAM)
        stack.callback(listener.close)
        try:
            serve(listener.socket, os.path.abspath(options.listen), shown, cancel, emit)
        except OSError as error:
            raise Failure(f"the last writes could not be kept: {error}") from error


def _end_with(pid: int, cancel: Cancel) -> None:
    """Ask for a stop when that process ends. Raises UsageError: there is none."""
    try:
        fd = os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--until-exit {pid}: there is no such process") from error

    def watch() -> None:
        readable([fd])
        cancel.ask("the process of --until-exit has ended")

    threading.Thread(target=watch, name="until-exit", daemon=True).start()


def _archives_of(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise Failure(f"cannot list {folder}: {error.strerror}") from error
    found = [
        name for name in names if name.endswith((".vma", ".vma.zst", ".vma.age", ".vma.zst.age"))
    ]
    if not found:
        raise Failure(f"there is no archive (*.vma, *.vma.zst, *.age) in {folder}")
    return [os.path.join(folder, name) for name in found]


def _open_all(
    names: Sequence[str],
    options: argparse.Namespace,
    cancel: Cancel,
    emit: Emit,
    stack: contextlib.ExitStack,
) -> list[OpenArchive]:
    """Open each archive that was named, and of --all those that can be opened."""
    caches = caches_of(options)
    opened = []
    for name in names:

        def report(text: str) -> None:
            emit({"event": "notice", "text": text})

        try:
            with naming(name):
                check_signed(name, options, cancel, emit)
                archive = open_for_access(name, cancel, report, caches)
        except (UsageError, Cancelled):
            raise
        except Failure as error:
            if name in options.archives:
                raise
            report(f"left out: {error}")
            continue
        stack.callback(archive.close)
        if isinstance(archive.storage, FrameStorage):
            slow = why_slow(archive.storage.usual_frame_bytes())
            if slow:
                archive.tell(slow)
        opened.append(archive)
    return opened


def _shown(opened: Sequence[OpenArchive], options: argparse.Namespace, emit: Emit) -> list[Shown]:
    alone = options.all is None and len(opened) == 1
    prefixes: list[str] = []
    shown = []

    def is_possible(name: str) -> bool:
        return string_fault(f"{prefixes[-1]}{name}") is None

    def report(text: str) -> None:
        emit({"event": "notice", "text": text})

    for archive in opened:
        prefixes.append("" if alone else _prefix(archive.name, prefixes))
        for name, disk in named_disks(archive, is_possible, report):
            if not options.device or disk.device.name in options.device or name in options.device:
                shown.append(Shown(f"{prefixes[-1]}{name}", archive, disk, options.cow))
    for name in options.device:
        if not any(name in (item.disk.device.name, item.export) for item in shown):
            there = ", ".join(name_text(d.name) for a in opened for d in a.header.devices)
            raise UsageError(f"there is no device {name_text(name)}; there is {there or 'none'}")
    if not shown:
        raise Failure("there is no disk to serve: only configurations, or a machine's memory")
    if options.cow is not None and len(shown) > 1:
        raise UsageError("--cow keeps the writes of one device: choose it with --device")
    return shown


def _prefix(name: str, taken: Sequence[str]) -> str:
    """`ARCHIVE/`, which no other archive has."""
    base = os.fsencode(os.path.basename(name)).decode(errors="backslashreplace")
    tries = (f"{base}-{number}/" for number in itertools.count(2))
    return next(prefix for prefix in itertools.chain([f"{base}/"], tries) if prefix not in taken)
