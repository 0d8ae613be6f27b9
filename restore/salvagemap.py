# SPDX-License-Identifier: Apache-2.0
"""What a salvage writes beside the disks: which bytes of them are missing or damaged, and why.

Twice, as JSON and as text. A disk may have any number of such ranges: both are made line by
line. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from vmapipe.restore.checks.census import Range
from vmapipe.restore.checks.report import (
    Damage,
    DiskState,
    range_fields,
    range_text,
    state_text,
)
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line

JSON_NAME, TEXT_NAME = "vmapipe-salvage.json", "vmapipe-salvage.txt"


class Salvaged(NamedTuple):
    """A device, where it went (None: nowhere), and a way to all its ranges."""

    state: DiskState
    path: str | None
    ranges: Callable[[], Iterator[Range]]


class SalvageMap(NamedTuple):
    """`notes`: what else is lost or only guessed. `damage`: the first finds of `damage_count`."""

    archive: str
    uuid: bytes
    disks: Sequence[Salvaged]
    notes: Sequence[str]
    damage: Sequence[Damage]
    damage_count: int

    def json_lines(self) -> Iterator[str]:
        """One JSON document, in lines."""
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
        """For people."""
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
