# SPDX-License-Identifier: Apache-2.0
"""Findings, the verdict on each disk, and how both are told: event, text, map of a salvage. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vmapipe.restore.archive.reader import ArchiveTotals
from vmapipe.runtime.text import MAX_NAME_CHARS, name_text, one_line
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.header import Device

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import (
        CheckerName,
        DamageFields,
        DiskStateFields,
        RangeFields,
        RangeStateName,
        StateName,
        VerifiedEvent,
    )

SOUND: Final = "sound"
UNCHECKED: Final = "unchecked"
INCOMPLETE: Final = "incomplete"
DAMAGED: Final = "damaged"
_STATE_WORDS = {
    SOUND: "complete and sound",
    UNCHECKED: "complete and unchecked",
    INCOMPLETE: "incomplete",
    DAMAGED: "damaged",
}
# More than a person reads; the rest is only counted.
MAX_DAMAGE = 1000
#: Names of the map that a salvage writes beside the disks, for programs and for people.
JSON_NAME, TEXT_NAME = "vmapipe-salvage.json", "vmapipe-salvage.txt"


class Damage(NamedTuple):
    """A finding: one thing that is wrong.

    `device`, `offset`, `length`: what is lost or not to be trusted, in bytes of
    that device, where it is known. `archive_offset`: where in the plain archive.
    `reference_text`: the reference tool's text, if it has one.
    """

    text: str
    device: str | None = None
    offset: int | None = None
    length: int | None = None
    archive_offset: int | None = None
    reference_text: str | None = None

    @property
    def reference_words(self) -> str:
        """The reference tool's text, or ours where it has none."""
        return str(self) if self.reference_text is None else self.reference_text

    def fields(self) -> DamageFields:
        """For events and for the map of a salvage."""
        return {
            "text": self.text,
            "device": self.device,
            "offset": self.offset,
            "length": self.length,
            "archive_offset": self.archive_offset,
        }

    def __str__(self) -> str:
        text = self.text
        if self.device is not None and self.offset is not None and self.length is not None:
            end = self.offset + self.length - 1
            text = f"device {self.device!r}, bytes {self.offset}..{end}: {text}"
        if self.archive_offset is not None:
            text += f" (archive offset {self.archive_offset})"
        return text


class BadRange(NamedTuple):
    """Bytes of a device that are not as they should be. `state`: `missing` or `damaged`."""

    offset: int
    length: int
    state: RangeStateName
    reason: str


class DiskState(NamedTuple):
    """Verdict on one device.

    `state`: `sound`, `unchecked` (all of it is there, and nothing has proved its data),
    `damaged`, or `incomplete` (and perhaps damaged, too). `checked_by`: what has proved the
    data of a sound one: `manifest`, or the checksums of `zstd`, `gzip` or `lzo`. `ranges`: the
    first of those that are not as they should be, as (offset, length, `missing` or `damaged`,
    reason); `range_count` is all of them.
    """

    device: Device
    state: StateName
    checked_by: CheckerName | None
    missing_bytes: int
    damaged_bytes: int
    range_count: int
    ranges: tuple[tuple[int, int, RangeStateName, str], ...]

    @property
    def is_whole(self) -> bool:
        """True when all of it can be restored as it was, as far as can be known."""
        return self.state in (SOUND, UNCHECKED)

    def fields(self) -> DiskStateFields:
        """For events and for the map of a salvage."""
        return {
            "dev_id": self.device.dev_id,
            "name": self.device.name,
            "bytes": self.device.size_bytes,
            "state": self.state,
            "checked_by": self.checked_by,
            "missing_bytes": self.missing_bytes,
            "damaged_bytes": self.damaged_bytes,
            "range_count": self.range_count,
        }


def range_fields(offset: int, length: int, state: RangeStateName, reason: str) -> RangeFields:
    """Return a range's fields, for events and for the map of a salvage."""
    return {"offset": offset, "length": length, "state": state, "reason": reason}


def state_text(disk: Mapping[str, Any]) -> str:
    """Return a device's `fields` as a line of text."""
    text = f"device {name_text(disk['name'])}: {_STATE_WORDS[disk['state']]}"
    checked_by = disk["checked_by"]
    if checked_by == "manifest":
        text += " (every byte compared with the manifest)"
    elif checked_by is not None:
        text += f" (as it was when it was compressed: its {checked_by} checksums are right)"
    parts = [
        (disk["missing_bytes"], "missing"),
        (disk["damaged_bytes"], "in ranges that are damaged"),
    ]
    counts = " and ".join(f"{count} bytes {what}" for count, what in parts if count)
    if counts:
        text += f": {counts}, {disk['range_count']} range{'s' * (disk['range_count'] > 1)}"
    elif disk["range_count"]:
        text += ": its end may be missing"
    return text


def range_text(one: Mapping[str, Any]) -> str:
    """Return a range's fields as a line of text."""
    what = f"from byte {one['offset']} on"
    if one["length"]:
        what = f"bytes {one['offset']}..{one['offset'] + one['length'] - 1} ({one['length']})"
    return f"{one['state']} {what}: {one['reason']}"


class Report:
    """The verdict on one archive.

    `damage` has the first 1000 finds, `damage_count` is all of them.
    `data_checked`: all data was compared with a manifest; else only the
    structure was, for the format has no checksum over its data; `proved` is what the
    checksums of the compression have proved of it then, as text.
    `file_checked`: the stored file as a whole was compared. `is_encrypted`: without a key that is all
    that could be, and `stored_bytes` its length.
    """

    def __init__(self, archive: str) -> None:
        self.archive = archive
        self.compression = "none"
        self.manifest: str | None = None
        self.data_checked = False
        self.file_checked = False
        self.is_encrypted = False
        self.stored_bytes = 0
        self.proved: str | None = None
        self.disks: list[DiskState] = []
        self.damage: list[Damage] = []
        self.damage_count = 0
        self.totals = ArchiveTotals()
        self.seconds = 0.0

    @property
    def ok(self) -> bool:
        return not self.damage_count

    def add(self, find: Damage) -> None:
        self.damage_count += 1
        if len(self.damage) < MAX_DAMAGE:
            self.damage.append(find)

    def event(self) -> VerifiedEvent:
        """The report as one event."""
        return {
            "event": "verified",
            "archive": self.archive,
            "ok": self.ok,
            "compression": self.compression,
            "manifest": self.manifest,
            "data_checked": self.data_checked,
            "file_checked": self.file_checked,
            "encrypted": self.is_encrypted,
            "proved": self.proved,
            "archive_bytes": self.totals.archive_bytes,
            "stored_bytes": self.stored_bytes,
            "extents": self.totals.extents,
            "data_bytes": self.totals.data_bytes,
            "zero_bytes": self.totals.cluster_bytes - self.totals.data_bytes,
            "devices": [
                {**disk.fields(), "ranges": [range_fields(*one) for one in disk.ranges]}
                for disk in self.disks
            ],
            "damage_count": self.damage_count,
            "damage": [find.fields() for find in self.damage],
            "seconds": round(self.seconds, 3),
        }


class Salvaged(NamedTuple):
    """A device, where it went (None: nowhere), and a way to all its ranges."""

    state: DiskState
    path: str | None
    ranges: Callable[[], Iterator[BadRange]]


class SalvageMap(NamedTuple):
    """`notes`: what else is lost or only guessed. `damage`: the first finds of `damage_count`."""

    archive: str
    uuid: bytes
    disks: Sequence[Salvaged]
    notes: Sequence[str]
    damage: Sequence[Damage]
    damage_count: int

    def json_lines(self) -> Iterator[str]:
        """Yield a JSON document, in lines."""
        head = {
            "format": "vmapipe-salvage",
            "version": 1,
            "archive": self.archive,
            "uuid": self.uuid.hex(),
            "notes": list(self.notes),
            "damage_count": self.damage_count,
            "damage": [find.fields() for find in self.damage],
        }
        yield json.dumps(head)[:-1] + ', "devices": [\n'
        for number, disk in enumerate(self.disks):
            fields = {**disk.state.fields(), "path": disk.path}
            yield ("," if number else " ") + json.dumps(fields)[:-1] + ', "ranges": [\n'
            for index, one in enumerate(disk.ranges()):
                yield ("  ," if index else "   ") + json.dumps(range_fields(*one)) + "\n"
            yield " ]}\n"
        yield "]}\n"

    def text_lines(self) -> Iterator[str]:
        """Yield the map as text for people, in lines."""
        yield f"What could not be restored of {one_line(self.archive)}\n"
        for note in self.notes:
            yield f"note: {one_line(note)}\n"
        for disk in self.disks:
            yield f"\n{state_text(disk.state.fields())}\n"
            if disk.path is not None:
                yield f"  restored to {one_line(disk.path)}; what is missing reads as zero there\n"
            else:
                yield "  not restored\n"
            for one in disk.ranges():
                yield f"  {range_text(range_fields(*one))}\n"
        if self.damage:
            yield "\nWhat is wrong with the archive\n"
        for find in self.damage:
            yield f"  {one_line(str(find))}\n"
        if self.damage_count > len(self.damage):
            yield f"  ... and {self.damage_count - len(self.damage)} more\n"


def whole_names(states: Iterable[DiskState]) -> list[str]:
    """The devices that can be restored as they were."""
    return [one_line(s.device.name, MAX_NAME_CHARS) for s in states if s.is_whole]


def restored_part_text(
    error: ArchiveError, wanted: Sequence[DiskState], states: Sequence[DiskState]
) -> str:
    """Return the notice about a damaged archive whose chosen devices are whole."""
    whole = ", ".join(map(repr, whole_names(wanted))) or "nothing but configs"
    others = [state_text(state.fields()) for state in states if not state.is_whole]
    first = f"the archive is damaged; what is restored of it is whole: {whole}"
    return "; ".join([first, *others, str(error)])


def salvage_advice(states: Sequence[DiskState]) -> str:
    """Return what can still be restored of a damaged archive, and how."""
    whole = ", ".join(map(repr, whole_names(states)))
    if whole:
        return (
            f"; whole are {whole}: restored when only they are named (--device NAME); what there "
            "is of all others: vmapipe restore --salvage"
        )
    return "; no disk of it is whole; what there is of them: vmapipe restore --salvage"
