# SPDX-License-Identifier: Apache-2.0
"""`vmapipe mount`: an archive as a folder, without restoring it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from ctypes.util import find_library

from vmapipe.access.archive import Report, open_for_access
from vmapipe.access.disk import ArchiveDisk, named_disks
from vmapipe.access.files.appliance import Appliance
from vmapipe.access.files.engines import PARSER, VM, obstacle
from vmapipe.access.files.session import FileReader, FileSession
from vmapipe.access.mount.guest import GuestDisk, GuestReader
from vmapipe.access.mount.tree import ArchiveTree, is_file_name
from vmapipe.control.cli.caches import add_cache_options, caches_of
from vmapipe.control.cli.errors import naming
from vmapipe.control.cli.files import add_engine_options, add_key_option, read_keys
from vmapipe.control.cli.identity import (
    add_identity_option,
    add_signed_by_option,
    check_signed,
)
from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.process import run

DESCRIPTION = """\
Show an archive as a folder, read-only, without restoring it: disks/NAME.raw is each
disk, config/NAME each configuration, and files/DISK/PARTITION/ the files of each file
system that `vmapipe files` reads, with the same engines (`whole` where a disk has no
partitions, GROUP/VOLUME/ for a logical volume). What is read is compared with the
manifest when it is first touched: damage is an I/O error, with a line here that says
where. It runs until the folder is unmounted (fusermount3 -u DIR) or until Ctrl-C.

Links of a file system in the archive are shown as they are: an absolute one leads to a
file of this machine. Only the user who mounts can look into the folder.
"""
EPILOG = """\
examples:
  vmapipe mount vm.vma.zst /mnt/vm
  cp -a /mnt/vm/files/drive-scsi0/2/home/anna ./
  cp --sparse=always /mnt/vm/disks/drive-scsi0.raw ./
  fusermount3 -u /mnt/vm
"""
_NOT_ASKED_FOR = "it was not asked for"
_NO_EXTRA = "archives are mounted with mfusepy: pip install 'vmapipe[mount]'"
_OTHER_WAYS = "vmapipe serve and vmapipe files do without"

# Processes that parse, some 50 MiB each: of more disks, several share one.
_MAX_PARSERS = 4


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    add_key_option(parser)
    add_engine_options(parser)
    add_cache_options(parser)
    add_identity_option(parser)
    add_signed_by_option(parser)
    add_report_options(parser)
    parser.add_argument(
        "archive", metavar="ARCHIVE", help="a file, a block device, s3://BUCKET/KEY"
    )
    parser.add_argument("folder", metavar="DIR", help="an empty folder")
    options = parser.parse_args(argv)
    return run(prog, lambda: _mount(options))


def _mount(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("mfusepy") is None:
        raise UsageError(_NO_EXTRA)
    folder = _empty_folder(options.folder)
    _check_fuse()
    if find_library("fuse3") is not None:
        # mfusepy looks for libfuse 2 first, which cannot tell where holes are.
        os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
    try:
        from vmapipe.access.mount.fuse import run_mount
    except OSError as error:
        raise Failure(f"cannot use libfuse: {error} (Debian: apt install fuse3)") from error
    cancel = Cancel()
    cancel.on_signals()
    with contextlib.ExitStack() as stack:
        emit = stack.enter_context(renderer("mount", options, sys.stdout))

        def report(text: str) -> None:
            emit({"event": "notice", "text": text})

        with naming(options.archive):
            caches = caches_of(options)  # a wrong key is told before anything is read
            check_signed(options.archive, options, cancel, emit)
            archive = open_for_access(options.archive, cancel, report, caches)
        stack.callback(archive.close)
        disks = named_disks(archive, is_file_name, report)
        guests = _guests(disks, options, cancel, report, stack)
        tree = ArchiveTree(archive, disks, guests, report)

        def tell_mounted() -> None:
            emit({"event": "mounted", "archive": archive.name, "folder": folder})

        run_mount(tree, folder, archive.name, cancel, tell_mounted)
        # What a parser is asked fails now, rather than at the end of its patience.
        cancel.ask("the archive is unmounted")


def _guests(
    disks: Sequence[tuple[str, ArchiveDisk]],
    options: argparse.Namespace,
    cancel: Cancel,
    report: Report,
    stack: contextlib.ExitStack,
) -> dict[str, GuestDisk]:
    """The file systems of each disk; `stack` ends what reads them. Raises Failure, UsageError."""
    keys = read_keys(options, [name for name, _ in disks])
    has_parser = options.engine != VM and importlib.util.find_spec("pytsk3") is not None
    why_no_vm = _NOT_ASKED_FOR if options.engine == PARSER else obstacle(options.appliance)
    if options.engine == VM and why_no_vm:
        raise Failure(why_no_vm)
    if not has_parser and why_no_vm:
        report(
            "files/ is left out, it needs pytsk3: pip install 'vmapipe[files]'; or --engine vm, "
            f"but: {why_no_vm}"
        )
        return {}

    def reader(name: str, start: Callable[[], FileReader]) -> GuestReader:
        made = GuestReader(name, start)
        stack.callback(made.close)
        return made

    def start_vm() -> FileReader:
        return Appliance(disks, cancel, keys, options.appliance, report)

    vm = None if why_no_vm else reader("the virtual machine", start_vm)

    def start_parser() -> FileReader:
        return FileSession(disks, cancel, keys)

    # Each knows all disks, and is started when it is first asked.
    parsers: list[GuestReader | None] = [None]
    if has_parser and disks:
        count = min(_MAX_PARSERS, len(disks))
        parsers = [reader("the parser", start_parser) for _ in range(count)]
    return {
        name: GuestDisk(name, index, report, parsers[index % len(parsers)], vm)
        for index, (name, _) in enumerate(disks)
    }


def _empty_folder(name: str) -> str:
    """Return its real path. Raises UsageError, Failure."""
    try:
        found = os.listdir(name)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise Failure(
                f"{name} is what a mount has left whose process was killed: fusermount3 -u {name}, "
                "and try again"
            ) from error
        raise Failure(f"cannot mount on {name}: {os_error_text(error)}") from error
    if found:
        raise UsageError(f"{name} is not empty: mount on an empty folder")
    return os.path.realpath(name)


def _check_fuse() -> None:
    """Raises Failure where a mount cannot succeed."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise Failure(
            "there is no /dev/fuse here: modprobe fuse, or give the container this device; "
            f"{_OTHER_WAYS}"
        ) from error
    except OSError as error:
        raise Failure(
            f"cannot open /dev/fuse: {os_error_text(error)}: mount as root, or have its mode be "
            f"0666 as udev makes it; {_OTHER_WAYS}"
        ) from error
    if (
        os.geteuid() != 0
        and shutil.which("fusermount3") is None
        and shutil.which("fusermount") is None
    ):
        raise Failure(
            "there is no fusermount3 here, which mounts for those who are not root (Debian: apt "
            "install fuse3): or mount inside unshare -Urm"
        )
