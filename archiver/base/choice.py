# SPDX-License-Identifier: Apache-2.0
"""Which archive can be the base of a new one: the newest of the same machine beside it that stands the check.

A machine is what an archive's name says up to the date, as for `vmapipe prune`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from vmapipe.archiver.base.check import Base, check_base
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.objectstore import StoredFolder

# Year to second, of the clock on the wall where the archive was made.
When = tuple[int, int, int, int, int, int]

#: How an archive's name ends: `search` it.
ARCHIVE_ENDING = re.compile(r"\.vma(?:\.(?:zst|gz|lzo))?(?:\.age)?\Z")
#: All of them.
ENDINGS = tuple(f".vma{zst}{age}" for zst in ("", ".zst", ".gz", ".lzo") for age in ("", ".age"))
# vzdump-qemu-100-2026_01_31-02_00_00.vma.zst, vm-2026-01-31.vma, db_20260131T020000.vma.gz
_NAME = re.compile(
    r"(?P<group>.+)[-_.]"
    r"(?P<year>\d{4})[-_]?(?P<month>\d\d)[-_]?(?P<day>\d\d)"
    r"(?:[-_T.](?P<hour>\d\d)[-_:]?(?P<minute>\d\d)(?:[-_:]?(?P<second>\d\d))?Z?)?"
    + ARCHIVE_ENDING.pattern,
    re.ASCII,
)
# Behind so many that are none, a full backup is made, rather than a folder of damage read.
_MOST_LOOKS = 16


class ArchiveName(NamedTuple):
    """What an archive's name says: the machine, and when it was made."""

    machine: str
    when: When


def read_name(name: str) -> ArchiveName | None:
    """Machine and time; None: the name has no date, or is not an archive's."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    fields = ("year", "month", "day", "hour", "minute", "second")
    year, month, day, hour, minute, second = (int(found[field] or 0) for field in fields)
    try:
        datetime.date(year, month, day)
        datetime.time(hour, minute, second)
    except ValueError:
        return None
    return ArchiveName(found["group"], (year, month, day, hour, minute, second))


def _names_in(folder: str, archive: str) -> Sequence[str]:
    """Raises OSError, Failure."""
    if is_object(archive):
        with contextlib.closing(StoredFolder(folder)) as store:
            return [each.name for each in store.objects()]
    with HeldFolder(folder) as held:
        return held.names()


def usable_base(found: Base | str, full_every: int) -> Base | str:
    """Return the base, or why the next archive is a full one: in words.

    `full_every`: so many incremental archives follow a full one; 0: any number.
    """
    if isinstance(found, str) or not full_every or found.totals.incrementals < full_every:
        return found
    return (
        f"{found.totals.incrementals} incremental archives in a row end with {found.archive} "
        f"(--full-every {full_every})"
    )


def choose_base(
    archive: str, devices: Collection[str], recorded: Collection[bytes] = ()
) -> Base | str:
    """Return the base for a new `archive` (a file's path), or in words why there is none. Never raises.

    It has at least one of `devices`; each device that it lacks, or has in another size, is
    sent in full. The time in a name only orders: with a clock that was wrong another one is
    chosen, and a base that is older than it might be costs time, never data.

    `recorded`: uuids of archives since which changes were recorded; one of them is preferred.
    """
    folder, name = os.path.split(archive)
    parsed = read_name(name)
    if parsed is None:
        return f"the name {name} has no date: whose archives it follows cannot be told"
    try:
        names = _names_in(folder, archive)
    except (OSError, Failure) as error:
        why = os_error_text(error) if isinstance(error, OSError) else str(error)
        return f"cannot look into {folder or '.'}: {why}"
    parts = [
        (other.when, each)
        for each in names
        if (other := read_name(each)) is not None and other.machine == parsed.machine
    ]
    doubts = []
    newest: Base | None = None
    for _, each in sorted(parts, reverse=True)[:_MOST_LOOKS]:
        found = check_base(os.path.join(folder, each))
        if isinstance(found, Base):
            if any(device.name in devices for device in found.devices):
                if not recorded or found.uuid in recorded:
                    return found
                newest = newest or found
                continue
            found = f"{found.archive} has none of these disks"
        doubts.append(found)
    if newest is not None:
        return newest
    if doubts:
        return doubts[0]
    return f"there is no earlier archive of {parsed.machine} in {folder or '.'}"
