# SPDX-License-Identifier: Apache-2.0
"""`vmapipe list`, `vmapipe config` and `vmapipe verify`: look, and write nothing."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.control.cli.errors import naming, source_name
from vmapipe.control.cli.identity import add_identity_option, identities_of
from vmapipe.control.coordinator.output_spec import inherited_fds
from vmapipe.control.coordinator.render import add_report_options, renderer
from vmapipe.crypt.magic import is_encrypted
from vmapipe.restore.archive.compressed import MAGIC_BYTES, ReadOptions, compression_of
from vmapipe.restore.archive.errors import NoKeyError
from vmapipe.restore.archive.input import Pread
from vmapipe.restore.archive.manifest import Manifest, manifest_beside
from vmapipe.restore.archive.object import RemoteObject
from vmapipe.restore.archive.reader import Archive, open_archive
from vmapipe.restore.verify.verify import VerifyOptions, verify
from vmapipe.runtime.arguments import age_s, make_parser, share, size
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Damaged, Failure, UsageError
from vmapipe.runtime.objectstore import is_object
from vmapipe.runtime.process import failure_of, run
from vmapipe.runtime.text import MAX_NAME_CHARS, human_bytes, name_text, one_line
from vmapipe.vma.errors import ArchiveError, VmaError
from vmapipe.vma.header import Config, Header

if TYPE_CHECKING:
    from vmapipe.access.drill.result import DrillResult
    from vmapipe.control.cli.places import KeptVerdict
    from vmapipe.crypt.age import AgeIdentity


class Condition(NamedTuple):
    """`compression`: "none", "zstd", "gzip", "lzo", or "" where it cannot be looked at twice (a pipe).

    `is_seekable`: any place can be read at once, by serve, mount and files; else they decompress the
    archive up to there first. `has_digests`: its manifest stands beside it, so that what is read
    is checked. `drill`: the latest restore test; None: there was none.
    """

    compression: str
    is_seekable: bool
    has_digests: bool
    drill: DrillResult | None
    encrypted: bool = False


def condition_of(
    name: str, uuid: bytes, cancel: Cancel, identities: Sequence[AgeIdentity] = ()
) -> Condition:
    """Of the archive at `name`, whose header has this uuid. What cannot be found out is not there."""
    compression, is_seekable, encrypted = _stored_form(name, cancel, identities)
    if not compression:
        return Condition("", False, False, None)
    # Late, here and below: a restore has use for this file's options alone.
    from vmapipe.access.drill.result import read_result

    drill = None if is_object(name) else read_result(name, uuid)
    has_manifest = _has_manifest(name, uuid, cancel, identities)
    return Condition(compression, is_seekable, has_manifest, drill, encrypted)


def _stored_form(
    name: str, cancel: Cancel, identities: Sequence[AgeIdentity]
) -> tuple[str, bool, bool]:
    """Return the compression, whether any place can be read at once, and whether it is encrypted."""
    try:
        if is_object(name):
            remote = RemoteObject(name, (cancel,))
            try:
                return _form(name, remote.pread, remote.size_bytes, cancel, identities)
            finally:
                remote.close()
        if not _is_file(name):
            return "", False, False
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
            form = _form(name, lambda n, at: os.pread(fd, n, at), size, cancel, identities)
            # Its blocks are independent; finding them all here would take as long as opening it.
            if form[::2] != ("lzo", False):
                return form
            from vmapipe.access.lzo import can_read_lzo

            return "lzo", can_read_lzo(), False
        finally:
            os.close(fd)
    except Cancelled:
        raise
    except (OSError, Failure, ArchiveError):
        return "", False, False


def _is_file(name: str) -> bool:
    """False for "-", "exec:…" and the like, which no file is called, and for FIFOs."""
    mode = os.stat(name).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _form(
    name: str, pread: Pread, size_bytes: int, cancel: Cancel, identities: Sequence[AgeIdentity]
) -> tuple[str, bool, bool]:
    encrypted = is_encrypted(pread(MAGIC_BYTES, 0))
    if encrypted:
        from vmapipe.restore.archive.decrypt import AgeFile

        file = AgeFile(name, pread, size_bytes, identities)
        pread, size_bytes = file.pread, file.size_bytes
    compression = compression_of(pread(MAGIC_BYTES, 0))
    if compression == "zstd":
        # Listing a plain archive does without a library that many installations have not.
        from vmapipe.restore.archive.zstd import seekable_frames

        return compression, seekable_frames(pread, size_bytes, (cancel,)) is not None, encrypted
    return compression, compression == "none", encrypted


def _has_manifest(
    name: str, uuid: bytes, cancel: Cancel, identities: Sequence[AgeIdentity]
) -> bool:
    try:
        path = manifest_beside(name, cancel)
        if path is None:
            return False
        with Manifest(path, cancel, identities) as manifest:
            return manifest.opening.uuid == uuid
    except Cancelled:
        raise
    except (OSError, Failure, ArchiveError):
        return False


VERIFY_DESCRIPTION = """\
Check an archive without writing anything: header, checksums, uuid, counts,
clusters that are missing, double or beyond the end, vmstate's order, trailing
bytes. The format has no checksum for its data; with the manifest that `vmapipe
backup` leaves beside an archive, every byte of data is checked, too. Goes on
after damage, and names every device and range of bytes that is affected. Of a folder, or of a
bucket's prefix, all archives; when each was verified is kept beside it, in ARCHIVE.verified.json.
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
        "Tell what an archive holds: its devices with their sizes, and its configs; whether any place "
        "of it can be read at once, whether its data is checked by digests, and how its latest "
        "restore test ended. Of a folder, or of a bucket's prefix, a table of its archives: machine, time, "
        "size, when it was verified, how much of it others share, whether it is protected, encrypted or locked.",
        "examples:\n  vmapipe list vm.vma.zst\n  vmapipe list /backup s3://backups/vms",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, on one line, for each archive"
    )
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


def _list(name: str, options: argparse.Namespace, cancel: Cancel) -> None:
    if _may_be_place(name):
        # Late: most lists are of one archive.
        from vmapipe.control.cli.places import list_place
        from vmapipe.places.place import is_place

        if is_place(name):
            list_place(name, options)
            return
    try:
        archive = open_by_name(name, options, cancel)
    except NoKeyError:
        if options.identity:
            raise
        _list_encrypted(name, options)
        return
    with archive:
        header = archive.header
        condition = condition_of(name, header.uuid, cancel, identities_of(options))
        if options.json:
            print(json.dumps({**listing(header), **_condition_json(condition)}))
            return
        made = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(header.ctime_s))
        print(
            f"{one_line(source_name(name))}: VMA archive {uuid.UUID(bytes=header.uuid)}, made {made}"
        )
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
        for line in _condition_lines(condition):
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


def _condition_json(condition: Condition) -> dict[str, object]:
    """null for what cannot be known of a pipe."""
    known, drill = bool(condition.compression), condition.drill
    return {
        "compression": condition.compression or None,
        "encrypted": condition.encrypted if known else None,
        "seekable": condition.is_seekable if known else None,
        "digests": condition.has_digests if known else None,
        "drill": drill and {"verdict": drill.verdict, "date": drill.date, "seconds": drill.seconds},
    }


def _condition_lines(condition: Condition) -> list[str]:
    if not condition.compression:
        return []
    form = "plain" if condition.compression == "none" else condition.compression
    if condition.is_seekable:
        seekable = f"yes, {form}"
    else:
        seekable = f"no, {form} in one piece: serve, mount and files decompress it first"
    digests = "no manifest: its data cannot be checked"
    if condition.has_digests:
        digests = "a digest of each extent, compared when it is read"
    drill, drilled = condition.drill, "never"
    if drill is not None:
        after = "" if drill.seconds is None else f" after {drill.seconds:.1f} s"
        drilled = f"{drill.verdict}{after}, tested {drill.date}"
    encrypted = ["encrypted   yes, with age"] if condition.encrypted else []
    return [
        *encrypted,
        f"seekable    {seekable}",
        f"checked     {digests}",
        f"drilled     {one_line(drilled)}",
    ]


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
    if options.no_manifest and options.require_manifest:
        raise UsageError("--require-manifest and --no-manifest exclude each other")
    options.kept_verdicts = _verified_archives(options)
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
    with renderer("verify", options, sys.stdout) as emit:
        try:
            report = verify(name, emit, cancel, choice)
        except ArchiveError as error:
            if kept is not None:
                kept.keep(started_s, ok=False, data_checked=False)
            raise Damaged(f"{source_name(name)}: {error}{error.advice}") from error
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
