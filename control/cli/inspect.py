# SPDX-License-Identifier: Apache-2.0
"""`vmapipe list`, `vmapipe config` and `vmapipe verify`: look, and write nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vmapipe.control.cli.errors import named, naming, source_name
from vmapipe.control.cli.identity import (
    add_identity_option,
    add_signed_by_option,
    check_signed,
    identities_of,
)
from vmapipe.control.coordinator.output_spec import inherited_fds
from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.errors import NoKeyError
from vmapipe.restore.archive.reader import Archive, open_archive
from vmapipe.restore.verify.verify import VerifyOptions, verify
from vmapipe.runtime.arguments import age_s, make_parser, share, size
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Damaged, Failure, UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.process import failure_of, run
from vmapipe.runtime.text import MAX_NAME_CHARS, human_bytes, name_text, one_line
from vmapipe.runtime.uuids import uuid_text
from vmapipe.vma.errors import ArchiveError, VmaError
from vmapipe.vma.header import Config, Header

if TYPE_CHECKING:
    from vmapipe.control.cli.places import KeptVerdict


LIST_DESCRIPTION = """\
Tell what an archive holds: its devices with their sizes, and its configs; whether any
place of it can be read at once, whether its data is checked by digests, and how its
latest restore test ended. Of a folder, or of a bucket's prefix, a table of its
archives: machine, time, size, when it was verified, how much of it others share,
whether it is protected, encrypted or locked.
"""
VERIFY_DESCRIPTION = """\
Check an archive without writing anything: header, checksums, uuid, counts, clusters
that are missing, double or beyond the end, vmstate's order, trailing bytes. The format
has no checksum for its data; with the manifest that `vmapipe backup` leaves beside an
archive, every byte of data is checked, too. Goes on after damage, and names every
device and range of bytes that is affected. Of a folder, or of a bucket's prefix, all
archives; when each was verified is kept beside it, in ARCHIVE.verified.json.
"""
VERIFY_EPILOG = """\
examples:
  vmapipe verify vm.vma.zst
  vmapipe verify --require-manifest /backup/dump/*.vma.zst
  ssh backup.example cat vm.vma | vmapipe verify --manifest vm.vma.manifest.json -
  vmapipe verify /backup s3://backups/vms --older-than 7d --sample 5%

exit codes: 0 nothing is wrong, 1 it could not be checked, 2 wrong use, 4 damage was found;
of several archives, the highest
"""
PLACE_HELP = (
    "as for one archive: a file, - (stdin), a FIFO, exec:COMMAND, fd:N, s3://BUCKET/KEY; or all of a "
    "folder, or of s3://BUCKET/PREFIX"
)
ARCHIVE_HELP = "a file, - (stdin), a FIFO, exec:COMMAND, fd:N, s3://BUCKET/KEY; plain or compressed"
# The smallest window there is; and what the library can do, zstd --long=31.
_MIN_WINDOW_BYTES, _MAX_WINDOW_BYTES = 1 << 10, 2 << 30
DEFAULT_CONFIG = "qemu-server.conf"


def main_list(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(
        prog,
        LIST_DESCRIPTION,
        "examples:\n  vmapipe list vm.vma.zst\n  vmapipe list /backup s3://backups/vms",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, on one line, for each archive"
    )
    add_signed_by_option(parser)
    add_read_options(parser)
    parser.add_argument("archives", metavar="ARCHIVE|PLACE", nargs="+", help=PLACE_HELP)
    options = parser.parse_args(argv)
    return run(prog, lambda: _each(prog, options, _list))


def main_config(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(
        prog,
        "Print a configuration stored in an archive, byte for byte.",
        "example:\n  vmapipe config vm.vma --name qemu-server.fw",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help=f"which one (default: {DEFAULT_CONFIG}, or the only one there is)",
    )
    parser.add_argument("--json", action="store_true", help="print all of them as a JSON object")
    add_read_options(parser)
    parser.add_argument("archive", metavar="ARCHIVE", help=ARCHIVE_HELP)
    options = parser.parse_args(argv)
    return run(prog, lambda: _config(options))


def main_verify(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, VERIFY_DESCRIPTION, VERIFY_EPILOG)
    parser.add_argument(
        "--manifest",
        metavar="FILE",
        help="the manifest (default: ARCHIVE.manifest.json); exec:COMMAND and s3:// work, too",
    )
    parser.add_argument(
        "--no-manifest", action="store_true", help="check the structure only: fast, less is found"
    )
    parser.add_argument(
        "--require-manifest",
        action="store_true",
        help="fail when there is no manifest, and the data cannot be checked (for cron)",
    )
    parser.add_argument(
        "--whole-file",
        action="store_true",
        help="also compare the digest of the stored file, which reads it once more",
    )
    add_signed_by_option(parser)
    group = parser.add_argument_group("of a folder or a bucket's prefix")
    group.add_argument(
        "--older-than",
        type=age_s,
        metavar="TIME",
        help="only archives that were not found whole for so long, as 12h, 7d, 2w",
    )
    group.add_argument(
        "--sample",
        type=share,
        metavar="PERCENT",
        help="at most this share of its archives, as 5%%, and at least one: the longest unverified first",
    )
    add_read_options(parser)
    add_report_options(parser)
    parser.add_argument("archives", metavar="ARCHIVE|PLACE", nargs="+", help=PLACE_HELP)
    options = parser.parse_args(argv)
    return run(prog, lambda: _verify(prog, options))


def add_read_options(parser: argparse._ActionsContainer) -> None:
    """Add how archives are read."""
    parser.add_argument(
        "--zstd-window",
        type=size,
        default=0,
        metavar="SIZE",
        help="memory that a zstd archive may ask for, as zstd --long makes them "
        "(default: 128M; at most 2G)",
    )
    add_identity_option(parser)


def read_options(options: argparse.Namespace) -> ReadOptions:
    """Raises UsageError."""
    window_bytes: int = options.zstd_window
    if window_bytes and not _MIN_WINDOW_BYTES <= window_bytes <= _MAX_WINDOW_BYTES:
        raise UsageError("--zstd-window: use 1K to 2G")
    return ReadOptions(window_bytes, identities=identities_of(options))


def _each(
    prog: str,
    options: argparse.Namespace,
    work: Callable[[str, argparse.Namespace, Cancel], None],
) -> None:
    """Do `work` for each archive. Of several, tell each failure and go on; the worst one counts."""
    names: list[str] = options.archives
    if names.count("-") > 1:
        raise UsageError("stdin holds one archive, and was named twice")
    read_options(options)  # a wrong one is told before anything is read
    for name in names:
        inherited_fds(name)
    # Only now: it opens descriptors of its own.
    cancel = Cancel()
    cancel.on_signals()
    codes: list[int] = []
    for name in names:
        try:
            work(name, options, cancel)
        except (Cancelled, BrokenPipeError):
            raise
        except (Failure, VmaError, OSError) as error:
            failure = failure_of(error)
            if len(names) == 1 or failure is None:
                raise
            sys.stdout.flush()
            print(f"{prog}: {one_line(failure[0])}", file=sys.stderr, flush=True)
            codes.append(failure[1])
    if codes:
        total = Failure(f"something is wrong with {len(codes)} of {len(names)} archives")
        total.exit_code = max(codes)
        raise total


def open_by_name(name: str, options: argparse.Namespace, cancel: Cancel) -> Archive:
    """The archive, or a Failure that names it."""
    with naming(name):
        return open_archive(name, cancel, read_options(options))


def open_signed(options: argparse.Namespace, cancel: Cancel, emit: Emit) -> Archive:
    """Open `options.archive`, when it was found to be signed by whom `--signed-by` names, if that is asked for."""
    reading = read_options(options)  # a wrong key is told before anything is read
    check_signed(options.archive, options, cancel, emit)
    return open_archive(options.archive, cancel, reading)


def _list(name: str, options: argparse.Namespace, cancel: Cancel) -> None:
    if _may_be_place(name):
        # Late: most lists are of one archive.
        from vmapipe.control.cli.places import list_place
        from vmapipe.places.place import is_place

        if is_place(name):
            list_place(name, options, cancel)
            return
    check_signed(name, options, cancel, lambda event: None)
    try:
        archive = open_by_name(name, options, cancel)
    except NoKeyError:
        if options.identity:
            raise
        _list_encrypted(name, options)
        return
    # Late: other commands have use for this file's options alone.
    from vmapipe.control.cli.condition import condition_json, condition_lines, condition_of

    with archive:
        header = archive.header
        condition = condition_of(name, header.uuid, cancel, identities_of(options))
        if options.json:
            print(json.dumps({**listing(header), **condition_json(condition)}))
            return
        made = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(header.ctime_s))
        print(f"{one_line(source_name(name))}: VMA archive {uuid_text(header.uuid)}, made {made}")
        for device in header.devices:
            size = human_bytes(device.size_bytes)
            kind = "memory" if device.is_vmstate else "device"
            note = " (an estimate)" if device.is_vmstate else ""
            print(
                f"  {kind} {device.dev_id:3}  {one_line(device.name, MAX_NAME_CHARS):<24} "
                f"{device.size_bytes:>16} bytes  {size}{note}"
            )
        for config in header.configs:
            print(
                f"  config      {one_line(config.name, MAX_NAME_CHARS):<24} {len(config.data):>16} bytes"
            )
        for line in condition_lines(condition):
            print(f"  {line}")


def _list_encrypted(name: str, options: argparse.Namespace) -> None:
    """Tell what can be seen without a key."""
    if options.json:
        print(json.dumps({"encrypted": True}))
        return
    print(
        f"{one_line(source_name(name))}: encrypted (age); what it holds can be listed with a key "
        "(--identity FILE)"
    )


def listing(header: Header) -> dict[str, object]:
    """The header as JSON has it; sizes in bytes, time in seconds since 1970."""
    return {
        "uuid": header.uuid.hex(),
        "ctime": header.ctime_s,
        "devices": [
            {
                "dev_id": d.dev_id,
                "name": d.name,
                "bytes": d.size_bytes,
                "kind": "vmstate" if d.is_vmstate else "disk",
            }
            for d in header.devices
        ],
        "configs": [{"name": c.name, "bytes": len(c.data)} for c in header.configs],
    }


def _config(options: argparse.Namespace) -> None:
    inherited_fds(options.archive)
    cancel = Cancel()
    cancel.on_signals()
    with open_by_name(options.archive, options, cancel) as archive:
        configs = archive.header.configs
    if options.json:
        texts = {c.name: c.data.decode("utf-8", "backslashreplace") for c in configs}
        print(json.dumps(texts))
        return
    sys.stdout.buffer.write(find_config(configs, options.name).data)


def find_config(configs: Sequence[Config], name: str | None) -> Config:
    """The config of that name; without one the default's, or the only one. Raises Failure."""
    wanted = name if name is not None else DEFAULT_CONFIG
    found = next((config for config in configs if config.name == wanted), None)
    if found is None and name is None and len(configs) == 1:
        found = configs[0]
    if found is None:
        there = (
            ", ".join(one_line(config.name, MAX_NAME_CHARS) for config in configs) or "none at all"
        )
        raise Failure(f"the archive has no config {name_text(wanted)}; it has {there}")
    return found


def _verify(prog: str, options: argparse.Namespace) -> None:
    if options.manifest and options.no_manifest:
        raise UsageError("--manifest and --no-manifest exclude each other")
    if options.no_manifest and options.signed_by:
        raise UsageError("--signed-by and --no-manifest exclude each other: the manifest is signed")
    if options.no_manifest and options.require_manifest:
        raise UsageError("--require-manifest and --no-manifest exclude each other")
    options.kept_verdicts = _verified_archives(options)
    # Without a place among them they stay as they were named, one of them perhaps twice.
    if set(options.kept_verdicts) != set(options.archives):
        options.archives = list(options.kept_verdicts)
    if options.manifest and len(options.archives) > 1:
        raise UsageError("--manifest names the manifest of one archive, and several were named")
    _each(prog, options, _verify_one)


def _verified_archives(options: argparse.Namespace) -> Mapping[str, KeptVerdict | None]:
    """What is to be verified: places are taken apart."""
    chosen = options.older_than is not None or options.sample is not None
    if not chosen and not any(map(_may_be_place, options.archives)):
        # The same archive may be named twice; only "-" may not.
        if options.archives.count("-") > 1:
            raise UsageError("stdin holds one archive, and was named twice")
        return dict.fromkeys(options.archives)
    from vmapipe.control.cli.places import expand  # late: most verifications are of one archive

    return expand(options.archives, options)


def _may_be_place(name: str) -> bool:
    return is_object(name) or os.path.isdir(name)


def _verify_one(name: str, options: argparse.Namespace, cancel: Cancel) -> None:
    choice = VerifyOptions(
        manifest=options.manifest,
        check_digests=not options.no_manifest,
        file_digest=options.whole_file,
        read=read_options(options),
    )
    started_s, kept = time.time(), options.kept_verdicts[name]
    if kept is not None and not kept.archive:
        # What verifies each night would say for ever that all is well with a folder that is not mounted.
        raise Failure(f"there is no archive in {name}: nothing was verified; is it mounted?")
    with renderer("verify", options, sys.stdout) as emit:
        check_signed(name, options, cancel, emit)
        try:
            report = verify(name, emit, cancel, choice)
        except ArchiveError as error:
            if kept is not None:
                kept.keep(started_s, ok=False, data_checked=False)
            raise Damaged(named(name, error)) from error
        emit(report.event())
    data_checked = report.data_checked or (report.is_encrypted and report.file_checked)
    if kept is not None:
        kept.keep(started_s, ok=report.ok, data_checked=data_checked)
    if options.require_manifest and not data_checked:
        raise Failure(
            f"{source_name(name)}: the data was not checked, because there is no "
            "manifest of it; name one with --manifest"
        )
    if not report.ok:
        count = report.damage_count
        raise Damaged(
            f"{source_name(name)} is damaged: {count} "
            f"{'thing is' if count == 1 else 'things are'} wrong with it"
        )
