# SPDX-License-Identifier: Apache-2.0
"""What verification found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vmapipe.restore.archive.totals import Totals
from vmapipe.runtime.events import Event

# More than a person reads; the rest is only counted.
MAX_DAMAGE = 1000


class Damage(NamedTuple):
    """One thing that is wrong.

    `device`, `offset`, `length`: what is lost or not to be trusted, in bytes of
    that device, where it is known. `archive_offset`: where in the plain archive.
    `reference_text`: what the reference tool says of it, where it has words.
    """

    text: str
    device: str | None = None
    offset: int | None = None
    length: int | None = None
    archive_offset: int | None = None
    reference_text: str | None = None

    @property
    def reference_words(self) -> str:
        """The reference tool's words, or ours where it has none."""
        return str(self) if self.reference_text is None else self.reference_text

    def __str__(self) -> str:
        words = self.text
        if self.device is not None and self.offset is not None and self.length is not None:
            end = self.offset + self.length - 1
            words = f"device {self.device!r}, bytes {self.offset}..{end}: {words}"
        if self.archive_offset is not None:
            words += f" (archive offset {self.archive_offset})"
        return words


class Report:
    """The verdict on one archive.

    `damage` has the first 1000 finds, `damage_count` is all of them.
    `data_checked`: all data was compared with a manifest; else only the
    structure was, for the format has no checksum over its data.
    `file_checked`: the stored file as a whole was compared.
    """

    def __init__(self, archive: str) -> None:
        self.archive = archive
        self.compression = "none"
        self.manifest: str | None = None
        self.data_checked = False
        self.file_checked = False
        self.damage: list[Damage] = []
        self.damage_count = 0
        self.totals = Totals()
        self.seconds = 0.0

    @property
    def ok(self) -> bool:
        return not self.damage_count

    def add(self, finds: Iterable[Damage]) -> None:
        for find in finds:
            self.damage_count += 1
            if len(self.damage) < MAX_DAMAGE:
                self.damage.append(find)

    def event(self) -> Event:
        """The report as one event."""
        return {
            "event": "verified",
            "archive": self.archive,
            "ok": self.ok,
            "compression": self.compression,
            "manifest": self.manifest,
            "data_checked": self.data_checked,
            "file_checked": self.file_checked,
            "archive_bytes": self.totals.archive_bytes,
            "extents": self.totals.extents,
            "data_bytes": self.totals.data_bytes,
            "zero_bytes": self.totals.cluster_bytes - self.totals.data_bytes,
            "damage_count": self.damage_count,
            "damage": [
                {
                    "text": find.text,
                    "device": find.device,
                    "offset": find.offset,
                    "length": find.length,
                    "archive_offset": find.archive_offset,
                }
                for find in self.damage
            ],
            "seconds": round(self.seconds, 3),
        }
