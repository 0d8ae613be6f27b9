# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup`: the command line of a backup job."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Sequence

from vmapipe.archiver.arguments import add_output_options
from vmapipe.control.job import BackupJob, Disk, goes_to_stdout, inherited_fds
from vmapipe.control.render import add_report_options, renderer
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.cli import add_buffer_options, make_parser, size, split_named
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.process import run

DESCRIPTION = """\
Back up disks into one VMA archive: disks at rest (raw image files or block
devices), or those that a monitor serves to a running guest, all at one instant.
A process of its own reads each disk; another writes the archive, which appears
under its name only when it is complete and on disk. Holes and zeroes cost
next to nothing.
"""

EPILOG = """\
ARCHIVE is a new file, - (stdout), a FIFO or character device, exec:COMMAND,
fd:N or /dev/fdset/N. Beside a file, ARCHIVE.manifest.json gets the digests
with which `vmapipe verify` finds damaged data.

examples:
  vmapipe backup --disk drive-scsi0=/srv/vm.raw --config qemu-server.conf vm.vma
  vmapipe backup --disk /dev/vg0/vm --compress zstd vm.vma.zst
  vmapipe backup --monitor /run/vm/monitor.sock --config vm.conf vm.vma
  vmapipe backup --disk /srv/vm.raw - | ssh backup.example 'cat > vm.vma'

exit codes: 0 stored, 1 failed (nothing was stored), 2 wrong use, 130/143 ended by a signal
"""


# Images whose bytes are not the disk's.
_MAGICS = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
    b"QED\0": "qed",
}


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="[NAME=]PATH[,format=raw]",
        help="a disk, and its name in the archive (default: the file's name); may be repeated",
    )
    parser.add_argument(
        "--monitor",
        metavar="SOCKET",
        help="back up the disks of this monitor while they are in use; --disk NAME then chooses "
        "some of them",
    )
    add_buffer_options(parser)
    parser.add_argument(
        "--speed",
        type=size,
        default=0,
        metavar="BYTES/S",
        help="read at most this much a second, all disks together; K, M, G, T are powers of 1024 "
        "(what a guest's writes save is not slowed down)",
    )
    add_output_options(parser)
    add_report_options(parser)
    parser.add_argument("archive", metavar="ARCHIVE", help="where the archive goes")
    options = parser.parse_args(argv)
    return run(prog, lambda: _backup(options))


def _backup(options: argparse.Namespace) -> None:
    # First of all, before we open descriptors of our own.
    pass_fds = [*inherited_fds(options.archive), *open_configs(options)]
    job = BackupJob(
        disks=choose_disks(options),
        archive=options.archive,
        archiver_options=archiver_options(options),
        speed_bytes_s=options.speed,
        pass_fds=pass_fds,
        buffer_options=[
            f"--buffer={options.buffer}",
            f"--spool={options.spool}",
            f"--spool-size={options.spool_size}",
            f"--guest-wait={options.guest_wait}",
        ],
    )
    cancel = Cancel()
    cancel.on_signals()
    # With the archive on stdout, every word goes to stderr.
    stream = sys.stderr if goes_to_stdout(options.archive) else sys.stdout
    with renderer("backup", options, stream) as emit:
        job.run(emit, cancel)


def choose_disks(options: argparse.Namespace) -> tuple[Disk, ...]:
    """Raises UsageError, Failure."""
    if options.monitor is None:
        return tuple(parse_disk(text) for text in options.disk)
    # Imported here: a backup of disks at rest starts sooner without.
    from vmapipe.control.monitor.client import guarded_disks

    served = {disk.name: disk for disk in guarded_disks(options.monitor)}
    for name in options.disk:
        if name not in served:
            known = ", ".join(sorted(served))
            raise UsageError(f"the monitor at {options.monitor} has no disk {name!r}, but {known}")
    wanted = dict.fromkeys(options.disk or served)
    return tuple(Disk(name, "", served[name].guard) for name in wanted)


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
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Failure(f"unable to read file '{path}': {os_error_text(error)}") from error
        fds.append(fd)
        options.config[index] = f"{name}=/dev/fd/{fd}"
    return fds


def parse_disk(text: str) -> Disk:
    """`[NAME=]PATH[,format=raw]`. Raises UsageError."""
    body, comma, option = text.rpartition(",")
    if comma and option.startswith("format="):
        image_format = option.removeprefix("format=")
        if image_format != "raw":
            raise UsageError(
                f"{text}: format {image_format!r} cannot be read yet; only raw images and block "
                f"devices can (convert it: qemu-img convert -O raw)"
            )
        return Disk(*split_named(body))
    disk = Disk(*split_named(text))
    image_format = _looks_like(disk.path)
    if image_format:
        raise UsageError(
            f"{disk.path} looks like a {image_format} image, which cannot be read yet (convert it: "
            f"qemu-img convert -O raw); if its raw bytes are wanted, say {text},format=raw"
        )
    return disk


def _looks_like(path: str) -> str:
    """The format of an image that is not raw, by its first bytes; empty: raw, or unreadable."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            start = file.read(8)
    except OSError:
        return ""  # the producer will say what is wrong
    return next((name for magic, name in _MAGICS.items() if start.startswith(magic)), "")


def archiver_options(options: argparse.Namespace) -> list[str]:
    """The options that a backup hands on to its archiver."""
    # With "=", because a name may begin with a dash.
    words = [f"--config={config}" for config in options.config]
    if options.compress:
        words.append(f"--compress={options.compress}")
    words.append(f"--threads={options.threads}")
    if options.manifest:
        words.append(f"--manifest={options.manifest}")
    if options.no_manifest:
        words.append("--no-manifest")
    elif options.json:
        words.append("--manifest-events")
    if options.reproducible:
        words.append("--reproducible")
    if options.uuid:
        words.append(f"--uuid={options.uuid.hex()}")
    return words
