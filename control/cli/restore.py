# SPDX-License-Identifier: Apache-2.0
"""`vmapipe restore`: the command line of a restore."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from vmapipe.control.cli.errors import naming, source_name
from vmapipe.control.cli.identity import add_signed_by_option, check_signed
from vmapipe.control.cli.inspect import add_read_options, open_signed, read_options
from vmapipe.control.cli.live import (
    add_live_options,
    check_live,
    restore_live,
    split_machine,
)
from vmapipe.control.cli.restore_libvirt import add_libvirt_options, check_libvirt, restore_domain
from vmapipe.control.coordinator.output_spec import inherited_fds
from vmapipe.control.coordinator.priorities import add_io_priority_option, priorities
from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.restore.archive.reader import Archive
from vmapipe.restore.archive.survey import open_damaged
from vmapipe.restore.job import Options, restore
from vmapipe.restore.targets.files import Folders
from vmapipe.restore.targets.map_file import IMAGE_FORMATS, parse_map
from vmapipe.restore.targets.plan import (
    Larger,
    Plan,
    TargetDefaults,
    check_chosen,
    plan_folder,
    plan_map,
)
from vmapipe.restore.verify.report import TEXT_NAME
from vmapipe.runtime.arguments import add_first_group, make_parser, size
from vmapipe.runtime.cancel import Cancel, awaited_lines
from vmapipe.runtime.errors import Damaged, Failure, UsageError, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import HeldFolder, MadeFolder
from vmapipe.runtime.process import run
from vmapipe.vma.header import Header

DESCRIPTION = """\
Bring the disks and configs of an archive back into DIR: disk-NAME.raw for each disk,
the configs by their names, vmstate.bin for the machine's memory. New files get their
names when all of them are complete and on disk. Where the archive has a manifest beside
it, every byte is checked on the way. A damaged archive is refused, but for disks of it
that are whole and named with --device; --salvage brings back what there is of the
others. With --libvirt the machine itself comes back: its disks in a pool or a folder,
and its domain.
"""

EPILOG = """\
ARCHIVE is a file, - (stdin), a FIFO, exec:COMMAND, fd:N, /dev/fdset/N or
s3://BUCKET/KEY; plain or compressed with zstd, gzip or lzop, which is seen from its content.

examples:
  vmapipe restore vm.vma restored/
  vmapipe restore vm.vma restored/ --device drive-scsi0
  vmapipe restore vm.vma restored/ --device drive-scsi0=/dev/vg0/vm
  vmapipe restore vm.vma restored/ --device drive-scsi0=vm.qcow2,format=qcow2
  vmapipe restore vm.vma restored/ --format qcow2
  ssh backup.example cat vm.vma.zst | vmapipe restore - restored/
  vmapipe restore damaged.vma restored/ --salvage
  vmapipe restore vm.vma --libvirt --name web2 --pool default --start
  vmapipe restore vm.vma --libvirt --start --live
  vmapipe restore --live vm.vma restored/ -- qemu-system-x86_64 -m 4G \\
      -device virtio-scsi-pci -device scsi-hd,drive=drive-scsi0

exit codes: 0 restored, 1 failed (no new file is left), 2 wrong use, 4 salvaged, with something
missing or damaged, 130/143 ended by a signal (of a live restore the machine goes on)
"""
_MAX_WORKERS = 64


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    _add_target_options(parser)
    _add_damage_options(parser)
    _add_load_options(parser)
    add_live_options(parser)
    add_libvirt_options(parser)
    add_report_options(parser)
    parser.add_argument("archive", metavar="ARCHIVE", help="where the archive comes from")
    parser.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        help="where the files go; created if need be (with --libvirt: see --dir, --pool)",
    )
    words, machine = split_machine(argv)
    # DIR may be left out, and may come behind other options.
    options = parser.parse_intermixed_args(words)
    if options.folder is None and not options.libvirt:
        parser.error("the following arguments are required: DIR")
    return run(prog, lambda: _restore(options, words, machine))


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    group = add_first_group(parser, "what to restore, and where to")
    group.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME[=TARGET[,format=FORMAT]]",
        help="restore only this device, to a new file, or onto TARGET (an existing raw file or "
        "block device is overwritten; with a FORMAT like qcow2 a new image of it is made); may be "
        "repeated",
    )
    group.add_argument(
        "--map",
        metavar="FILE",
        help="say where each device goes in the reference tool's map format; - is stdin",
    )
    group.add_argument(
        "--format",
        default="",
        choices=IMAGE_FORMATS,
        metavar="FORMAT",
        help="format of every disk whose --device or map line does not say another one: raw "
        "(default), qcow2, qed, vdi, vhdx, vmdk or vpc",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="overwrite what --device and --map name whatever it is: raw bytes over an image of "
        "another format or an ISO; with format=qcow2 and the like, the disk in an existing image",
    )
    group.add_argument(
        "--allow-larger",
        action="store_true",
        help="existing files, too, and not only block devices, may be more than 4 MiB larger than "
        "their devices; what is beyond stays as it is",
    )
    group.add_argument("--no-configs", action="store_true", help="do not write the configs")


def _add_damage_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checks, damage, interruptions")
    group.add_argument(
        "--manifest",
        metavar="FILE",
        help="check the data with this manifest (default: ARCHIVE.manifest.json if it is there)",
    )
    group.add_argument("--no-manifest", action="store_true", help="do not check the data")
    add_signed_by_option(group)
    group.add_argument(
        "--salvage",
        action="store_true",
        help="restore what there is of a damaged archive; what is missing reads as zero, and is "
        f"listed in DIR/{TEXT_NAME} and .json",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="keep what was written when the restore is interrupted (NAME.unfinished and a journal "
        "in DIR), and go on with what an interrupted one has kept: it is checked, and only what is "
        "missing or wrong is written",
    )


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load on this host")
    group.add_argument(
        "--speed",
        type=size,
        default=0,
        metavar="BYTES/S",
        help="write at most this much data a second, all disks together; K, M, G, T are powers of "
        "1024 (default: no limit); zeroes do not count",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that write (default: one a core, at most 4)",
    )
    add_io_priority_option(group)
    add_read_options(group)


def _restore(options: argparse.Namespace, words: Sequence[str], machine: Sequence[str]) -> None:
    check_libvirt(options)
    check_live(options, machine)
    if options.libvirt:
        inherited_fds(options.archive)
        restore_domain(options, _restore_options(options), words)
        return
    chosen = _chosen(options)
    if options.live:
        with target_folder(options.folder) as folder:
            restore_live(options, words, machine, chosen, folder)
        return
    if options.map and options.device:
        raise UsageError("--map and --device exclude each other")
    if options.signed_by and options.no_manifest:
        raise UsageError("--signed-by and --no-manifest exclude each other: the manifest is signed")
    if options.salvage and options.resume:
        raise UsageError("--salvage and --resume exclude each other")
    if options.map == "-" and options.archive == "-":
        raise UsageError("the map and the archive cannot both come from stdin")
    inherited_fds(options.archive)
    priorities(options).apply_to_us()
    cancel = Cancel()
    cancel.on_signals()
    with (
        renderer("restore", options, sys.stdout) as emit,
        naming(options.archive),
        _open(options, cancel, emit) as archive,
        target_folder(options.folder) as folder,
        Folders(folder) as folders,
    ):
        for text in archive.notes:
            emit({"event": "notice", "text": text})
        result = restore(
            archive,
            _plan(archive.header, options, chosen, cancel),
            emit,
            cancel,
            _restore_options(options),
            folders,
        )
    if options.salvage and result.damage is not None:
        broken = [state for state in result.states if not state.is_whole]
        raise Damaged(
            f"{source_name(options.archive)} is damaged: {result.damage}; restored is what there "
            f"is of it, and {len(broken)} of {len(result.states)} devices are not whole: see "
            f"{os.path.join(options.folder, TEXT_NAME)}"
        )


def _restore_options(options: argparse.Namespace) -> Options:
    """Raises UsageError."""
    if not 0 <= options.workers <= _MAX_WORKERS:
        raise UsageError(f"--workers {options.workers}: use 1 to {_MAX_WORKERS}")
    return Options(
        workers=options.workers,
        check_digests=not options.no_manifest,
        manifest=options.manifest,
        bytes_per_s=options.speed,
        resume=options.resume,
        salvage_folder=options.folder if options.salvage else None,
    )


def _open(options: argparse.Namespace, cancel: Cancel, emit: Emit) -> Archive:
    if not options.salvage:
        return open_signed(options, cancel, emit)
    check_signed(options.archive, options, cancel, emit)
    manifest = None if options.no_manifest else options.manifest
    return open_damaged(options.archive, cancel, read_options(options), manifest)


def _chosen(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """The words of --device. Raises UsageError for what can be seen to be wrong at once."""
    for word, value in (("DIR", options.folder), ("ARCHIVE", options.archive)):
        if not value:
            raise UsageError(f"{word} is empty")
    for word, value in (("--map", options.map), ("--manifest", options.manifest)):
        if value == "":
            raise UsageError(f"{word} names no file")
    chosen = []
    for text in options.device:
        name, equals, target = text.partition("=")
        chosen.append((name, target if equals else None))
    check_chosen(chosen)
    return chosen


def _plan(
    header: Header,
    options: argparse.Namespace,
    chosen: Sequence[tuple[str, str | None]],
    cancel: Cancel,
) -> Plan:
    larger = Larger.ALWAYS if options.allow_larger else Larger.DEVICES
    wishes = TargetDefaults(options.format, options.overwrite, larger)
    if not options.map:
        return plan_folder(
            header, options.folder, chosen, configs=not options.no_configs, wishes=wishes
        )
    try:
        entries = parse_map(awaited_lines(0 if options.map == "-" else options.map, cancel))
    except OSError as error:
        raise Failure(f"unable to read file '{options.map}': {os_error_text(error)}") from error
    plan = plan_map(header, entries, options.folder, wishes)
    return plan._replace(configs_folder=None if options.no_configs else options.folder)


def target_folder(path: str) -> MadeFolder | HeldFolder:
    """The folder, created if it is not there, and removed again if nothing came into it."""
    try:
        try:
            return MadeFolder(path)
        except FileExistsError:
            return HeldFolder(path)
    except NotADirectoryError:
        raise UsageError(f"{path} exists and is not a folder") from None
    except OSError as error:
        raise Failure(f"cannot create the folder {path}: {os_error_text(error)}") from error
