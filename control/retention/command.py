# SPDX-License-Identifier: Apache-2.0
"""`vmapipe prune`: old archives go, by Proxmox's rules."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence

from vmapipe.control.render import human_bytes
from vmapipe.control.retention.names import PROTECTED, beside, parse
from vmapipe.control.retention.rules import RULES, Archive, Mark, Verdict, judge
from vmapipe.runtime.cli import make_parser
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.process import run
from vmapipe.runtime.texts import one_line

DESCRIPTION = """\
Say which archives in a folder are no longer needed, and with --yes remove them,
each with its log, notes and manifest. The rules are those of Proxmox VE and
Proxmox Backup Server. An archive belongs to the machine, and is from the time,
that its name says: vzdump-qemu-100-2026_01_31-02_00_00.vma.zst, vm-2026-01-31.vma.
Other files are left alone; so is an archive with a file ARCHIVE.protected beside it.
"""

EPILOG = """\
Each rule keeps the newest archive of its latest N hours, days, ... that have one,
and counts only those in which no rule before it (in the order above) kept one.

examples:
  vmapipe prune /backup --keep-last 3 --keep-daily 7 --keep-weekly 4
  vmapipe prune /backup --keep-last 3 --keep-daily 7 --keep-weekly 4 --yes
  vmapipe prune /backup --only vzdump-qemu-100 --keep-last 1 --yes

exit codes: 0 done (or said), 1 failed, 2 wrong use
"""

_PERIODS = {
    "last": "archives",
    "hourly": "hours",
    "daily": "days",
    "weekly": "weeks (as in ISO 8601)",
    "monthly": "months",
    "yearly": "years",
}


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    for rule in RULES:
        parser.add_argument(
            f"--keep-{rule}",
            type=_count,
            default=0,
            metavar="N",
            help=f"keep the newest of the latest N {_PERIODS[rule]}"
            if rule != "last"
            else "keep the latest N archives",
        )
    parser.add_argument("--keep-all", action="store_true", help="keep everything")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only archives of this machine: the name up to the date; may be repeated",
    )
    parser.add_argument("--yes", action="store_true", help="do it; without, it is only said")
    parser.add_argument("--json", action="store_true", help="a JSON line an archive")
    parser.add_argument("folder", metavar="DIR", help="where the archives are")
    options = parser.parse_args(argv)
    return run(prog, lambda: _prune(options))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of archives")
    return int(text)


def _prune(options: argparse.Namespace) -> None:
    keep = {rule: getattr(options, f"keep_{rule}") for rule in RULES}
    if not any(keep.values()) and not options.keep_all:
        raise UsageError("say what to keep: --keep-last N, --keep-daily N, ..., or --keep-all")
    if any(keep.values()) and options.keep_all:
        raise UsageError("--keep-all leaves nothing for the other rules to decide")
    groups = find(options.folder)
    for name in options.only:
        if name not in groups:
            known = ", ".join(sorted(groups)) or "none"
            raise UsageError(
                f"--only {name}: no archives of it in {options.folder}; there: {known}"
            )
    failed = 0
    for group in sorted(options.only or groups):
        verdicts = judge(groups[group], keep)
        if options.keep_all:
            verdicts = [
                v._replace(mark=Mark.KEEP, rule="all") if v.mark is Mark.REMOVE else v
                for v in verdicts
            ]
        failed += _carry_out(group, verdicts, options)
    if failed:
        raise Failure(f"{failed} archives could not be removed")
    if not options.yes and not options.json:
        print("nothing was removed: --yes does it")


def find(folder: str) -> Mapping[str, list[Archive]]:
    """Archives by machine. Raises Failure."""
    groups: dict[str, list[Archive]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                parsed = parse(entry.name)
                if parsed and entry.is_file(follow_symlinks=False):
                    path = os.path.join(folder, entry.name)
                    archive = Archive(path, *parsed, is_protected(path))
                    groups.setdefault(archive.group, []).append(archive)
    except OSError as error:
        raise Failure(f"cannot look into {folder}: {os_error_text(error)}") from error
    return groups


def _carry_out(group: str, verdicts: Sequence[Verdict], options: argparse.Namespace) -> int:
    """Returns how many could not be removed."""
    failed = 0
    for verdict in verdicts:
        path, removed, text = verdict.archive.path, False, ""
        size_bytes = _size(path)
        if verdict.mark is Mark.REMOVE and options.yes:
            try:
                remove(path)
                removed = True
            except Failure as failure:
                failed += 1
                text = str(failure)
                print(f"vmapipe prune: {one_line(text)}", file=sys.stderr)
        if options.json:
            line = {
                "archive": path,
                "group": group,
                "mark": verdict.mark.value,
                "rule": verdict.rule,
                "bytes": size_bytes,
                "removed": removed,
            }
            print(json.dumps(line))
        else:
            print(_words(verdict, size_bytes, removed=removed))
    return failed


def _words(verdict: Verdict, size_bytes: int, *, removed: bool) -> str:
    if verdict.mark is Mark.REMOVE:
        what = "removed" if removed else "remove"
    else:
        what = f"keep ({verdict.rule or verdict.mark.value})"
    return f"{what:18} {one_line(verdict.archive.path)}  {human_bytes(size_bytes)}"


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.lstat(path).st_size
    return 0


def is_protected(archive: str) -> bool:
    return os.path.lexists(archive + PROTECTED)


def remove(archive: str) -> None:
    """With what belongs to it; the archive first, so that none is left without its manifest.

    Raises Failure.
    """
    if is_protected(archive):
        raise Failure(f"{archive}: it has been protected just now")
    try:
        if not stat.S_ISREG(os.lstat(archive).st_mode):
            raise Failure(f"{archive}: it is no file any more")
        os.unlink(archive)
        for path in beside(archive):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    except OSError as error:
        raise Failure(f"cannot remove {error.filename}: {os_error_text(error)}") from error
