# SPDX-License-Identifier: Apache-2.0
"""What an archive's name says: whose it is and from when. And what belongs to it. Pure."""

from __future__ import annotations

import datetime
import re

from vmapipe.control.retention.rules import When

# vzdump-qemu-100-2026_01_31-02_00_00.vma.zst, vm-2026-01-31.vma, db_20260131T020000.vma.gz
_NAME = re.compile(
    r"(?P<group>.+)[-_.]"
    r"(?P<year>\d{4})[-_]?(?P<month>\d\d)[-_]?(?P<day>\d\d)"
    r"(?:[-_T.](?P<hour>\d\d)[-_:]?(?P<minute>\d\d)(?:[-_:]?(?P<second>\d\d))?Z?)?"
    r"\.vma(?:\.(?:zst|gz|lzo))?",
    re.ASCII,
)
_ENDING = re.compile(r"\.vma(?:\.(?:zst|gz|lzo))?$")
PROTECTED = ".protected"


def parse(name: str) -> tuple[str, When] | None:
    """Group and time; None: the name has no date, or is no archive's."""
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
    return found["group"], (year, month, day, hour, minute, second)


def beside(archive: str) -> list[str]:
    """The files that belong to an archive, there or not."""
    stem = _ENDING.sub("", archive)
    logs = [f"{stem}.log"] if stem != archive else []
    return [f"{archive}.manifest.json", f"{archive}.notes", *logs]
