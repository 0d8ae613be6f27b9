# SPDX-License-Identifier: Apache-2.0
"""`vma`: a drop-in for the reference tool. Its grammar, its output, exit codes in place of crashes."""

from __future__ import annotations

import getopt
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from vmapipe.control.cli.errors import reference_words
from vmapipe.runtime.errors import EXIT_OK, EXIT_USAGE, Failure, UsageError
from vmapipe.runtime.process import keep_standard_descriptors, leave, raise_descriptor_limit, run
from vmapipe.vma.errors import ArchiveError

USAGE = """\
usage: vma command [command options]

vma list FILE
vma config FILE [-c CONFIG]
vma create FILE [-v] [-c CONFIG]... [-d format=FMT:DEVNAME=PATH]...
vma extract FILE [-v] [-d DRIVE,...] [-r MAPFIFO] DIR
vma verify FILE [-v]

list, config, extract and verify take --identity KEYFILE for encrypted archives.
FILE - is standard input (for create: standard output).
exit codes: 0 done, 1 failed, 2 wrong use, 4 the archive is damaged
"""

# Each is imported only when it is asked for.
_COMMANDS = {
    "list": ("vmapipe.control.cli.vma_read", "show_list"),
    "config": ("vmapipe.control.cli.vma_read", "show_config"),
    "create": ("vmapipe.control.cli.vma_create", "create"),
    "extract": ("vmapipe.control.cli.vma_read", "extract"),
    "verify": ("vmapipe.control.cli.vma_read", "verify"),
}


def program() -> NoReturn:
    """The console script."""
    leave("vma", main)


def main(argv: Sequence[str] | None = None) -> int:
    keep_standard_descriptors()
    raise_descriptor_limit()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"], ["help"]) or (argv[:1] and "-h" in argv[1:]):
        sys.stdout.write(USAGE)
        return EXIT_OK
    if not argv or argv[0] not in _COMMANDS:
        sys.stderr.write(USAGE)
        return EXIT_USAGE
    module, name = _COMMANDS[argv[0]]
    command: Callable[[Sequence[str]], None] = getattr(importlib.import_module(module), name)
    return run("vma", lambda: _carry_out(command, argv[1:]))


def _carry_out(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    try:
        command(argv)
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; `vma -h` tells the grammar") from error
    except ArchiveError as error:
        # Of the header: the reference says these without a prefix.
        raise Failure(reference_words(error)) from error


if __name__ == "__main__":
    program()
