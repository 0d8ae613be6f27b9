# SPDX-License-Identifier: Apache-2.0
"""`vmapipe prune`: old archives go, by Proxmox's rules."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence

from vmapipe.control.cli.retention import (
    RULES,
    Clock,
    Mark,
    StoredArchive,
    Verdict,
    flood,
    judge,
)
from vmapipe.places.archives import by_machine, find_archives
from vmapipe.places.listing import lock_text
from vmapipe.places.place import KeptPlace, open_place
from vmapipe.places.removal import remove
from vmapipe.runtime.arguments import AGE_UNITS_S, duration_s, make_parser
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.process import run
from vmapipe.runtime.text import human_bytes, name_text, one_line

DESCRIPTION = """\
Say which archives in a folder or a bucket are no longer needed, and with --yes remove
them, each with its log, notes, manifest, digests and what `vmapipe drill` has kept. The
rules are those of Proxmox VE and Proxmox Backup Server. An incremental archive needs no
other one: any may go. An archive belongs to the machine, and is from the time, that its
name says: vzdump-qemu-100-2026_01_31-02_00_00.vma.zst, vm-2026-01-31.vma. Other files
are left alone; so is an archive with a file ARCHIVE.protected beside it, one whose name
says a time to come, and one that is locked (--lock), until that is over. In a folder
where a service stores, nothing goes for a week after it was stored, nor pushes anything
out.
"""

EPILOG = """\
Each rule keeps the newest archive of its latest N hours, days, ... that have one,
and counts only those in which no rule before it (in the order above) kept one.

examples:
  vmapipe prune /backup --keep-last 3 --keep-daily 7 --keep-weekly 4
  vmapipe prune /backup --keep-last 3 --keep-daily 7 --keep-weekly 4 --yes
  vmapipe prune /backup --only vzdump-qemu-100 --keep-last 1 --yes
  vmapipe prune s3://backups/vms --keep-daily 7 --keep-within 7d --yes

exit codes: 0 done (or said), 1 failed, 2 wrong use
"""

# In a folder of a service: long enough to read what is said of a flood, after a
# weekend and a holiday.
_SERVICE_WITHIN_S = 7 * 86400

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
    rules = parser.add_argument_group("what is kept")
    for rule in RULES:
        rules.add_argument(
            f"--keep-{rule}",
            type=_count,
            default=0,
            metavar="N",
            help=f"keep the newest of the latest N {_PERIODS[rule]}"
            if rule != "last"
            else "keep the latest N archives",
        )
    rules.add_argument(
        "--keep-within",
        type=_within_s,
        metavar="TIME",
        help="keep all that were stored less long ago, as 12h, 7d, 2w; they count for no other rule "
        "(default: 7d where a service stores, else 0)",
    )
    rules.add_argument(
        "--by-name",
        action="store_true",
        help="where a service stores: believe names that do not fit the time of storing, too (for "
        "archives that were copied without their times)",
    )
    rules.add_argument(
        "--keep-all", action="store_true", help="keep everything (to see what is there)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only archives of this machine: the name up to the date; may be repeated",
    )
    parser.add_argument(
        "--yes", action="store_true", help="remove them; without it, only show what would go"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each archive")
    parser.add_argument(
        "places",
        metavar="PLACE",
        nargs="+",
        help="where the archives are: a folder, s3://BUCKET/PREFIX",
    )
    options = parser.parse_args(argv)
    return run(prog, lambda: _prune(options))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of archives")
    return int(text)


def _within_s(text: str) -> int:
    """Parse 12h, 7d, 2w; without a unit days."""
    found = duration_s(text if text[-1:] in AGE_UNITS_S else f"{text}d")
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid time: 12h, 7d, 2w, or 0")
    return found


def _prune(options: argparse.Namespace) -> None:
    keep = {rule: getattr(options, f"keep_{rule}") for rule in RULES}
    if not any(keep.values()) and not options.keep_all:
        raise UsageError("say what to keep: --keep-last N, --keep-daily N, ..., or --keep-all")
    if any(keep.values()) and options.keep_all:
        raise UsageError("--keep-all leaves nothing for the other rules to decide")
    failures: list[Failure] = []
    for name in options.places:
        try:
            with contextlib.closing(open_place(name)) as place:
                _prune_in(place, keep, options)
        except UsageError:
            raise
        except Failure as failure:
            if len(options.places) == 1:
                raise
            _say(str(failure))
            failures.append(failure)
    if failures:
        raise Failure(f"something is wrong with {len(failures)} of {len(options.places)} places")
    if not options.yes and not options.json:
        print("nothing was removed: --yes does it")


def _prune_in(place: KeptPlace, keep: Mapping[str, int], options: argparse.Namespace) -> None:
    groups = find(place)
    for name in options.only:
        if name not in groups:
            known = ", ".join(sorted(groups)) or "none"
            raise UsageError(f"--only {name}: no archives of it in {place.name}; there: {known}")
    clock = _clock(place, options)
    failed = 0
    for group in sorted(options.only or groups):
        verdicts = judge([archive for archive, _ in groups[group]], keep, clock)
        if options.keep_all:
            verdicts = [
                v._replace(mark=Mark.KEEP, rule="all") if v.mark is Mark.REMOVE else v
                for v in verdicts
            ]
        verdicts = [_with_lock(place, verdict, clock) for verdict in verdicts]
        _warn(group, verdicts, clock)
        sizes = {archive.path: size_bytes for archive, size_bytes in groups[group]}
        failed += _carry_out(place, group, verdicts, sizes, options)
    if failed:
        raise Failure(
            f"{failed} archives could not be removed, or not with all that belongs to them"
        )


def _with_lock(place: KeptPlace, verdict: Verdict, clock: Clock) -> Verdict:
    """What no rule keeps and is locked stays until its lock is over; the rules do not see that."""
    if verdict.mark is not Mark.REMOVE:
        return verdict
    until_s = place.locked_until_s(os.path.basename(verdict.archive.path))
    if until_s <= clock.now_s:
        return verdict
    return verdict._replace(mark=Mark.LOCKED, rule=lock_text(until_s))


def _clock(place: KeptPlace, options: argparse.Namespace) -> Clock:
    within_s = options.keep_within
    if within_s is None:
        within_s = _SERVICE_WITHIN_S if place.is_service else 0
    return Clock(time.time(), within_s, place.is_service and not options.by_name)


def find(place: KeptPlace) -> Mapping[str, list[tuple[StoredArchive, int]]]:
    """Archives by machine, each with its size in bytes. Raises Failure."""
    return {
        machine: [
            (
                StoredArchive(
                    place.full_name(each.name),
                    machine,
                    each.when,
                    each.is_protected,
                    each.file.changed_s,
                ),
                each.file.size_bytes,
            )
            for each in archives
            if each.when is not None
        ]
        for machine, archives in by_machine(find_archives(place)).items()
    }


def _warn(group: str, verdicts: Sequence[Verdict], clock: Clock) -> None:
    """Return warnings of a key that may be lost, or a clock that may be wrong."""
    name = name_text(group)
    future = sum(v.mark is Mark.FUTURE for v in verdicts)
    if future:
        _say(
            f"{name}: {future} archives are from a time to come, and stay; they count for no rule. "
            "Was a clock wrong, or does somebody want to push older ones out? Remove them by hand"
        )
    misdated = sum(v.mark is Mark.MISDATED for v in verdicts)
    if misdated:
        _say(
            f"{name}: {misdated} archives were stored at another time than their names say, and "
            "stay; they count for no rule. Were they copied here without their times (then "
            "--by-name), or does somebody want to push true ones out? Look at them, and remove them "
            "by hand"
        )
    found = flood([v.archive for v in verdicts], clock.now_s)
    if found:
        _say(
            f"{name}: {found[0]} archives were stored within 24 hours, where at most {found[1]} a "
            "day are usual: has somebody else a key of this client?"
        )


def _say(text: str) -> None:
    print(one_line(f"vmapipe prune: {text}"), file=sys.stderr, flush=True)


def _carry_out(
    place: KeptPlace,
    group: str,
    verdicts: Sequence[Verdict],
    sizes: Mapping[str, int],
    options: argparse.Namespace,
) -> int:
    """Returns how many could not be removed."""
    failed = 0
    for verdict in verdicts:
        name, removed = os.path.basename(verdict.archive.path), False
        size_bytes = sizes[verdict.archive.path]
        if verdict.mark is Mark.REMOVE and options.yes:
            try:
                remove(place, name)
                removed = True
            except Failure as failure:
                failed += 1
                _say(str(failure))
                removed = not place.has(name)
        if options.json:
            line = {
                "archive": verdict.archive.path,
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


def prune_machine(folder: str, group: str, keep: Mapping[str, int], new: str) -> list[str]:
    """Remove a machine's older archives by these rules, never `new`; return their names. Raises Failure."""
    removed, failures = [], []
    with contextlib.closing(open_place(folder)) as place:
        clock = Clock(time.time(), _SERVICE_WITHIN_S if place.is_service else 0, place.is_service)
        found = [archive for archive, _ in find(place).get(group, [])]
        for verdict in judge(found, keep, clock):
            name = os.path.basename(verdict.archive.path)
            if _with_lock(place, verdict, clock).mark is Mark.REMOVE and name != new:
                try:
                    remove(place, name)
                    removed.append(name)
                except Failure as failure:
                    failures.append(str(failure))
    if failures:
        raise Failure("; ".join(failures))
    return removed
