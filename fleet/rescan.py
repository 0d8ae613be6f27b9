# SPDX-License-Identifier: Apache-2.0
"""What the archives of a place say by themselves: the catalogue's records, made again from nothing else.

A machine is what an archive's name says, as `vmapipe prune` reads it; its time is the name's, in the time zone
of this host, or that of storing. What stands beside an archive was written by whoever can write there: it
is read in bounds, and what is not as ours are counts for nothing.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import NamedTuple

from vmapipe.access.drill.result import PICTURE, DrillResult
from vmapipe.archiver.outputs.manifests import SUFFIX as MANIFEST_SUFFIX
from vmapipe.fleet.outcome import drill_verdict
from vmapipe.fleet.records import ArchiveRecord, DrillRecord, VerificationRecord
from vmapipe.places.archives import KeptArchive, drill_of, find_archives, verified_of
from vmapipe.places.place import KeptPlace
from vmapipe.places.verified import SUFFIX as VERIFIED_SUFFIX
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.side_files import DRILL_SUFFIX
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.manifest import Totals, read_totals

# Of an archive of some 600 GiB of data. The size of the disks of a larger one stays unknown.
_MAX_MANIFEST_BYTES = 8 << 20
# Of a store, which answers each after some tens of milliseconds.
_THREADS = 8
_MOST_TIME_S = 1e11
_DRILL_TIME = "%Y-%m-%dT%H:%M:%SZ"


class PlaceRecords(NamedTuple):
    """What was found in one place."""

    archives: list[ArchiveRecord]
    verifications: list[VerificationRecord]
    drills: list[DrillRecord]


def read_place(
    place: KeptPlace,
    target: str,
    names: Mapping[str, str] = MappingProxyType({}),
    *,
    is_utc: bool = False,
) -> PlaceRecords:
    """Return the records of all archives of a place. Raises Failure where the place cannot be read.

    `names`: of machines, by the words that their archives' names begin with, where these differ. `is_utc`: the
    times in names are, but in Proxmox's; else they are this host's. Manifests are read of each machine's newest archive only: they say how large its disks are.
    """
    kept = [
        one._replace(machine=names.get(one.machine, one.machine)) for one in find_archives(place)
    ]
    newest = {archive.machine: archive for archive in kept}  # the last one, by time
    # Most have nothing beside them that would have to be read.
    looked_at = [one for one in kept if one.name + VERIFIED_SUFFIX in one.beside]
    tested = [one for one in kept if one.name + DRILL_SUFFIX in one.beside]
    measured = [one for one in newest.values() if one.has_manifest]
    with ThreadPoolExecutor(_THREADS, "rescan") as pool:
        verified = list(pool.map(lambda one: _verification(place, one, target), looked_at))
        drills = list(pool.map(lambda one: _drill(place, one, target), tested))
        totals = dict(
            zip(
                (one.name for one in measured),
                pool.map(lambda one: _totals(place, one), measured),
                strict=True,
            )
        )
    return PlaceRecords(
        [
            _archive(
                place,
                one,
                target,
                totals.get(one.name),
                is_utc=is_utc and not one.name.startswith("vzdump-"),
            )
            for one in kept
        ],
        [record for record in verified if record is not None],
        [record for record in drills if record is not None],
    )


def _archive(
    place: KeptPlace, archive: KeptArchive, target: str, totals: Totals | None, *, is_utc: bool
) -> ArchiveRecord:
    # The year 5138: what a catalogue has is of this era, whatever a name says, or a file's time.
    at_s = max(0.0, min(_instant_s(archive, is_utc=is_utc), _MOST_TIME_S))
    return ArchiveRecord(
        archive.machine,
        target,
        archive.name,
        location=place.full_name(archive.name),
        instant_s=at_s,
        stored_s=at_s,
        disk_bytes=sum(device.size_bytes for device in totals.devices) if totals else 0,
        plain_bytes=totals.archive_bytes if totals else 0,
        size_bytes=archive.file.size_bytes,
    )


def _instant_s(archive: KeptArchive, *, is_utc: bool) -> float:
    """A copy keeps its name and not its file's time; a name with a day only leaves the hour to the file."""
    if archive.when is None:
        return archive.file.changed_s
    moment = (*archive.when, 0, 0, -1)
    named_s = float(calendar.timegm(moment)) if is_utc else time.mktime(moment)
    if archive.when[3:] == (0, 0, 0) and 0 <= archive.file.changed_s - named_s < 86400:
        return archive.file.changed_s
    return named_s


def _totals(place: KeptPlace, archive: KeptArchive) -> Totals | None:
    with contextlib.suppress(Failure, ArchiveError):
        raw = place.read_small(archive.name + MANIFEST_SUFFIX, _MAX_MANIFEST_BYTES)
        if raw:
            return read_totals(raw)
    return None


def _verification(place: KeptPlace, archive: KeptArchive, target: str) -> VerificationRecord | None:
    found = verified_of(place, archive)
    if found is None:
        return None
    return VerificationRecord(
        archive.machine,
        target,
        archive.name,
        found.time_s,
        "ok" if found.ok else "damaged",
        found.data_checked,
    )


def _drill(place: KeptPlace, archive: KeptArchive, target: str) -> DrillRecord | None:
    result = drill_of(place, archive)
    if result is None:
        return None
    folder = os.path.dirname(place.full_name(archive.name))
    with contextlib.suppress(ValueError):  # a date that no calendar has
        return drill_record(result, archive.machine, target, archive.name, folder)
    return None


def drill_record(
    result: DrillResult, machine: str, target: str, archive: str, folder: str
) -> DrillRecord:
    """Return a restore test as the catalogue has it. `folder`: where archive and evidence are."""
    return DrillRecord(
        machine,
        target,
        archive,
        float(calendar.timegm(time.strptime(result.date, _DRILL_TIME))),
        drill_verdict(result.verdict),
        result.seconds or 0.0,
        result.proof,
        os.path.join(folder, result.evidence, PICTURE) if result.evidence else "",
        text=result.reason,
    )
