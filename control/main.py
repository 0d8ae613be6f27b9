# SPDX-License-Identifier: Apache-2.0
"""`vmapipe`: one name for every command; each is imported only when it is asked for."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from vmapipe.runtime.errors import EXIT_USAGE
from vmapipe.runtime.process import (
    keep_standard_descriptors,
    leave,
    program_version,
    raise_descriptor_limit,
)
from vmapipe.runtime.text import name_text, one_line

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Back up disks of virtual machines into one VMA archive, the format of Proxmox
VE, and bring them back. One process reads each disk, one writes the archive.

back up and restore:
  doctor     say what can be backed up here and how, changing nothing
  backup     back up disks into an archive
  restore    bring an archive's disks back

use an archive without restoring it:
  list       show what an archive holds, or which archives a folder or bucket has
  config     print a configuration stored in an archive
  serve      attach an archive's disks over NBD
  files      list an archive's files and take some out
  mount      show an archive as a folder: its disks, configurations, files

keep archives:
  verify     check an archive, or those of a folder or bucket, writing nothing into them
  drill      boot an archive, and say whether it did
  report     say of every machine whether it is safe, as a table, page, metrics
  copy       copy archives between folders and object stores, checked on the way
  prune      remove old archives by retention rules, as Proxmox VE does
  repack     store an archive anew: in order, with a manifest, without or with renamed disks
  manifest   make the manifest of an archive that has none

running backups:
  status     show progress of running backups
  speed      change the speed limit of a running backup
  cancel     cancel a running backup
  cleanup    remove what a crashed backup has left in a running QEMU

many machines:
  fleet      back up and test every machine of every host, within limits

services:
  monitor    serve disks to guests, so that they can be backed up while in use
  archiver   receive disks from producers and store the archive
  producer   read one disk and send it to an archiver (by hand, or elsewhere)

keys:
  keygen     make keys: for an archiver and its clients, or one that signs archives

`vmapipe COMMAND --help` explains each. `vma` speaks the reference tool's grammar.
"""

EPILOG = """\
first steps, with a disk that no machine is using:
  vmapipe backup --disk drive-scsi0=/srv/vm.raw --config vm.conf --compress zstd vm.vma.zst
  vmapipe verify vm.vma.zst
  vmapipe restore vm.vma.zst restored/        # restored/disk-drive-scsi0.raw

a running machine (its QEMU needs -qmp unix:qmp.sock,server=on,wait=off):
  vmapipe backup --qmp qmp.sock --config vm.conf vm.vma

exit codes: 0 done, 1 failed, 2 wrong use, 4 an archive is damaged or did not boot, or a machine is not safe,
130/143 ended by a signal (fleet check: a Nagios plugin's)
"""

# Where each command starts: module and function.
COMMANDS = {
    "backup": ("vmapipe.control.cli.backup", "main"),
    "restore": ("vmapipe.control.cli.restore", "main"),
    "list": ("vmapipe.control.cli.inspect", "main_list"),
    "config": ("vmapipe.control.cli.inspect", "main_config"),
    "verify": ("vmapipe.control.cli.inspect", "main_verify"),
    "serve": ("vmapipe.control.cli.serve", "main"),
    "files": ("vmapipe.control.cli.files", "main"),
    "mount": ("vmapipe.control.cli.mount", "main"),
    "drill": ("vmapipe.control.cli.drill", "main"),
    "status": ("vmapipe.control.cli.running", "main_status"),
    "speed": ("vmapipe.control.cli.running", "main_speed"),
    "cancel": ("vmapipe.control.cli.running", "main_cancel"),
    "doctor": ("vmapipe.control.cli.doctor", "main"),
    "repack": ("vmapipe.control.cli.repack", "main"),
    "copy": ("vmapipe.control.cli.copy", "main"),
    "manifest": ("vmapipe.control.cli.repack", "main_manifest"),
    "prune": ("vmapipe.control.cli.prune", "main"),
    "report": ("vmapipe.control.cli.report", "main"),
    "monitor": ("vmapipe.control.cli.monitor", "main"),
    "cleanup": ("vmapipe.control.cli.cleanup", "main"),
    "producer": ("vmapipe.producer.main", "main"),
    "archiver": ("vmapipe.archiver.main", "main"),
    "fleet": ("vmapipe.control.cli.fleet", "main"),
    "keygen": ("vmapipe.control.cli.keygen", "main"),
}


# Imports make some 100,000 objects, which all stay: looking through them for cycles
# after every 700, which is Python's default, takes 7 % of a start. So many of ours
# take some MiB at the most, for a moment.
_GC_THRESHOLD = 20_000


def program() -> NoReturn:
    """The console script."""
    gc.set_threshold(_GC_THRESHOLD)
    leave("vmapipe", main)


def main(argv: Sequence[str] | None = None) -> int:
    keep_standard_descriptors()
    raise_descriptor_limit()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        # Whatever follows belongs to the command.
        return _command(arguments[0])(arguments[1:], f"vmapipe {arguments[0]}")
    if arguments and arguments[0] == "--version":
        print(f"vmapipe {program_version()}")
        return 0
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if arguments[0] not in ("-h", "--help"):
        parser.exit(EXIT_USAGE, _not_a_command(arguments[0]))
    parser.parse_args(arguments[:1])  # shows the help, and ends
    return 0


def _command(name: str) -> Callable[[Sequence[str], str], int]:
    module, function = COMMANDS[name]
    command: Callable[[Sequence[str], str], int] = getattr(
        importlib.import_module(module), function
    )
    return command


def _parser() -> argparse.ArgumentParser:
    """Return the parser of what is no command: it shows the help."""
    # Imported here: --version does without.
    import argparse

    parser = argparse.ArgumentParser(
        prog="vmapipe",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="vmapipe COMMAND [OPTION]...",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", choices=sorted(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _not_a_command(word: str) -> str:
    import difflib  # late: a command that is one needs none of it

    kind = "option" if word.startswith("-") else "command"
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    guess = f": did you mean {near[0]}?" if near else ""
    return (
        one_line(f"vmapipe: there is no {kind} {name_text(word)}{guess} (see vmapipe --help)")
        + "\n"
    )


if __name__ == "__main__":
    program()
