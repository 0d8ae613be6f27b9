# SPDX-License-Identifier: Apache-2.0
"""The archives of a place as a table, and as JSON. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vmapipe.archiver.base.choice import When
from vmapipe.places.archives import ArchiveCondition, KeptArchive
from vmapipe.runtime.immutable import WITHOUT_END_S
from vmapipe.runtime.text import human_bytes, one_line

# A table is as wide as its longest name; one that was made long on purpose is cut.
_MAX_NAME_CHARS = 60
_HEADINGS = ("MACHINE", "TIME", "SIZE", "VERIFIED", "SHARED", "STATE", "ARCHIVE")


def lock_text(until_s: float) -> str:
    if until_s >= WITHOUT_END_S:
        return "locked, and nothing says until when"
    return f"locked until {_minute(until_s)}"


def _minute(time_s: float) -> str:
    return f"{datetime.datetime.fromtimestamp(time_s, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _day(time_s: float) -> str:
    return f"{datetime.datetime.fromtimestamp(time_s, datetime.UTC):%Y-%m-%d}"


def _time_text(when: When, between: str) -> str:
    year, month, day, hour, minute, second = when
    return f"{year:04}-{month:02}-{day:02}{between}{hour:02}:{minute:02}:{second:02}"


def json_of(path: str, archive: KeptArchive, condition: ArchiveCondition) -> dict[str, Any]:
    """Sizes in bytes, times in seconds since 1970 but for `time`, which is the name's; null: none, or not known."""
    verified, when = condition.verified, archive.when
    return {
        "archive": path,
        "machine": archive.machine,
        "time": _time_text(when, "T") if when is not None else None,
        "stored": int(archive.file.changed_s),
        "bytes": archive.file.size_bytes,
        "manifest": archive.has_manifest,
        "verified": verified
        and {"time": verified.time_s, "ok": verified.ok, "data_checked": verified.data_checked},
        "shared_bytes": condition.shared_bytes,
        "protected": archive.is_protected,
        "encrypted": condition.is_encrypted,
        "locked_until": int(condition.locked_until_s) or None,
        "drill": {"verdict": condition.drilled, "date": condition.drill_date}
        if condition.drilled
        else None,
    }


def table(
    rows: Iterable[tuple[KeptArchive, ArchiveCondition]], signed: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Lines with a heading; what a stranger has called an archive moves no cursor.

    `signed`: a word for each, in a column of its own.
    """
    cells: list[tuple[str, ...]] = (
        [_HEADINGS] if not signed else [(*_HEADINGS[:-1], "SIGNED", _HEADINGS[-1])]
    )
    for archive, condition in rows:
        row = _cells(archive, condition)
        cells.append(row if not signed else (*row[:-1], signed[archive.name], row[-1]))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*padded, row[-1]]).rstrip()


def _cells(archive: KeptArchive, condition: ArchiveCondition) -> tuple[str, ...]:
    when, verified = archive.when, condition.verified
    made = _time_text(when, " ") if when else "-"
    if verified is None:
        seen = "never" if archive.has_manifest else "no manifest"
    elif not verified.ok:
        seen = f"DAMAGED {_day(verified.time_s)}"
    else:
        seen = _day(verified.time_s) + ("" if verified.data_checked else " structure")
    shared, size_bytes = condition.shared_bytes, archive.file.size_bytes
    part = f"{100 * min(shared, size_bytes) // max(1, size_bytes)} %" if shared else "-"
    state = ["protected"] if archive.is_protected else []
    state += ["encrypted"] if condition.is_encrypted else []
    state += [lock_text(condition.locked_until_s)] if condition.locked_until_s else []
    state += [f"drill {condition.drilled} {condition.drill_date[:10]}"] if condition.drilled else []
    return (
        one_line(archive.machine, 101)[:_MAX_NAME_CHARS],
        made,
        human_bytes(size_bytes),
        seen,
        part,
        one_line(", ".join(state), 200) or "-",
        one_line(archive.name),
    )
