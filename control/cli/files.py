# SPDX-License-Identifier: Apache-2.0
"""`vmapipe files`: files of the file systems in an archive, without restoring it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmapipe.access.archive import open_for_access
from vmapipe.access.disk import named_disks
from vmapipe.access.files.copies import FileWriter, FolderWriter, TarWriter, shown
from vmapipe.access.files.engines import AUTO, ENGINES, Engines
from vmapipe.access.files.messages import (
    MAX_KEY_BYTES,
    MAX_WORD_BYTES,
    WRONG_KEY,
    Entry,
    EntryFailed,
    FileData,
    FromParser,
    Key,
    ParserNotice,
    Stretch,
    Volume,
)
from vmapipe.access.files.session import FileReader
from vmapipe.control.cli.caches import add_cache_options, caches_of
from vmapipe.control.cli.entries import entry_filter, print_entry
from vmapipe.control.cli.errors import naming
from vmapipe.control.cli.identity import (
    add_identity_option,
    add_signed_by_option,
    check_signed,
)
from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.events import Event
from vmapipe.runtime.process import run
from vmapipe.runtime.text import human_bytes, name_text, one_line

DESCRIPTION = """\
Look into the file systems of an archive's disks and take files out, without root and
without restoring anything: ext2, ext3, ext4, NTFS, FAT, exFAT, HFS+, UFS, ISO 9660, on whole disks and
in MBR or GPT partitions, logical volumes of LVM2 and, with a key, in LUKS1. The journal of ext3 and
ext4 is replayed in memory; where a log is not, a notice says so. XFS, btrfs, LUKS2 and
unreplayed logs are read by a small virtual machine where QEMU and a kernel are there. What is
read is compared with the archive's manifest.

A PLACE is [DISK[:PARTITION|/GROUP/VOLUME]:]/PATH; without a disk, all disks are looked through,
and without a path it is the whole file system. Links on the way are followed.

  ls ARCHIVE              its disks, partitions and file systems
  ls ARCHIVE PLACE        the entries of a folder (-l: with all that is known of each)
  find ARCHIVE PLACE      a folder and everything below it (--name '*.conf': of these names)
  cat ARCHIVE PLACE       a file's bytes, to standard output
  cp ARCHIVE PLACE DEST   a file, or a folder with all below it, into DEST
  tar ARCHIVE PLACE       the same as a tar stream: owners, device nodes, xattrs, holes
"""
EPILOG = """\
examples:
  vmapipe files ls vm.vma.zst
  vmapipe files ls -l vm.vma.zst /etc
  vmapipe files cat vm.vma.zst /etc/fstab
  vmapipe files cp vm.vma.zst drive-scsi0:2:/home/anna ./
  vmapipe files cp vm.vma.zst drive-scsi0/vg0/root:/etc ./etc-of-the-backup
  vmapipe files ls --key-file drive-scsi1:1=disk.key vm.vma.zst drive-scsi1:1:/
  vmapipe files tar vm.vma.zst drive-scsi1:/srv | tar -x --xattrs -C /srv/back
"""
_PLACE_FORM = "[DISK[:PARTITION|/GROUP/VOLUME]:]/PATH"
# As Linux: more are a circle.
_MAX_LINKS = 40


class _Place(NamedTuple):
    """A parsed PLACE. `disk`: by number, -1 if not given; `volume`: its name on the disk, or empty."""

    disk: int
    volume: str
    path: bytes


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument("action", choices=("ls", "find", "cat", "cp", "tar"), help="see above")
    parser.add_argument(
        "archive", metavar="ARCHIVE", help="a file, a block device, s3://BUCKET/KEY"
    )
    parser.add_argument("place", metavar="PLACE", nargs="?", help=_PLACE_FORM)
    parser.add_argument("dest", metavar="DEST", nargs="?", help="for cp: a folder, or a new name")
    parser.add_argument(
        "-l", "--long", action="store_true", help="for ls and find: with mode, owner, size, time"
    )
    parser.add_argument(
        "-R", "--recursive", action="store_true", help="for ls: everything below, too"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="GLOB",
        help="for ls and find: only names that match ('*.conf'), or with a / in it whole paths; may be repeated",
    )
    parser.add_argument(
        "--iname",
        action="append",
        default=[],
        metavar="GLOB",
        help="the same, whether letters are large or small",
    )
    parser.add_argument(
        "--json", action="store_true", help="for ls and find: a JSON object on a line for each"
    )
    parser.add_argument(
        "-0",
        "--null",
        action="store_true",
        help="for ls and find: names as they are, each ended by a zero byte (for xargs -0)",
    )
    add_key_option(parser)
    add_engine_options(parser)
    add_cache_options(parser)
    add_identity_option(parser)
    add_signed_by_option(parser)
    options = parser.parse_args(argv)
    return run(prog, lambda: _files(options))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what reads file systems, and with what."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=AUTO,
        help="what reads the file systems: a parser in a process without rights; vm: a small virtual machine, "
        "which reads what a Linux kernel mounts; auto: the parser, and vm for what that cannot read (default: %(default)s)",
    )
    parser.add_argument(
        "--appliance",
        metavar="DIR",
        help="for the engine vm: where a kernel and its modules are, as dpkg-deb -x leaves Debian's package "
        "linux-image-…-cloud-amd64 (default: $VMAPIPE_APPLIANCE, or this host's own kernel)",
    )


def add_key_option(parser: argparse.ArgumentParser) -> None:
    """Add the keys of encrypted volumes, which `read_keys` reads."""
    parser.add_argument(
        "--key-file",
        action="append",
        default=[],
        metavar="[PLACE=]FILE",
        help="a key for encrypted volumes (LUKS), all bytes of the file, as cryptsetup's option takes "
        "it (- is standard input); with DISK[:PARTITION|/GROUP/VOLUME]= for that place, otherwise for any; may be repeated",
    )


def _files(options: argparse.Namespace) -> None:
    _check(options)
    cancel = Cancel()
    cancel.on_signals()
    with contextlib.ExitStack() as stack:
        with naming(options.archive):
            caches = caches_of(options)  # a wrong key is told before anything is read
            check_signed(options.archive, options, cancel, _signed_notice)
            archive = open_for_access(options.archive, cancel, _notice, caches)
        stack.callback(archive.close)
        disks = named_disks(archive, bool, _notice)
        if not disks:
            raise Failure(
                f"{options.archive} has no disk: only configurations, or a machine's memory"
            )
        names = [name for name, _ in disks]
        place = None if options.place is None else _parse_place(options.place, names)
        keys = read_keys(options, names)
        engines = stack.enter_context(
            Engines(disks, cancel, keys, options.engine, options.appliance, _notice)
        )
        if place is None:
            status = _list_volumes(engines, options)
        else:
            session, volume = engines.find(place.disk, os.fsencode(place.volume), place.path)
            status = _ACTIONS[options.action](session, volume, place, options)
        if status:
            raise Failure("not all of it could be read: the lines above say what is missing")


def _check(options: argparse.Namespace) -> None:
    if options.place is None and options.action != "ls":
        raise UsageError(f"{options.action} needs a PLACE: {_PLACE_FORM}")
    if (options.action == "cp") != (options.dest is not None):
        raise UsageError("cp, and nothing else, takes a DEST: a folder, or a new name")
    if (options.name or options.iname) and options.action not in ("ls", "find"):
        raise UsageError("--name and --iname are for ls and find")
    if options.action == "tar" and sys.stdout.isatty():
        raise UsageError("the tar stream goes to standard output, which is a terminal")


def _signed_notice(event: Event) -> None:
    if event["event"] == "notice":
        _notice(event["text"])


def _notice(text: str) -> None:
    print(f"vmapipe files: {one_line(text)}", file=sys.stderr)


def _tell(message: FromParser) -> int:
    """Print a notice or an error of the parser; return the exit status that it makes."""
    match message:
        case ParserNotice(text):
            _notice(f"notice: {os.fsdecode(text)}")
        case EntryFailed(path, reason):
            _notice(f"{shown(path)}: {os.fsdecode(reason)}" if path else os.fsdecode(reason))
            return 1
    return 0


def _parse_place(text: str, disks: Sequence[str]) -> _Place:
    if text.startswith("/"):
        return _Place(-1, "", os.fsencode(text))
    where, slash, path = text.partition(":/")
    if not slash:
        # As `ls` shows it: the whole of it.
        whole = _parse_where(text.removesuffix(":"), disks)
        if whole is None or (whole[0] < 0 and not text.endswith(":")):
            raise UsageError(f"{name_text(text)} is not a valid place: {_PLACE_FORM}")
        return _Place(*whole, b"/")
    found = _parse_where(where, disks)
    if found is None:
        there = ", ".join(map(name_text, disks)) or "none"
        raise UsageError(f"there is no disk {name_text(where)}; there is {there}")
    return _Place(*found, os.fsencode(f"/{path}"))


def _parse_where(where: str, disks: Sequence[str]) -> tuple[int, str] | None:
    """The number of a disk and the name of a volume on it: DISK, DISK:PARTITION, DISK/GROUP/VOLUME.

    -1 and a name for GROUP/VOLUME, which may lie on several; None: there is no such disk.
    """
    # A name may have these marks in it, and begin with another one.
    for name in sorted(disks, key=len, reverse=True):
        rest = where[len(name) :]
        if where.startswith(name) and (not rest or rest[0] in ":/"):
            return disks.index(name), rest.removeprefix(":")
    return (-1, f"/{where}") if where.count("/") == 1 else None


def read_keys(options: argparse.Namespace, disks: Sequence[str]) -> list[Key]:
    """The keys that --key-file names. Raises Failure, UsageError."""
    return [_read_key(word, disks) for word in options.key_file]


def _read_key(word: str, disks: Sequence[str]) -> Key:
    """Raises Failure, UsageError. The key itself is in no message."""
    where, equals, path = word.partition("=")
    found = _parse_where(where, disks) if equals else None
    disk, name = found or (-1, "")
    path = path if found else word
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            secret = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise Failure(
            f"cannot read the key file {name_text(path)}: {os_error_text(error)}"
        ) from error
    if not 0 < len(secret) <= MAX_KEY_BYTES:
        raise UsageError(
            f"the key file {name_text(path)} has to hold 1 byte to {MAX_KEY_BYTES >> 10} KiB"
        )
    label = name_text(path)
    if secret.endswith(b"\n"):
        label += " (its last byte is a new line, and counts)"
    return Key(disk, os.fsencode(name), os.fsencode(label)[:MAX_WORD_BYTES], secret)


# --- ls, find ---


def _list_volumes(engines: Engines, options: argparse.Namespace) -> int:
    session = engines.first()
    status, wrong = 0, list[str]()
    for message in session.ask("volumes"):
        match message:
            case Volume():
                print(_volume_line(engines, session, message, options.json))
                if message.remark.startswith(WRONG_KEY):
                    wrong.append(f"{session.place_of(message)}: {os.fsdecode(message.remark)}")
            case _:
                status = max(status, _tell(message))
    sys.stdout.flush()
    if wrong:
        raise Failure("; ".join(wrong))
    return status


def _volume_line(engines: Engines, session: FileReader, volume: Volume, as_json: bool) -> str:
    kind, remark = os.fsdecode(volume.kind), os.fsdecode(volume.remark)
    is_for_vm = engines.may_read(volume) and not engines.obstacle()
    name = os.fsdecode(volume.name)
    if as_json:
        row = {
            "disk": session.names[volume.disk],
            "partition": "" if name.startswith("/") else name,
            "volume": name if name.startswith("/") else None,
            # A logical volume may lie in several places.
            "offset": None if name.startswith("/") else volume.offset,
            "bytes": volume.size_bytes,
            "kind": kind,
            "in": [os.fsdecode(layer) for layer in volume.layers],
            "readable": volume.can_read or is_for_vm,
            "remark": remark or None,
        }
        return json.dumps(row)
    size = human_bytes(volume.size_bytes)
    if is_for_vm:
        remark = "read by the engine vm"
    elif not remark and kind and not volume.can_read:
        remark = "not readable here"
    remark = f" ({remark})" if remark else ""
    locks = [layer for layer in (b"luks1", b"luks2") if layer in volume.layers]
    inside = f" in {locks[0].decode()}" if locks and volume.can_read else ""
    what = f"{kind or 'unknown'}{inside}{remark}"
    return one_line(f"{session.place_of(volume) + ':':<24} {size:>12}  {what}")


def _print_entries(
    action: str, session: FileReader, volume: Volume, place: _Place, options: argparse.Namespace
) -> int:
    status = 0
    wanted = entry_filter(options)
    for message in session.ask(action, volume.disk, volume.name, place.path):
        if not isinstance(message, Entry):
            status = max(status, _tell(message))
        elif wanted(message.path):
            path = message.path
            if action == "list":
                path = path.rpartition(b"/")[2] or path
            print_entry(message, path, options)
    sys.stdout.flush()
    return status


def _list(session: FileReader, volume: Volume, place: _Place, options: argparse.Namespace) -> int:
    action = "walk" if options.recursive else "list"
    return _print_entries(action, session, volume, place, options)


def _walk(session: FileReader, volume: Volume, place: _Place, options: argparse.Namespace) -> int:
    return _print_entries("walk", session, volume, place, options)


# --- cat, cp, tar ---


def _cat(session: FileReader, volume: Volume, place: _Place, options: argparse.Namespace) -> int:
    """A file's bytes; of a link, those of the file that it leads to in the same file system."""
    del options
    path = place.path
    for _ in range(_MAX_LINKS):
        writer = FileWriter(sys.stdout.buffer)
        try:
            status = _copy(session, volume, path, writer)
        except Failure as error:
            if path == place.path:
                raise
            raise Failure(f"{shown(place.path)} is a link to {shown(path)}: {error}") from error
        if writer.target is None:
            return status
        path = os.path.normpath(os.path.join(os.path.dirname(path), writer.target))
    raise Failure(f"{shown(place.path)}: its links lead round in a circle")


def _tar(session: FileReader, volume: Volume, place: _Place, options: argparse.Namespace) -> int:
    del options
    return _copy(
        session, volume, place.path, TarWriter(sys.stdout.buffer, _tidy(place.path), _notice)
    )


def _cp(session: FileReader, volume: Volume, place: _Place, options: argparse.Namespace) -> int:
    path = _tidy(place.path)
    folder, name = os.path.split(os.fsencode(options.dest).rstrip(b"/") or b"/")
    if os.path.isdir(options.dest):
        folder, name = os.fsencode(options.dest), path.rpartition(b"/")[2]
        if not name:
            raise UsageError("for a whole file system, DEST has to be the name of a new folder")
    try:
        fd = os.open(folder or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(f"cannot open {shown(folder)}: {os_error_text(error)}") from error
    try:
        return _copy(session, volume, place.path, FolderWriter(fd, path, name, _notice))
    finally:
        os.close(fd)


def _tidy(path: bytes) -> bytes:
    return b"/" + b"/".join(name for name in path.split(b"/") if name)


def _copy(
    session: FileReader, volume: Volume, path: bytes, writer: FileWriter | TarWriter | FolderWriter
) -> int:
    status = 0
    for message in session.ask("read", volume.disk, volume.name, path):
        match message:
            case Entry():
                writer.entry(message)
            case Stretch():
                writer.stretch(message)
            case FileData():
                writer.data(message)
            case EntryFailed(where, reason):
                status = 1
                text = f"{shown(where or path)}: {os.fsdecode(reason)}"
                writer.failed(text)  # the end of `cat`, which tells it
                _notice(text)
            case _:
                _tell(message)
    writer.close()
    return status if writer.is_whole else 1


_ACTIONS: dict[str, Callable[[FileReader, Volume, _Place, argparse.Namespace], int]] = {
    "ls": _list,
    "find": _walk,
    "cat": _cat,
    "cp": _cp,
    "tar": _tar,
}
